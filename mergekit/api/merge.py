"""The public functions: plan a merge, run a merge."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.errors import DiskSpaceError, InputChangedError, UsageError

if TYPE_CHECKING:
    from mergekit.planning import Plan
    from mergekit.recipe import MergeConfiguration

__all__ = ["RunOptions", "check_writable", "memory", "plan", "run_merge", "run_plan"]


_LOG = logging.getLogger("mergekit")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What changes a run, and never the meaning of a recipe.

    ``shard_size`` in bytes (0: one file); ``threads`` None means one for each processor; ``device`` is ``cpu`` or a
    torch device; ``seed`` overrides the recipe's.
    """

    shard_size: int = 5_000_000_000
    threads: int | None = None
    device: str = "cpu"
    seed: int | None = None
    copy_tokenizer: bool = True
    write_model_card: bool = True
    overwrite: bool = False
    restart: bool = False
    allow_crimes: bool = False
    allow_nonfinite: bool = False
    unsafe_truncate_embeddings: bool = False
    cache_dir: Path | None = None
    quiet: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that can't be meant."""
        for name, least in (("shard_size", 0), ("threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or not least <= value < 1 << 63):
                raise UsageError(f"{name}={value!r}: expected a whole number of at least {least}")


def _log_compile(forms: list[str]) -> None:
    _LOG.warning("compiling kernels for this machine (%s)", ", ".join(forms))


def plan(
    recipe: str | Path | Mapping[str, Any] | MergeConfiguration,
    options: RunOptions | None = None,
    *,
    fetch: bool = False,
) -> Plan:
    """What merging ``recipe`` would do, from headers and small files only; not a weight is read.

    ``recipe`` is a path to YAML, a mapping, or a ``MergeConfiguration``. Models on the hub are planned from their
    headers, unless ``fetch``. Raises a MergekitError for everything that can be refused.
    """
    from mergekit.planning import PlanOptions, build_plan, has_remote_models
    from mergekit.recipe import load_recipe

    options = options or RunOptions()
    checked = load_recipe(recipe)
    if fetch and has_remote_models(checked):
        plan(recipe, options)  # refuse what headers tell before anything large is downloaded
    return build_plan(
        checked,
        PlanOptions(
            shard_size=options.shard_size,
            allow_crimes=options.allow_crimes,
            unsafe_truncate_embeddings=options.unsafe_truncate_embeddings,
            copy_tokenizer=options.copy_tokenizer,
            allow_nonfinite=options.allow_nonfinite,
            seed=options.seed,
            device=options.device,
            cache_dir=options.cache_dir,
            fetch=fetch,
            quiet=options.quiet,
        ),
    )


def run_merge(
    recipe: str | Path | Mapping[str, Any] | MergeConfiguration,
    out: str | Path,
    options: RunOptions | None = None,
    *,
    on_plan: Callable[[Plan], None] | None = None,
    advance: Callable[[int], None] | None = None,
    **changes: Any,
) -> Path:
    """Merge ``recipe`` into the folder ``out`` and return its path.

    ``changes`` are fields of RunOptions: ``run_merge("r.yml", "out", threads=4)``. ``on_plan`` sees the plan before
    anything is written; ``advance`` is told of finished bytes. Warnings and notes go to the logger ``mergekit``.
    A run that was interrupted continues where it stopped when called again. Raises a MergekitError, and leaves
    nothing that looks like a model, if the merge can't be done.
    """
    options = replace(options or RunOptions(), **changes)
    if not str(out):
        raise UsageError("the output folder has no name")
    folder = Path(out)
    check_writable(folder, options)
    made = plan(recipe, options, fetch=True)
    if on_plan:
        on_plan(made)
    for text in (
        *made.warnings,
        *made.notes,
        *run_plan(made, folder, options, on_compile=_log_compile, advance=advance),
    ):
        _LOG.warning("%s", text)
    return folder


def run_plan(
    plan: Plan,
    folder: Path,
    options: RunOptions | None = None,
    *,
    on_compile: Callable[[list[str]], None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Execute ``plan`` into ``folder``; returns remarks made on the way.

    ``on_compile`` is told which kernels are about to be compiled, on a machine that has not run them yet.
    """
    from mergekit.execute import run_threads
    from mergekit.output import Staging

    options = options or RunOptions()
    _check_places(plan, folder)
    _check_space(plan, folder)
    documents = _documents(plan, folder, options)
    _check_targets(folder, [*(shard.name for shard in plan.shards), *(name for name, _ in documents)])
    kernels = _kernels(plan, on_compile)
    with Staging(folder, plan, overwrite=options.overwrite, restart=options.restart) as staging:
        remaining = staging.remaining()
        if advance:
            advance(sum(output.nbytes for output in plan.outputs) - sum(output.nbytes for output in remaining))
        run_threads(
            plan,
            staging,
            outputs=remaining,
            kernels=kernels,
            threads=options.threads if plan.device == "cpu" else 1,
            advance=advance or (lambda nbytes: None),
        )
        _check_inputs(plan)
        staging.publish(documents)
        return staging.notes


def memory(plan: Plan, options: RunOptions | None = None) -> int:
    """About how many bytes of memory a run needs at its peak: the interpreter and libraries, and the buffers."""
    from mergekit.execute import buffer_bytes, default_threads

    libraries = 150_000_000 if plan.device == "cpu" and not any(s.pickled for s in plan.sources) else 450_000_000
    return libraries + buffer_bytes(plan, (options or RunOptions()).threads or default_threads())


def _kernels(plan: Plan, on_compile: Callable[[list[str]], None] | None) -> Any:
    """The back end for the plan's device, compiled."""
    if plan.device != "cpu":
        from mergekit.kernels.accelerator import TorchKernels

        return TorchKernels(plan.device)
    from mergekit.kernels import cpu
    from mergekit.kernels.warmup import cold_forms, warm_up
    from mergekit.methods import get_method
    from mergekit.methods.spec import Sparse

    form = "sparse" if isinstance(get_method(plan.method).form, Sparse) else "span"
    cold = cold_forms(dict.fromkeys(["span", form]))
    if cold:
        if on_compile:
            on_compile(cold)
        warm_up(cold)
    return cpu


def _documents(plan: Plan, folder: Path, options: RunOptions) -> list[tuple[str, str | Path]]:
    """The small files in the order of publishing: the index first, config.json last."""
    from mergekit.output import model_card

    documents: list[tuple[str, str | Path]] = []
    if plan.index:
        documents.append(("model.safetensors.index.json", plan.index))
    documents += [(name, Path(plan.sources[source].folder) / name) for source, name in plan.files]
    if options.write_model_card:
        documents.append(("README.md", model_card(plan, folder.resolve().name)))
        documents.append(("mergekit_config.yml", plan.recipe.rstrip() + "\n"))
    if plan.config:
        documents.append(("config.json", plan.config))
    return documents


def check_writable(folder: Path, options: RunOptions) -> None:
    """Refuse an output folder that holds a model already, before anything is opened or downloaded."""
    from mergekit.output import STAGING, holds_weights, was_publishing

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder for the output")
    present = holds_weights(folder)
    if present and not options.overwrite and not was_publishing(folder / STAGING / "journal"):
        raise UsageError(f"{folder} already holds weights ({present[0]}); choose another folder, or pass --overwrite")


def _check_places(plan: Plan, folder: Path) -> None:
    for source in plan.sources:
        if folder.exists() and Path(source.folder).exists() and folder.samefile(source.folder):
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
    from mergekit.output import STAGING

    place = folder
    while not place.exists():
        place = place.parent
    staged = sum(p.stat().st_blocks * 512 for p in (folder / STAGING).glob("*.safetensors"))
    free = shutil.disk_usage(place).free + staged
    if plan.bytes_written > free:
        raise DiskSpaceError(
            f"the output needs {plan.bytes_written:,} bytes, but {place} has {free:,} free; "
            f"free some space or choose another disk"
        )
