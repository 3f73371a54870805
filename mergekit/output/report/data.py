"""What a report tells, gathered from a plan and from the small files of a merged model: facts only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.checkpoint.json_text import parse_json
from mergekit.dtypes import BY_CODE
from mergekit.errors import CheckpointError
from mergekit.families.layout import AFTER, BEFORE, Layout, infer_layout
from mergekit.families.roles import role
from mergekit.moe.report import RoutingReport
from mergekit.output.card import without_paths
from mergekit.output.manifest import MANIFEST, Manifest, inputs_of_plan, manifest_of
from mergekit.output.names import ROUTING
from mergekit.output.stats import STATS, Statistics, statistics_of
from mergekit.planning.expression import Apply, Expression, leaves
from mergekit.planning.plan import OutputTensor, Plan

__all__ = ["AFTER", "BEFORE", "Input", "ReportData", "Tensor", "report_data"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the result: its place, what it is made of, with which parameters, and what the merge measured.

    ``row`` is its layer, or ``BEFORE`` or ``AFTER`` the layers. ``origins`` are the models and the layers of theirs
    that it is read from (None outside layers), ``parameters`` are by name and model (None: one value for all). Models
    are places in the report's list. ``figures`` are its record in merge_stats.json.
    """

    name: str
    row: str
    role: str
    origins: tuple[tuple[int, int | None], ...]
    parameters: Mapping[tuple[str, int | None], Any]
    figures: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Input:
    """A model or an adapter that was read: its revision on the hub if it has one, its weight files and their bytes."""

    name: str
    revision: str | None
    files: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Experts:
    """What a mixture is made of; ``gate_mode`` and ``shared`` (see ``planning.plan.Mixture``) None where not known."""

    family: str
    names: tuple[str, ...]
    per_token: int
    gate_mode: str | None = None
    shared: str | None = None


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything that a report tells, without a local path.

    ``is_done``: a merge was made, not only planned. ``has_plan``: origins and parameters are known. ``models`` are the
    names of those that were merged, ``base`` is a place among them. ``size`` is in elements, ``nbytes`` in bytes.
    ``rows`` are the layers in order. ``digests`` are those of the small files, ``checksums`` counts the tensors that
    have one. ``gaps`` say what is not known, and why.
    """

    title: str
    is_done: bool
    has_plan: bool
    version: str
    method: str
    models: tuple[str, ...]
    base: int | None
    mixture: Experts | None
    recipe_name: str
    recipe: str
    size: int
    nbytes: int | None
    dtypes: tuple[str, ...]
    rows: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    statistics: Statistics | None
    routing: RoutingReport | None
    warnings: tuple[str, ...]
    gaps: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    inputs: tuple[Input, ...]
    digests: Mapping[str, str]
    checksums: int

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names, numbered where two are the same."""
        counted = [f"{name} [{i}]" if self.models.count(name) > 1 else name for i, name in enumerate(self.models)]
        return tuple(counted)


def report_data(
    title: str, documents: Mapping[str, str], plan: Plan | None, gaps: Sequence[str] = (), *, is_done: bool = True
) -> ReportData:
    """The facts about the merge of ``plan`` whose small files are ``documents``, text by name.

    Each may be missing: a plan is reported before there are files, and a folder whose models are gone without a plan.
    CheckpointError for a document that is not one of mergekit's.
    """
    manifest = manifest_of(_json(documents, MANIFEST), MANIFEST) if MANIFEST in documents else None
    statistics = statistics_of(_json(documents, STATS), STATS) if STATS in documents else None
    routing = RoutingReport.of_json(_json(documents, ROUTING), ROUTING) if ROUTING in documents else None
    config = _json(documents, "config.json") if "config.json" in documents else {}
    shapes = _shapes(plan, manifest)
    layout = infer_layout(shapes or (statistics.tensors if statistics else ()), config)
    models = _Models(plan, statistics)
    figures = statistics.tensors if statistics else {}
    made = {output.name: output for output in plan.outputs} if plan else {}
    tensors = [_tensor(name, made.get(name), models, layout, figures.get(name)) for name in shapes or list(figures)]
    recipe_name = plan.recipe_name if plan else manifest.recipe_name if manifest else ""
    recipe = plan.recipe if plan else documents.get(recipe_name, "")
    return ReportData(
        title=title,
        is_done=is_done,
        has_plan=plan is not None,
        version=plan.version if plan else manifest.version if manifest else "",
        method=plan.method if plan else statistics.method if statistics else "",
        models=models.names,
        base=models.base,
        mixture=_mixture(plan, manifest, routing),
        recipe_name=recipe_name,
        recipe=without_paths(recipe.rstrip(), plan),
        size=min(sum(math.prod(shape) for shape in shapes.values()), 1 << 63),
        nbytes=plan.bytes_written if plan else None,
        dtypes=tuple(dict.fromkeys(_dtypes(plan, manifest))),
        rows=_rows(tensors, layout),
        tensors=tuple(tensors),
        statistics=statistics,
        routing=routing,
        warnings=tuple(without_paths(text, plan) for text in plan.warnings) if plan else (),
        gaps=tuple(gaps),
        settings=tuple(_settings(plan, manifest)),
        inputs=tuple(map(_input, manifest.inputs if manifest else inputs_of_plan(plan) if plan else ())),
        digests=dict(manifest.files) if manifest else {},
        checksums=len(manifest.tensors) if manifest else 0,
    )  # fmt: skip


class _Models:
    """The list of models of a report: those of merge_stats.json, which leaves out adapters and what a run prepares."""

    def __init__(self, plan: Plan | None, statistics: Statistics | None) -> None:
        sources = enumerate(plan.sources) if plan else ()
        kept = [(number, source) for number, source in sources if not source.prepared and not source.adapter]
        self.places = {number: place for place, (number, _) in enumerate(kept)}
        self.names = tuple(source.short for _, source in kept) if plan else statistics.models if statistics else ()
        bases = [f["models"][0] for f in statistics.tensors.values() if "change" in f] if statistics else []
        self.base = next(iter(bases), None) if plan is None or plan.base is None else self.places.get(plan.base)


def _mixture(plan: Plan | None, manifest: Manifest | None, routing: RoutingReport | None) -> Experts | None:
    """The experts of a mixture, if the merge is one and somebody knows them."""
    if plan and plan.mixture:
        made = plan.mixture
        names = tuple(plan.sources[position].short for position in made.experts)
        return Experts(made.family, names, made.per_token, made.gate_mode, made.shared)
    if manifest and manifest.mixture and routing:
        return Experts(manifest.mixture, routing.experts, routing.experts_per_token)
    return None


def _json(documents: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        record = parse_json(documents[name].encode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{name}: not valid JSON ({error!s:.120}); make the model again") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{name}: expected a JSON object; make the model again")
    return record


def _shapes(plan: Plan | None, manifest: Manifest | None) -> dict[str, tuple[int, ...]]:
    if plan:
        return {output.name: output.shape for output in plan.outputs}
    return {name: record.shape for name, record in manifest.tensors.items()} if manifest else {}


def _dtypes(plan: Plan | None, manifest: Manifest | None) -> Iterator[str]:
    if plan:
        yield from (output.dtype.name for output in plan.outputs if output.dtype.is_float)
    elif manifest:
        found = (BY_CODE.get(record.dtype) for record in manifest.tensors.values())
        yield from (dtype.name for dtype in found if dtype and dtype.is_float)


def _tensor(
    name: str, output: OutputTensor | None, models: _Models, layout: Layout, figures: Mapping[str, Any] | None
) -> Tensor:
    expression = output.expression if output else None
    origins = _origins(expression, models, layout.place(name).stack or "") if expression else ()
    parameters = dict(_parameters(expression)) if isinstance(expression, Apply) else {}
    return Tensor(name, layout.row(name), role(name), origins, parameters, figures)


def _rows(tensors: Iterable[Tensor], layout: Layout) -> tuple[str, ...]:
    """The rows that have a tensor, in order."""
    present = {tensor.row for tensor in tensors}
    return tuple(row for row in layout.rows if row in present)


def _origins(expression: Expression, models: _Models, stack: str) -> tuple[tuple[int, int | None], ...]:
    """The models that an expression reads, and which of their layers."""
    found: dict[tuple[int, int | None], None] = {}
    for read in leaves(expression):
        if read.source in models.places:
            number = read.info.name.removeprefix(stack).partition(".")[0]
            is_layer = bool(stack) and read.info.name.startswith(stack) and number.isdecimal()
            found[models.places[read.source], int(number) if is_layer else None] = None
    return tuple(found)


def _parameters(expression: Apply) -> Iterator[tuple[tuple[str, int | None], Any]]:
    """The parameters of a merged tensor, taken apart where each model has its own value."""
    for name, value in expression.settings.items():
        if name.startswith("_"):
            continue
        if isinstance(value, tuple):
            owners = expression.models[len(expression.models) - len(value) :]
            yield from (((name, model), each) for model, each in zip(owners, value, strict=True))
        else:
            yield (name, None), value


def _settings(plan: Plan | None, manifest: Manifest | None) -> Iterator[tuple[str, str]]:
    """What else decided the result, by name."""
    if plan:
        yield from (("seed", str(plan.seed)), ("device", plan.device), ("rounding", plan.rounding))
    elif manifest:
        yield from (("seed", str(manifest.seed)), ("device", manifest.device))
    if manifest:
        yield from ((name.replace("_", " "), _told(value)) for name, value in manifest.options.items())
        yield "SHA-256 of the recipe", manifest.recipe
    elif plan:
        yield "digest of the plan", plan.digest()


def _told(value: Any) -> str:
    """An option's value: on or off, or a number of bytes."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _input(entry: Mapping[str, Any]) -> Input:
    revision, files = entry.get("revision"), entry.get("files")
    rows = [row for row in files if isinstance(row, list) and len(row) > 1] if isinstance(files, list) else []
    sizes = [row[1] for row in rows if isinstance(row[1], int) and 0 <= row[1] < 1 << 63]
    name = without_paths(str(entry.get("model", "?")), None)
    return Input(name, revision if isinstance(revision, str) else None, len(rows), sum(sizes))
