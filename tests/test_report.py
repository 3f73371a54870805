"""merge_report.html: what it tells is what the plan and the statistics say, nothing leaks, and a browser shows it.

Screenshots of the browser tests are kept in ``tests/artifacts``, or in the folder that MERGEKIT_SCREENSHOTS names.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mergekit
from browsing import in_browser, screenshot
from command import assert_refused, warm_up
from command import mergekit as run
from files import LAYERS, llama, to_float, write_model
from mergekit import api
from mergekit.output.report import REPORT, ReportData, page, report_data
from mergekit.output.report.charts import draw
from mergekit.output.report.grids import Grid, feeding, parameter_grids, shown, statistics_grids
from mergekit.output.report.words import findings
from mergekit.planning.expression import Apply

ROOT = Path(mergekit.__file__).parent.parent
DOCUMENTS = ("merge_stats.json", "merge_manifest.json", "config.json")
RECIPE = """
# fades out <b>&amp;
merge_method: ties
base_model: {base}
models:
- model: {b}
  parameters:
    weight: [1, 0.25]
    density:
    - {{filter: mlp, value: 0.5}}
    - {{value: 0.75}}
- model: {c}
  parameters: {{weight: 0.5, density: 0.5}}
"""


class Page(HTMLParser):
    """The tables of a page by caption, its tags, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._title, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "b":
            self._title, self._inside = "", "title"
        elif tag == "tr":
            self.tables.setdefault(self._title, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._title][-1].append("")
            self._inside = "cell"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("b", "td", "th"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "title":
            self._title += data
        elif self._inside == "cell":
            self.tables[self._title][-1][-1] += data

    def cell(self, title: str, row: str, column: str) -> str:
        head, *rows = self.tables[title]
        return next(cells for cells in rows if cells[0] == row)[head.index(column)]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, one of a hostile name, a recipe, and its merge with a report."""
    warm_up()
    root = tmp_path_factory.mktemp("report")
    names = {"base": "a", "b": "<img src=x onerror=alert(1)>", "c": "c"}
    for seed, name in enumerate(names.values()):
        write_model(root / name, seed)
    recipe = RECIPE.format(**{key: json.dumps(str(root / name)) for key, name in names.items()})
    (root / "r.yml").write_text(recipe)
    mergekit.run_merge(root / "r.yml", root / "out", report=True)
    return root


@pytest.fixture(scope="module")
def data(merged: Path) -> ReportData:
    documents = {name: (merged / "out" / name).read_text() for name in DOCUMENTS}
    return report_data("out", documents, mergekit.plan(merged / "r.yml"))


@pytest.fixture(scope="module")
def text(merged: Path) -> str:
    return (merged / "out" / REPORT).read_text()


def by_title(grids: list[Grid]) -> dict[str, Grid]:
    return {grid.title: grid for grid in grids}


def test_both_ways_give_the_same_page(merged, text, data):
    assert page(data) == text
    path = api.report_model(merged / "out", out=merged / "again.html")
    assert path.read_text() == text


def test_nothing_can_be_loaded_and_no_name_is_markup(merged, text):
    found = Page(text)
    assert not [tag for tag, _ in found.tags if tag in ("img", "link", "iframe", "object", "form")]
    for _, attributes in found.tags:
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "fades out &lt;b&gt;&amp;amp;" in text


def test_no_local_path_leaks(merged, text):
    assert str(merged) not in text
    assert not re.search(r"/(tmp|home|root)\b", text)


def test_parameters_are_those_of_the_plan(merged, data, text):
    grids = by_title(parameter_grids(data))
    b = "<img src=x onerror=alert(1)>"
    assert sorted(grids) == [f"density of {b}", f"weight of {b}"]
    found = Page(text)
    for output in mergekit.plan(merged / "r.yml").outputs:
        tensor = next(t for t in data.tensors if t.name == output.name)
        assert isinstance(output.expression, Apply)
        for name in ("weight", "density"):
            value = output.expression.settings[name][0]
            assert found.cell(f"{name} of {b}", tensor.row, tensor.role) == shown(value)


def test_figures_are_those_of_the_statistics(merged, data, text):
    stats = json.loads((merged / "out" / "merge_stats.json").read_text())
    found = Page(text)
    lone = {}
    for tensor in data.tensors:
        lone.setdefault((tensor.row, tensor.role), []).append(tensor.name)
    checked = 0
    for (row, role), names in lone.items():
        if len(names) == 1:
            figures, checked = stats["tensors"][names[0]], checked + 1
            assert found.cell("Cosine of <img src=x onerror=alert(1)> and c", row, role) == shown(figures["cosines"][0])
            assert found.cell("Sign conflicts", row, role) == shown(figures["sign_conflict"])
            assert found.cell("How far c moved", row, role) == shown(figures["deltas"][1] / figures["norms"][0])
            assert found.cell("Kept of c", row, role) == shown(figures["kept"][1])
            assert found.cell("Survival", row, role) == shown(figures["survival"])
            assert found.cell("Norm ratio", row, role) == shown(figures["norm_ratio"])
    assert checked == 5 * LAYERS + 3


def test_every_value_has_a_mark(data):
    for grid in statistics_grids(data):
        marks = re.search(r'class="cells">(.*?)</g>', draw(grid, "k"))[1].count("<path")
        assert marks == sum(value is not None for row in grid.values for value in row)


def test_the_report_stands_with_the_model_and_changes_nothing_else(merged):
    from mergekit.api.reproduce import reproduce_model
    from mergekit.api.verify import verify_model

    mergekit.run_merge(merged / "r.yml", merged / "plain")
    assert {p.name for p in (merged / "out").iterdir()} == {REPORT, *(p.name for p in (merged / "plain").iterdir())}
    for path in (merged / "plain").iterdir():
        if path.name != "README.md":  # it names its folder
            assert path.read_bytes() == (merged / "out" / path.name).read_bytes()
    assert REPORT not in json.loads((merged / "out" / "merge_manifest.json").read_text())["files"]
    assert not verify_model(merged / "out").faults
    assert not reproduce_model(merged / "out").faults


def test_another_merge_into_the_folder_takes_the_report_away(merged):
    shutil.copytree(merged / "out", merged / "replaced")
    mergekit.run_merge(merged / "r.yml", merged / "replaced", overwrite=True)
    assert not (merged / "replaced" / REPORT).exists()


def test_a_folder_whose_models_are_gone_tells_what_it_knows(merged, tmp_path):
    shutil.copytree(merged / "out", tmp_path / "out")
    recipe = tmp_path / "out" / "mergekit_config.yml"
    recipe.write_text(recipe.read_text() + "# edited\n")
    (tmp_path / "out" / REPORT).unlink()
    text = api.report_model(tmp_path / "out").read_text()
    assert "could not be planned again" in text
    assert "Sign conflicts" in text
    assert "density of" not in text
    assert str(tmp_path) not in text


def test_stacks_say_where_layers_come_from(tmp_path):
    folders = [write_model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    slices = [
        {"sources": [{"model": str(f), "layer_range": span}]} for f, span in zip(folders, ([0, 2], [1, 3]), strict=True)
    ]
    plan = mergekit.plan({"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"})
    grid = feeding(report_data("s", {"config.json": plan.config}, plan))
    assert grid.rows == ("0", "1", "2", "3")
    assert grid.columns == ("a", "b")
    assert grid.texts == (("0", ""), ("1", ""), ("", "1"), ("", "2"))


def test_a_plan_has_a_page_too(merged, monkeypatch):
    monkeypatch.chdir(merged)
    assert run("plan", "r.yml", "--html", "plan.html").code == 0
    text = Path("plan.html").read_text()
    assert "nothing was computed" in text
    assert "Sign conflicts" not in text
    assert "weight of c" not in text
    assert "density of &lt;img" in text


def test_the_worst_comes_first(data):
    import dataclasses

    tensors = {name: dict(figures) for name, figures in data.statistics.tensors.items()}
    name = next(iter(tensors))
    tensors[name] |= {"nonfinite": 3, "survival": 0.4, "norm_ratio": 3.0}
    found = findings(dataclasses.replace(data, statistics=dataclasses.replace(data.statistics, tensors=tensors)))
    told = [text for level, text in found if level == "warning"]
    assert [level for level, _ in found][:2] == ["warning", "warning"]
    assert f"1 tensor with numbers that are not finite: {name}." in told
    assert f"({name} keeps 40%)" in told[-1]
    assert any("norm ratio" in text for level, text in found if level == "look")


def test_models_that_cancel_each_other_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {name: ("F32", to_float(tensor).astype("<f4")) for name, tensor in llama(0).items()}
    write_model(Path("base"), tensors=base)
    for name, sign in (("plus", 1), ("minus", -1)):
        moved = {n: (t, v + np.float32(sign * 0.01) * np.cos(v, dtype="<f4")) for n, (t, v) in base.items()}
        write_model(Path(name), tensors=moved)
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("plus", "minus")]
    mergekit.run_merge({"merge_method": "task_arithmetic", "base_model": "base", "models": models}, "out", report=True)
    assert "plus and minus pull in opposite directions (cosine -1.00)" in Path("out", REPORT).read_text()


def test_without_its_library_a_report_is_refused_before_anything_is_done(merged, monkeypatch):
    from mergekit.output.report import charts

    monkeypatch.chdir(merged)
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    assert_refused(run("merge", "r.yml", "none", "--report"), 2, "pip install 'mergekit[report]'")
    assert not Path("none").exists()
    assert_refused(run("report", "out"), 2, "altair and vl_convert")


@pytest.mark.parametrize("change", [
    {"models": "ab"}, {"tensors": {"w": {"models": [9]}}}, {"unknown": [1]}, {"tensors": {"w": {"models": [0, 1]}}},
    {"copied": True},
])  # fmt: skip
def test_damaged_statistics_are_refused(merged, tmp_path, change):
    shutil.copytree(merged / "out", tmp_path / "out")
    path = tmp_path / "out" / "merge_stats.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert_refused(run("report", tmp_path / "out"), 1, "merge_stats.json: not statistics of mergekit")


@pytest.mark.parametrize("change", [{"result": 1e200}, {"models": []}, {"norms": [1]}, {"elements": None}])
def test_damaged_figures_are_refused(merged, tmp_path, change):
    shutil.copytree(merged / "out", tmp_path / "out")
    path = tmp_path / "out" / "merge_stats.json"
    record = json.loads(path.read_text())
    next(iter(record["tensors"].values())).update(change)
    path.write_text(json.dumps(record))
    assert_refused(run("report", tmp_path / "out"), 1, "merge_stats.json: not statistics of mergekit")


@pytest.mark.parametrize("change", [{"experts": ["a"]}, {"layers": [{}]}, {"tokens": None}])
def test_a_damaged_routing_report_is_refused(merged, tmp_path, change):
    shutil.copytree(merged / "out", tmp_path / "out")
    layer = {"accuracy": [0.5, None], "load": [0.5, 0.5], "entropy": 0.1}
    record = {"experts": ["a", "b"], "experts_per_token": 2, "layers": [layer], "tokens": [1, 2],
              "is_held_out": [True, True], "degenerate": [], "notes": []}  # fmt: skip
    (tmp_path / "out" / "routing.json").write_text(json.dumps(record))
    assert "Tokens that find their expert" in api.report_model(tmp_path / "out").read_text()
    (tmp_path / "out" / "routing.json").write_text(json.dumps({**record, **change}))
    assert_refused(run("report", tmp_path / "out"), 1, "routing.json: not a routing report")


# In a browser

Open = Callable[..., Any]


@pytest.fixture
def show(browser: Any, merged: Path) -> Iterator[Open]:
    """Open the report; at the end nothing was requested but the file, and nothing was said on the console."""
    asked: list[str] = []
    said: list[str] = []
    contexts = []

    def opened(**how: Any) -> Any:
        context = browser.new_context(**how)
        contexts.append(context)
        shown_page = context.new_page()
        shown_page.on("request", lambda request: asked.append(request.url))
        shown_page.on("console", lambda message: said.append(message.text))
        shown_page.on("pageerror", lambda error: said.append(str(error)))
        shown_page.goto((merged / "out" / REPORT).as_uri())
        return shown_page

    yield opened
    for context in contexts:
        context.close()
    assert all(url.startswith("file:") and url.endswith(REPORT) for url in asked)
    assert said == []


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_readably_in_light_and_dark(show, scheme):
    opened = show(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    assert opened.locator("h1").inner_text() == "out"
    ratios = opened.evaluate(CONTRAST)
    assert len(ratios) > 200
    assert min(ratio for ratio, _ in ratios) >= 4.5, min(ratios)
    screenshot(opened, f"report-{scheme}")


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_of_layers_are_white_on_the_colour_of_their_model(browser, tmp_path, scheme):
    folders = [str(write_model(tmp_path / name, seed)) for seed, name in enumerate("abc")]
    slices = [{"sources": [{"model": folder, "layer_range": [0, 2]}]} for folder in folders]
    plan = mergekit.plan({"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"})
    opened = browser.new_page(color_scheme=scheme)
    opened.goto(api.report_plan(plan, tmp_path / "stack.html", "stack").as_uri())
    found = opened.evaluate(
        """() => [".cells path", ".plot g > text[fill]"].map(selector => [...document.querySelectorAll(selector)].map(
        node => getComputedStyle(node).fill.match(/[0-9.]+/g).map(Number)))"""
    )
    opened.close()
    cells, texts = found
    assert len(cells) == len(texts) == 6
    assert all(text == [255, 255, 255] for text in texts)
    for cell in cells:
        linear = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in cell]
        light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (light + 0.05) >= 4.5


@in_browser
def test_the_pointer_reads_values(show):
    opened = show(viewport={"width": 1280, "height": 900})
    figure = opened.locator("figure", has_text="Sign conflicts")
    expected = figure.locator("tbody tr").nth(1).locator("td").nth(1).text_content()
    inside = figure.locator("tbody tr").nth(0).locator("td", has_text=".").count()
    figure.locator(".cells path").nth(inside).hover()
    tip = opened.locator("#tip").inner_text().split("\n")
    assert tip == ["layer 0 · norm", expected]
    screenshot(opened, "report-tooltip")


@in_browser
def test_the_keyboard_reads_values(show):
    opened = show(viewport={"width": 1280, "height": 900})
    names = []
    for _ in range(60):
        opened.keyboard.press("Tab")
        names.append(opened.evaluate("document.activeElement.getAttribute('aria-labelledby') || ''"))
        if names[-1] == "s0":
            break
    assert {"p0", "p1", "s0"} <= set(names)
    heard = []
    for key in ("ArrowLeft", "ArrowDown", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        opened.keyboard.press(key)
        heard.append(opened.locator("#tip").inner_text().split("\n")[0])
        assert opened.locator("#said").text_content().startswith(heard[-1])
    assert heard == ["before the layers · embedding", "layer 0 · norm", "layer 0 · q", "layer 1 · q", "layer 1 · norm",
                     "layer 0 · norm"]  # fmt: skip
    screenshot(opened, "report-keyboard")
    opened.keyboard.press("Escape")
    assert opened.locator("#tip").is_hidden()


@in_browser
def test_everything_has_a_name_and_a_place(show):
    opened = show()
    assert opened.evaluate(NAMELESS) == []
    levels = opened.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = opened.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))


@in_browser
def test_a_telephone_shows_all_of_it(show):
    opened = show(viewport={"width": 360, "height": 740})
    assert opened.evaluate("document.documentElement.scrollWidth") == 360
    names = opened.locator("//h3[text()='Files']/following-sibling::div[1]//tbody//th")
    assert names.count() > 2
    lines = "node => { const r = document.createRange(); r.selectNodeContents(node); return r.getClientRects().length }"
    assert {name.evaluate(lines) for name in names.all()} == {1}, "a name is not broken inside words"
    screenshot(opened, "report-phone")


@in_browser
def test_it_prints(show):
    opened = show(color_scheme="dark")
    assert opened.pdf().startswith(b"%PDF")
    opened.emulate_media(media="print")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    screenshot(opened, "report-print")


CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("main *, header *, footer *")]
    .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()))
    .map((node) => {
      const style = getComputedStyle(node), isMark = node instanceof SVGElement;
      const [a, b] = [light(parse(isMark ? style.fill : style.color)), light(behind(node))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), node.textContent.slice(0, 40)];
    });
}"""
"""The contrast of every piece of text with what is behind it, as WCAG counts it."""
NAMELESS = """() => [...document.querySelectorAll("svg, [tabindex], section, nav, a, summary")].filter((node) =>
  !(node.getAttribute("aria-hidden") === "true" || node.getAttribute("aria-label") || node.textContent.trim()
    || document.getElementById(node.getAttribute("aria-labelledby")))).map((node) => node.outerHTML.slice(0, 80))"""
"""What a screen reader could not call by name."""
