"""``mergekit explain``: which value each parameter takes for which tensor, and from which line of the recipe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit.cli.boundary import plain
from mergekit.cli.help import MergeCommand
from mergekit.cli.plan import report
from mergekit.cli.show import table
from mergekit.options import add_merge_options

if TYPE_CHECKING:
    from mergekit.planning.explain import Explanation, Setting


@click.command(
    "explain", cls=MergeCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.argument("config_file", type=click.Path())
@click.option("--tensor", metavar="NAME", help="Only tensors of this name, or with this in their names.")
@click.option("--json", "as_json", is_flag=True, help="Print everything, tensor by tensor, as JSON.")
@add_merge_options
def explain(config_file: str, tensor: str | None, as_json: bool, merge_options: Any) -> None:
    """Print which value each parameter of the recipe CONFIG_FILE takes for which tensor, and where it comes from."""
    from mergekit.api.explain import explain as explain_recipe
    from mergekit.api.explain import matching

    found = explain_recipe(config_file, merge_options.run_options())
    names = None if tensor is None else matching(found, tensor)
    if as_json:
        click.echo(json.dumps(record(found, names), indent=1))
        return
    lines = all_lines(found) if names is None else [line for name in names for line in (*tensor_lines(found, name), "")]
    click.echo("\n".join(plain(line) for line in lines).rstrip())
    if names is not None and len(names) == 1:
        click.echo("\n".join(plain(line) for line in _quoted(config_file, found.of(names[0]))))
    report(found.plan, notes=())


def all_lines(found: Explanation) -> list[str]:
    """All tensors, those with the same origins together, with the range of their values.

    Options of all methods of task vectors are left out where nobody sets them.
    """
    from mergekit.families.layout import numbers_out
    from mergekit.methods.spec import DELTA_OPTIONS
    from mergekit.planning.describe import span_text

    options = {p.name for p in DELTA_OPTIONS}
    by_tensor: dict[str, list[Setting]] = {}
    for setting in found.settings:
        if setting.place is not None or setting.parameter not in options:
            by_tensor.setdefault(setting.tensor, []).append(setting)
    groups: dict[Any, dict[str, list[Setting]]] = {}
    for name, settings in by_tensor.items():
        groups.setdefault(tuple((s.parameter, s.model, s.place) for s in settings), {})[name] = settings
    lines = [f"[{number}] {source.reference}" for number, source in enumerate(found.plan.sources)]
    for members in groups.values():
        counts = Counter(map(numbers_out, members))
        lines += [
            "",
            *(f"{template}{f' ({count} tensors)' if count > 1 else ''}" for template, count in counts.items()),
        ]
        rows = [
            _row(alike[0], span_text([setting.value for setting in alike]), len(members) > 1)
            for alike in zip(*members.values(), strict=True)
        ]
        lines += [f"  {line}" for line in table(["parameter", "of", "value", "from"], rows, numbers=0)]
    lines += ["", *(f"{place}: no tensor takes its '{name}' from here" for place, name in found.unused)]
    return lines if found.unused else lines[:-1]


def tensor_lines(found: Explanation, name: str) -> list[str]:
    """One tensor: what it is made of, and where each value comes from."""
    from mergekit.planning.describe import action_of
    from mergekit.planning.expression import leaves

    output = next(output for output in found.plan.outputs if output.name == name)
    lines = [f"{name}  {list(output.shape)} {output.dtype}: {action_of(output.expression)}"]
    rows = [
        [f"[{read.source}] {found.plan.sources[read.source].reference}", read.info.name, str(read.info), read.info.file]
        for read in leaves(output.expression)
    ]
    lines += [f"  {line}" for line in table(["made of", "tensor", "type", "file"], rows, numbers=0)]
    settings = [_row(s, _value(s.value), False) for s in found.of(name)]
    if settings:
        lines += [f"  {line}" for line in table(["parameter", "of", "value", "from"], settings, numbers=0)]
    return lines


def _row(setting: Setting, value: str, many: bool) -> list[str]:
    how = setting.how.rpartition(" at depth")[0] if many and " at depth" in setting.how else setting.how
    origin = "default" if setting.place is None else f"{setting.place}{f'  {how}' if how else ''}"
    return [setting.parameter, "" if setting.model is None else f"[{setting.model}]", value, origin]


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quoted(path: str, settings: Sequence[Setting]) -> list[str]:
    """The lines of the recipe that the settings come from."""
    numbers = sorted({int(s.place.rsplit(":", 2)[1]) for s in settings if s.place is not None})
    try:
        text = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:  # the other of recipe.yml and recipe.yaml
        return []
    return ["", *(f"{number:5} | {text[number - 1]}" for number in numbers if number <= len(text))]


def record(found: Explanation, names: Sequence[str] | None) -> dict[str, Any]:
    """An explanation as plain data for JSON."""
    sources = found.plan.sources
    wanted = None if names is None else set(names)
    tensors: dict[str, list[dict[str, Any]]] = {}
    for s in found.settings:
        if wanted is None or s.tensor in wanted:
            model = None if s.model is None else sources[s.model].reference
            entry = {"parameter": s.parameter, "model": model, "value": s.value, "from": s.place, "how": s.how}
            tensors.setdefault(s.tensor, []).append(entry)
    return {"tensors": tensors, "unused": [{"from": place, "parameter": name} for place, name in found.unused]}
