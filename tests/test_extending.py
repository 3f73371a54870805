"""Methods of others: files, packages, the old decorator, faults in their code; and the page that explains it all."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import List, Optional  # noqa: UP035  # what old methods import

import numpy as np
import pytest
import torch

import mergekit
from command import assert_refused
from command import mergekit as command
from mergekit.errors import MergekitError, ResumeError, UsageError
from mergekit.merge_methods.easy_define import merge_method
from mergekit.methods import (
    Elementwise,
    Span,
    Sparse,
    SparseMerge,
    TopMagnitude,
    Whole,
    get_method,
    load_method_file,
    method,
    registry,
)
from mergekit.methods.describe import default, form, inputs, owners
from mergekit.methods.spec import REGISTRY
from models import family, read_model

ROOT = Path(mergekit.__file__).parent.parent
PAGE = ROOT / "docs" / "extending.md"
MINE = ROOT / "examples" / "extending" / "my_methods.py"
MINIMAL = """
import numpy as np
from mergekit.methods import Span, method
@method("only_first", form=Span("weights"), base="ignored", params=[])
def only_first(gram):
    return np.array([{first}, 0.0])
"""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """Methods that a test registers are gone after it."""
    before, files = dict(REGISTRY), dict(registry._FILES)
    registry._load_packages.cache_clear()
    yield
    REGISTRY.clear()
    REGISTRY.update(before)
    registry._FILES.clear()
    registry._FILES.update(files)
    registry._load_packages.cache_clear()


def recipe(tmp_path: Path, name: str, folders: list[Path], **more: object) -> Path:
    lines = [f"merge_method: {name}", "models:", *(f"  - model: {f}" for f in folders)]
    path = tmp_path / "recipe.yml"
    path.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in more.items())]) + "\n")
    return path


# The page


def test_the_code_of_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "extending.md", "exec", dont_inherit=True), namespace)
    assert {"equal_voices", "loudest", "clipped_mean", "low_rank_mean", "middle"} <= set(REGISTRY)
    assert len(blocks) >= 7


def test_the_methods_of_the_page_are_those_of_the_example():
    text = MINE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    pieces = [b[re.search(r"^(def|@method)", b, re.M).start() :] for b in blocks if "@method(" in b]
    assert len(pieces) == 4
    for piece in pieces:
        assert piece.strip() in text


def test_the_docstrings_of_the_examples_are_true():
    import doctest

    for path in (MINE, ROOT / "examples/extending/mergekit-extra/mergekit_extra.py"):
        registry.load_method_file(path)
        module = sys.modules[next(m for m in sys.modules if getattr(sys.modules[m], "__file__", None) == str(path))]
        assert doctest.testmod(module).failed == 0


def test_the_fault_that_the_page_shows(tmp_path):
    folders = family(tmp_path, 4, shapes={"model.norm.weight": (7,)})
    path = tmp_path / "short.py"
    path.write_text(MINE.read_text().replace("lengths, 1)\n", "lengths, 1)[:2]\n"))
    written = recipe(tmp_path, "equal_voices", folders, base_model=folders[0])
    result = command("merge", written, tmp_path / "out", "--method-file", path)
    assert_refused(result, 2)
    shown = re.search(r"```text\n(.*?)\n```", PAGE.read_text(), re.S)[1]
    assert result.err.splitlines()[-1] == shown


# Files and packages


def test_a_method_of_a_file_gives_the_same_bytes_as_in_memory(tmp_path):
    folders = family(tmp_path, 3)
    for name in ("equal_voices", "loudest", "clipped_mean", "low_rank_mean"):
        written = recipe(tmp_path, name, folders[1:], base_model=folders[0])
        got = read_model(mergekit.run_merge(written, tmp_path / name, method_files=[MINE]))
        states = [{k: v.astype(np.float32) for k, v in read_model(f).items()} for f in folders]
        want = mergekit.merge_state_dicts(states, name, base=0)
        assert all(np.array_equal(got[k], want[k]) for k in want), name


def test_every_command_takes_a_method_file(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(MINIMAL.format(first=1.0))
    folders = family(tmp_path, 2)
    written = recipe(tmp_path, "only_first", folders)
    assert_refused(command("plan", written), 2, "no merge method 'only_first'")
    assert command("plan", written, "--method-file", path).code == 0
    assert command("merge", written, tmp_path / "out", "--method-file", path, "--dry-run").code == 0
    assert "only_first" in command("methods", "--method-file", path).out
    assert command("methods", "only_first", "--method-file", path).out.startswith("only_first: only_first\n")


def test_a_mixture_takes_a_method_file(tmp_path, tiny):
    path = tmp_path / "m.py"
    path.write_text(MINIMAL.format(first=1.0).replace("0.0]", "0.0][:2]"))
    base, other = tiny("llama", seed=1), tiny("llama", seed=2)
    written = tmp_path / "moe.yml"
    written.write_text(
        f"base_model: {base}\ngate_mode: random\nattention:\n  merge_method: only_first\n"
        f"experts:\n  - source_model: {base}\n  - source_model: {other}\n"
    )
    assert_refused(command("moe", written, tmp_path / "out", "--dry-run"), 2, "no merge method 'only_first'")
    result = command("moe", written, tmp_path / "out", "--dry-run", "--method-file", path)
    assert result.code == 0, result.err


FAULTS = {
    "missing": (None, ["there is no file"]),
    "syntax": ("def f(:\n", ["line 1 is no Python"]),
    "raises": ("raise ValueError('two\\nlines')\n", ["ValueError: two lines"]),
    "exits": ("import sys\nsys.exit(3)\n", ["SystemExit: 3"]),
    "nothing": ("x = 1\n", ["registers no merge method", "@method"]),
    "built in": (MINIMAL.format(first=1.0).replace('"only_first"', '"ties"'), ["'ties' is registered already"]),
    "arguments": (MINIMAL.format(first=1.0).replace("(gram)", "(gram, *, t)"), ["'only_first'", "'t'"]),
    "declaration": (MINIMAL.format(first=1.0).replace("params=[]", "parms=[]"), ["TypeError", "parms"]),
    "import": ("import nothing_of_this_name\n", ["ModuleNotFoundError"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_used(tmp_path, fault):
    text, phrases = FAULTS[fault]
    path = tmp_path / "m.py"
    if text is not None:
        path.write_text(text)
    before = dict(REGISTRY)
    assert_refused(command("methods", "--method-file", path), 2, "m.py", *phrases)
    assert before == REGISTRY
    with pytest.raises(UsageError):
        mergekit.plan({"merge_method": "linear", "models": []}, mergekit.RunOptions(method_files=(path,)))


def test_what_a_failing_file_registered_first_is_gone(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(MINIMAL.format(first=1.0) + "\nraise KeyError('x')\n")
    with pytest.raises(UsageError, match="KeyError"):
        registry.load_method_file(path)
    assert "only_first" not in REGISTRY
    path.write_text(MINIMAL.format(first=1.0))
    registry.load_method_file(path)
    assert "only_first" in REGISTRY


def test_a_file_is_run_once_and_again_when_it_changed(tmp_path, monkeypatch):
    path = tmp_path / "m.py"
    path.write_text(MINIMAL.format(first=1.0))
    registry.load_method_file(path)
    first = get_method("only_first")
    monkeypatch.chdir(tmp_path)
    registry.load_method_file("m.py")
    assert get_method("only_first") is first
    path.write_text(MINIMAL.format(first=2.0))
    registry.load_method_file(path)
    assert get_method("only_first").function(None).tolist() == [2, 0]


def test_two_files_with_one_name(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(MINIMAL.format(first=1.0))
    result = command("methods", "--method-file", tmp_path / "a.py", "--method-file", tmp_path / "b.py")
    assert_refused(result, 2, "b.py", "'only_first' is registered already")


def test_the_code_of_a_method_is_part_of_the_plan(tmp_path):
    path = tmp_path / "m.py"
    options = mergekit.RunOptions(method_files=(path,))
    written = recipe(tmp_path, "only_first", family(tmp_path, 2))
    path.write_text(MINIMAL.format(first=0.5))
    before = mergekit.plan(written, options).digest()
    assert mergekit.plan(written, options).digest() == before
    path.write_text(MINIMAL.format(first=0.5) + "# changed\n")
    assert mergekit.plan(written, options).digest() != before


def test_a_run_that_another_code_began_is_not_continued(tmp_path):
    path = tmp_path / "m.py"
    written = recipe(tmp_path, "only_first", family(tmp_path, 2))
    path.write_text(MINIMAL.format(first=0.5))

    def interrupt(nbytes: int) -> None:
        if nbytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mergekit.run_merge(written, tmp_path / "out", method_files=[path], advance=interrupt)
    path.write_text(MINIMAL.format(first=0.25))
    with pytest.raises(ResumeError):
        mergekit.run_merge(written, tmp_path / "out", method_files=[path])


def install(folder: Path, module: str, text: str) -> None:
    """A package with an entry point, as an installer leaves it."""
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[mergekit.methods]\nx = {module}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def test_a_package_offers_methods(site):
    source = ROOT / "examples/extending/mergekit-extra"
    assert (
        '[project.entry-points."mergekit.methods"]\nextra = "mergekit_extra"' in (source / "pyproject.toml").read_text()
    )
    install(site, "mergekit_extra", (source / "mergekit_extra.py").read_text())
    assert "extrapolate" not in REGISTRY
    merged = mergekit.merge_tensors([np.zeros(2), np.ones(2)], "extrapolate", {"factor": 1.5}, base_index=0)
    assert merged.tolist() == [1.5, 1.5]
    assert "extrapolate" in command("methods").out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 / 0\n", "ZeroDivisionError"),
        (MINIMAL.format(first=1.0) + MINIMAL.format(first=1.0).replace("only_first", "ties"), "'ties' is registered"),
        ("import sys\nsys.exit()\n", "SystemExit"),
    ],
)
def test_a_package_that_fails_is_told_of_and_left_out(site, caplog, text, reason):
    install(site, "broken_extra", text)
    assert "only_first" not in command("methods").out
    assert "broken_extra" in caplog.text
    assert reason in caplog.text
    assert "only_first" not in REGISTRY


# Faults of a method's own code


def declared(form: object, function: object, **more: object) -> None:
    method("faulty", form=form, base="required", params=[], **more)(function)


def _exits(*_, **__):
    raise SystemExit(0)


def _raises(*args: object) -> object:
    raise LookupError("on\npurpose")


WRONG = {
    "span raises": (Span("deltas"), _raises, "LookupError: on purpose"),
    "span text": (Span("deltas"), lambda g: "x", "coefficients of shape [2], not str"),
    "span count": (Span("deltas", gram=True), lambda g: [1.0], "coefficients of shape [2], not list of shape [1]"),
    "span number": (Span("deltas", gram=True), lambda g: 1.0, "not float"),
    "sparse none": (Sparse(), lambda: None, "a SparseMerge of 2 rules and weights, not NoneType"),
    "sparse count": (
        Sparse(),
        lambda: SparseMerge((), (), False, False, "none", 1.0),
        "of 2 rules and weights, not one of 0 rules and 0 weights",
    ),
    "chunk shape": (Elementwise(), lambda xp, x: x[0][1:], "an array of real numbers of shape"),
    "chunk number": (Elementwise(), lambda xp, x: 0.0, "not float"),
    "measure": (Elementwise(measure=lambda xp, x: 1.0), lambda xp, x, s: x[0], "its 'measure' must return an array"),
    "measure raises": (Elementwise(measure=_raises), lambda xp, x, s: x[0], "its 'measure' failed: LookupError"),
    "key": (
        Elementwise(key=lambda xp, x: None, keep=lambda nonzero, size: 1),
        lambda xp, x: x[0],
        "its 'key' must return an array of real numbers of shape",
    ),
    "keep": (
        Elementwise(key=lambda xp, x: abs(x[0]), keep=lambda nonzero, size: "all"),
        lambda xp, x: x[0],
        "its 'keep' must return a number of elements, or None, not str",
    ),
    "whole shape": (Whole(), lambda x: x[0].sum(), "a tensor of numbers of shape [5], not Tensor of shape []"),
    "whole type": (Whole(), lambda x: x[0] > 0, "a tensor of numbers"),
    "whole array": (Whole(), lambda x: x[0].numpy(), "a tensor of numbers of shape [5], not ndarray of shape [5]"),
    "whole raises": (Whole(), _raises, "LookupError: on purpose"),
    "whole exits": (Whole(), _exits, "its function failed: SystemExit: 0"),
    "whole empties": (Whole(), lambda x: x.pop() if not x.clear() else None, "its function failed: IndexError"),
    "whole meta": (Whole(), lambda x: x[0].to("meta"), "a tensor of numbers"),
    "whole time": (Whole(seconds=_raises), lambda x: x[0], "its 'seconds' failed: LookupError"),
    "vectors": (Span("deltas", vectors=lambda: "diagonal"), lambda g: [1.0, 1.0], "one of tensor, rows, columns"),
    "chunk complex": (Elementwise(), lambda xp, x: x[0] * 1j, "an array of real numbers"),
    "measure text": (Elementwise(measure=lambda xp, x: np.array(["a"])), lambda xp, x, s: x[0], "an array of sums"),
    "sparse rule": (
        Sparse(),
        lambda: SparseMerge((TopMagnitude(float("nan")),) * 2, (1.0, 1.0), False, False, "none", 1.0),
        "a SparseMerge of known rules, finite numbers",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_faults_of_a_methods_code_are_one_line(tmp_path, wrong):
    form_, function, phrase = WRONG[wrong]
    declared(form_, function)
    folders = family(tmp_path, 3, shapes={"norm": (5,)})
    written = recipe(tmp_path, "faulty", folders[1:], base_model=folders[0])
    result = command("merge", written, tmp_path / "out")
    assert_refused(result, 2, "method 'faulty' on tensor ", phrase)
    if wrong == "whole time":  # nobody waits for a merge in memory
        return
    with pytest.raises(UsageError, match="method 'faulty'"):
        mergekit.merge_tensors([np.zeros(5, np.float32)] * 3, "faulty", base_index=0)


CONTRADICTIONS = {
    "space": ("form=Span('nothing'), params=[]", "'nothing' is not a space"),
    "key": ("form=Elementwise(key=abs), params=[]", "'key' and 'keep' go together"),
    "workspace": ("form=Whole(workspace='big'), params=[]", "'workspace' is a number, not 'big'"),
    "option": ("form=Whole(), params=[once('svc', Real(), 1.0, help='')]", "the name of parameter 'svc' is taken"),
    "default": ("form=Whole(), params=[once('a', Real(0, 1), 7.0, help='')]", "the default of 'a': 7 is outside"),
}


@pytest.mark.parametrize("wrong", CONTRADICTIONS)
def test_declarations_that_contradict_themselves_are_refused(tmp_path, wrong):
    declaration, phrase = CONTRADICTIONS[wrong]
    names = "Elementwise, Real, Span, Whole, method, once"
    text = (
        f"from mergekit.methods import {names}\n@method('odd', base='required', {declaration})\ndef odd(*a, **k): ..."
    )
    (tmp_path / "odd.py").write_text(text)
    with pytest.raises(UsageError, match=phrase):
        load_method_file(tmp_path / "odd.py")
    assert "odd" not in REGISTRY


def test_built_in_methods_are_not_wrapped():
    from mergekit.methods.guard import guarded

    assert guarded(get_method("ties"), "t", 2) is get_method("ties")


# The old decorator


def test_the_old_decorator_without_a_base():
    @merge_method(name="old", pretty_name="Old", reference_url="https://example.org")
    def old(
        tensors: List[torch.Tensor],  # noqa: UP006
        weight: List[float],  # noqa: UP006
        count: List[int] = 2,  # noqa: UP006
        shift: float = 0.5,
        steps: int = 1,
        flip: bool = False,
    ) -> torch.Tensor:
        """Documented."""
        assert isinstance(weight, list)
        assert isinstance(steps, int)
        total = sum(w * c * t for w, c, t in zip(weight, count, tensors, strict=True)) + shift * steps
        return -total if flip else total

    found = get_method("old")
    assert (found.title, found.url, found.summary) == ("Old", "https://example.org", "Documented.")
    assert old(tensors=[torch.ones(1)], weight=[2.0], count=[1]).item() == 2.5  # the plain function
    x = [torch.tensor([1.0]), torch.tensor([10.0])]
    assert mergekit.merge_tensors(x, "old", {"weight": [1, 2]}).tolist() == [42.5]
    # A base is one of the tensors, and the first.
    assert mergekit.merge_tensors(x, "old", {"weight": [1, 2]}, base_index=1).tolist() == [42.5]
    weights = {"weight": {0: 1, 1: 2}, "count": 1, "flip": True, "steps": 2}
    assert mergekit.merge_tensors(x, "old", weights, base_index=1).tolist() == [-22.0]
    with pytest.raises(TypeError, match="needs 'weight'"):
        mergekit.merge_tensors(x, "old")


def test_the_old_decorator_with_a_base():
    @merge_method(name="based")
    def based(tensors: list[torch.Tensor], base_tensor: torch.Tensor, weight: list[float] = 1.0) -> torch.Tensor:
        return base_tensor + sum(w * (t - base_tensor) for w, t in zip(weight, tensors, strict=True))

    @merge_method(name="maybe")
    def maybe(tensors: list[torch.Tensor], base_tensor: Optional[torch.Tensor] = None) -> torch.Tensor:  # noqa: UP045
        return sum(tensors) - (0 if base_tensor is None else base_tensor)

    @merge_method(name="maybe_new")
    def maybe_new(tensors: list[torch.Tensor], base_tensor: torch.Tensor | None) -> torch.Tensor:
        return sum(tensors) * (1 if base_tensor is None else 100)

    x = [torch.tensor([1.0]), torch.tensor([10.0]), torch.tensor([100.0])]
    assert mergekit.merge_tensors(x, "based", {"weight": [2, 0]}, base_index=1).tolist() == [-8.0]
    with pytest.raises(ValueError, match="base_index"):
        mergekit.merge_tensors(x, "based")
    assert mergekit.merge_tensors(x, "maybe").tolist() == [111.0]
    assert mergekit.merge_tensors(x, "maybe", base_index=2).tolist() == [-89.0]
    assert mergekit.merge_tensors(x, "maybe_new", base_index=0).tolist() == [11000.0]
    assert mergekit.merge_tensors(x[:1], "maybe_new").tolist() == [1.0]


def test_an_old_method_in_a_merge_of_files(tmp_path):
    path = tmp_path / "old.py"
    path.write_text(
        "from __future__ import annotations\nfrom typing import List, Optional\nimport torch\n"
        "from mergekit.merge_methods.easy_define import merge_method\n"
        "@merge_method(name='old_file')\n"
        "def f(tensors: List[torch.Tensor], base_tensor: Optional[torch.Tensor], weight: List[float]) -> "
        "torch.Tensor:\n"
        "    return base_tensor + sum(w * (t - base_tensor) for w, t in zip(weight, tensors))\n"
    )
    folders = family(tmp_path, 3)
    models = [{"model": str(f), "parameters": {"weight": 0.5}} for f in folders[1:]]
    text = {"merge_method": "old_file", "base_model": str(folders[0]), "models": models}
    got = read_model(mergekit.run_merge(text, tmp_path / "out", method_files=[path]))
    text["merge_method"] = "task_arithmetic"
    want = read_model(mergekit.run_merge(text, tmp_path / "out2"))
    assert all(np.allclose(got[k], want[k], atol=1e-6) for k in want)
    shown = command("methods", "old_file", "--method-file", path).out
    assert "weight" in shown
    assert "_others" not in shown


T = torch.Tensor


def _signature(**annotations: object) -> object:
    import inspect

    def function(*args: object, **kwargs: object) -> None:
        """Never called."""

    defaults = annotations.pop("defaults", {})
    function.__annotations__ = annotations
    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=defaults.get(name, inspect.Parameter.empty)
        )
        for name in annotations
        if name != "return"
    ]
    function.__signature__ = inspect.Signature(parameters)
    return function


class TensorGroup:
    """Stands for the class of arcee mergekit 0.1.5."""


@pytest.mark.parametrize(
    ("function", "phrase"),
    [
        (_signature(), "'tensors: list"),
        (_signature(x=list[T]), "'tensors: list"),
        (_signature(tensors=T), "'tensors: list"),
        (_signature(tensors=list[float]), "'tensors: list"),
        (_signature(group=TensorGroup), "0.1.5"),
        (_signature(batch="TensorBatch"), "0.1.5"),
        (_signature(tensors=list[T], output_weight=object), "'output_weight'"),
        (_signature(tensors=list[T], base_model=object), "'base_model'"),
        (_signature(tensors=list[T], base_tensor=float), "'base_tensor'"),
        (_signature(tensors=list[T], t=str), "'t' must be annotated"),
        (_signature(tensors=list[T], t=list[str]), "'t' must be annotated"),
        (_signature(tensors=list[T], w=list[float], defaults={"w": [1.0]}), "one number"),
        (_signature(tensors=list[T], t="Unknown"), "can't be read"),
        (_signature(**{"tensors": list[T], "return": float}), "must return"),
    ],
)
def test_the_old_decorator_refuses(function, phrase):
    with pytest.raises(TypeError, match=re.escape(phrase)):
        merge_method(name="refused")(function)
    assert "refused" not in REGISTRY


def test_the_old_decorator_refuses_a_name_that_is_taken():
    with pytest.raises(MergekitError, match="registered already"):
        merge_method(name="ties")(_signature(tensors=list[T]))


def test_names_under_merge_methods():
    from mergekit import merge_methods

    assert merge_methods.get("ties") is get_method("ties")
    assert merge_methods.registered_methods()[0] == "linear"
    for name in merge_methods.__all__:
        assert getattr(merge_methods, name) is not None


# What is shown


def test_every_method_is_explained():
    for name in list(REGISTRY):
        result = command("methods", name)
        found = get_method(name)
        assert result.code == 0
        assert result.err == ""
        assert inputs(found) in result.out
        assert form(found) in result.out
        for parameter in found.params:
            assert re.search(rf"^  {parameter.name}  ", result.out, re.M), parameter.name
            if parameter.used:
                assert f"{parameter.kind}; {owners(parameter)}; " in result.out
                assert default(parameter) in result.out
