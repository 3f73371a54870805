"""Follow a plan into an output folder: checks, staging, threads, publishing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.api.limits import admit
from mergekit.api.options import RunOptions
from mergekit.errors import DiskSpaceError, InputChangedError, UsageError

if TYPE_CHECKING:
    from mergekit.output.card_parts import Command
    from mergekit.planning.plan import Plan

__all__ = [
    "Document",
    "Hooks",
    "check_writable",
    "command_of",
    "kernels_for",
    "ready_kernels",
    "run_plan",
    "slow_part",
    "title_of",
    "weighted",
]


Document = tuple[str, str | Path]
"""A small file of the output: its name, and its text or the file to copy."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a run does beyond its plan, and whom it tells.

    ``prepare`` gets the staging folder and makes the plan's prepared sources there. ``measure`` gets it once all
    tensors are written, and returns more documents; ``card`` makes README.md of its title and of the summary of the
    statistics (None without). ``on_compile`` is told which kernels are about to be compiled, ``stage`` what is done
    besides the tensors where that takes long, ``advance`` of finished bytes and ``opened`` of each tensor that is
    begun: these two by any thread.
    """

    prepare: Callable[[Path], None] | None = None
    measure: Callable[[Path], list[Document]] | None = None
    card: Callable[[str, Mapping[str, Any] | None], str] | None = None
    on_compile: Callable[[list[str]], None] | None = None
    advance: Callable[[int], None] = lambda nbytes: None
    opened: Callable[[str], None] = lambda name: None
    stage: Callable[[str], None] = lambda text: None


def run_plan(plan: Plan, folder: Path, options: RunOptions | None = None, hooks: Hooks | None = None) -> list[str]:
    """Execute ``plan`` into ``folder``; returns remarks made on the way."""
    from mergekit.execute import run_threads
    from mergekit.output.check import vocabulary_faults
    from mergekit.output.manifest import MANIFEST, manifest_text
    from mergekit.output.report import REPORT, page, report_data
    from mergekit.output.staging import Staging
    from mergekit.output.stats import STATS, lost_to_rounding, stats_text

    options, hooks = admit(plan, options or RunOptions()), hooks or Hooks()
    _check_places(plan, folder)
    _check_space(plan, folder)
    _check_targets(folder, [*(shard.name for shard in plan.shards), *_document_names(plan, options), MANIFEST, REPORT])
    kernels = kernels_for(plan, hooks.on_compile)
    with Staging(folder, plan, overwrite=options.overwrite, restart=options.restart) as staging:
        if staging.is_complete:
            hooks.advance(sum(output.nbytes for output in plan.outputs))
            return [*staging.notes, f"{folder} was complete already; what an interrupted run had left there is removed"]
        remaining = staging.remaining()
        if hooks.prepare:
            hooks.prepare(staging.folder)
        hooks.advance(sum(output.nbytes for output in plan.outputs) - sum(output.nbytes for output in remaining))
        ready = weighted(plan.with_prepared(staging.folder), staging.folder, kernels, options, hooks.stage)
        left = {output.name for output in remaining}
        run_threads(
            ready,
            staging,
            outputs=[output for output in ready.outputs if output.name in left],
            kernels=kernels,
            threads=options.threads if plan.device == "cpu" else 1,
            advance=hooks.advance,
            opened=hooks.opened,
        )
        staging.settle()
        _check_inputs(plan)
        more = hooks.measure(staging.folder) if hooks.measure else []
        if plan.statistics and staging.figures:
            more = [(STATS, stats_text(plan, staging.figures)), *more]
        documents = [*more, *_documents(plan, folder, options, hooks, dict(more).get(STATS))]
        if options.write_model_card and plan.config:
            manifest = manifest_text(plan, staging.checksums, options.lasting(), documents)
            documents.insert(-1, (MANIFEST, manifest))  # config.json stays last
        if options.report:
            texts = {name: content for name, content in documents if isinstance(content, str)}
            documents.insert(-1, (REPORT, page(report_data(title_of(folder), texts, plan))))
        staging.publish(documents)
        shapes = {output.name: output.shape for output in plan.outputs}
        faults = [f"check: {fault}" for fault in vocabulary_faults(folder, shapes)]
        return [*faults, *lost_to_rounding(plan, staging.figures), *staging.notes]


def weighted(
    plan: Plan,
    staging: Path,
    kernels: Any,
    options: RunOptions,
    stage: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The plan with its automatic weights; they are computed once and kept in the folder ``staging``."""
    from mergekit.execute import default_threads, is_weighted, model_factors, with_weights

    if not is_weighted(plan):
        return plan
    path = staging / "factors.json"
    if not path.is_file():
        stage("measuring the models, for their weights")
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(model_factors(plan, kernels, options.threads or default_threads())))
        partial.replace(path)
    found = json.loads(path.read_text())
    return with_weights(plan, {kind: {int(m): f for m, f in by_model.items()} for kind, by_model in found.items()})


def slow_part(plan: Plan) -> str | None:
    """A sentence about the time that functions of whole tensors take, if it is more than a minute."""
    from mergekit.execute import estimated_seconds

    seconds = estimated_seconds(plan)
    if seconds < 60:
        return None
    time = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
    return f"'{plan.method}' decomposes whole matrices: about {time} on two processors"


def kernels_for(plan: Plan, on_compile: Callable[[list[str]], None] | None) -> Any:
    """The back end for the plan's device, compiled."""
    if plan.device != "cpu":
        from mergekit.kernels.accelerator import TorchKernels

        return TorchKernels(plan.device)
    from mergekit.execute import forms

    return ready_kernels(forms(plan), on_compile)


def ready_kernels(forms: Sequence[str], on_compile: Callable[[list[str]], None] | None) -> Any:
    """The CPU's back end, with the families ``forms`` of its kernels compiled."""
    from mergekit.kernels import cpu
    from mergekit.kernels.warmup import cold_forms, warm_up

    cold = cold_forms(forms)
    if cold:
        if on_compile:
            on_compile(cold)
        warm_up(cold)
    return cpu


def _documents(
    plan: Plan, folder: Path, options: RunOptions, hooks: Hooks, statistics: str | Path | None
) -> list[Document]:
    """The small files in the order of publishing: the index first, config.json last."""
    from mergekit.output.card import model_card
    from mergekit.output.manifest import recipe_text

    title = title_of(folder)
    contents: dict[str, str | Path] = {
        "model.safetensors.index.json": plan.index or "",
        "README.md": "",
        plan.recipe_name: recipe_text(plan),
        "config.json": plan.config,
        **{name: Path(plan.sources[source].folder) / name for source, name in plan.files},
        **dict(plan.texts),
    }
    names = _document_names(plan, options)
    if "README.md" in names:
        summary = json.loads(statistics)["summary"] if isinstance(statistics, str) else None
        contents["README.md"] = (
            hooks.card(title, summary) if hooks.card else model_card(plan, title, summary, command_of(options))
        )
    return [(name, contents[name]) for name in names]


def command_of(
    options: RunOptions, program: str = "mergekit merge", more: Sequence[str] = (), *, trusted: bool = False
) -> Command:
    """What to type for a run with these options and ``more``. ``trusted``: a tokenizer's own code may run."""
    from mergekit.options import shaping_options
    from mergekit.output.card_parts import Command

    trust = ["--trust-remote-code"] if trusted else []
    code = shaping_options(RunOptions(method_files=options.method_files))
    return Command(program, [*shaping_options(options), *more, *trust], [*code, *trust])


def title_of(folder: Path) -> str:
    """What a model is called by its folder."""
    return os.fsencode(folder.resolve().name).decode("utf-8", "replace")  # a name may be any bytes


def _document_names(plan: Plan, options: RunOptions) -> list[str]:
    """The names of the small files of an output that don't depend on its tensors, in the order of publishing."""
    names = ["model.safetensors.index.json"] if plan.index else []
    names += [name for _, name in plan.files] + [name for name, _ in plan.texts]
    names += ["README.md", plan.recipe_name] if options.write_model_card else []
    return [*names, *(["config.json"] if plan.config else [])]


def check_writable(folder: Path, options: RunOptions) -> None:
    """Refuse an output folder that holds a model already, before anything is opened or downloaded.

    And a report where its charts can't be drawn.
    """
    from mergekit.output.journal import publishing
    from mergekit.output.staging import STAGING, refuse_replacing

    if options.report:
        from mergekit.output.report import check_drawable

        check_drawable()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder for the output")
    if publishing(folder / STAGING / "journal") == "no":
        with suppress(OSError):
            (folder / STAGING).rmdir()  # if it is empty: a run was killed at its very end
        refuse_replacing(folder, overwrite=options.overwrite)


def _check_places(plan: Plan, folder: Path) -> None:
    for source in plan.sources:
        if not source.prepared and folder.exists() and Path(source.folder).exists() and folder.samefile(source.folder):
            raise UsageError(f"{folder} is also an input ({source.reference}); choose another folder for the output")


def _check_targets(folder: Path, names: list[str]) -> None:
    """Refuse an output folder where something that is no file stands in the way of a file."""
    for name in names:
        if (folder / name).is_dir():
            raise UsageError(f"{folder / name} is a folder, and a file of that name has to be written; move it away")


def _check_inputs(plan: Plan) -> None:
    """Refuse to publish if a weight file is not the one that was planned with."""
    for source in plan.sources:
        for file in source.files:
            path = Path(source.folder) / file.name
            status = path.stat() if path.exists() else None
            if status is None or (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
                raise InputChangedError(f"{path} changed while it was being merged; run the command again")


def _check_space(plan: Plan, folder: Path) -> None:
    """Refuse an output that would not fit, before starting. What a resumed run has reserved already counts as free."""
    from mergekit.output.staging import STAGING

    place = folder
    while not place.exists():
        place = place.parent
    staged = sum(p.stat().st_blocks * 512 for p in (folder / STAGING).glob("*.safetensors"))
    free = shutil.disk_usage(place).free + staged
    needed = plan.bytes_written + plan.prepared_bytes
    if needed > free:
        raise DiskSpaceError(
            f"the output needs {needed:,} bytes, but {place} has {free:,} free; free some space or choose another disk"
        )
