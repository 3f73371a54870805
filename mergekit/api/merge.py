"""Plan a merge, run a merge."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.api.merged import MergedModel
from mergekit.api.options import RunOptions
from mergekit.api.run import Hooks, check_writable, run_plan
from mergekit.errors import UsageError

if TYPE_CHECKING:
    from mergekit.downloads import Told
    from mergekit.planning.build import PlanOptions
    from mergekit.planning.plan import Plan
    from mergekit.recipe import MergeConfiguration

__all__ = ["load_methods", "log_compile", "plan", "plan_options", "run_merge"]

_LOG = logging.getLogger("mergekit")


def log_compile(forms: list[str]) -> None:
    """Tell the log which kernels are about to be compiled."""
    _LOG.warning("compiling kernels for this machine (%s)", ", ".join(forms))


def _log_download(model: str, done: int, total: int) -> None:
    """Tell the log how far a download is."""
    _LOG.info("downloading %s: %s of %s bytes", model, f"{done:,}", f"{total:,}")


def plan(
    recipe: str | Path | Mapping[str, Any] | MergeConfiguration,
    options: RunOptions | None = None,
    *,
    fetch: bool = False,
    told: Told | None = None,
) -> Plan:
    """What merging ``recipe`` would do, from headers and small files only; not a weight is read.

    ``recipe`` is a path to YAML, a mapping, or a ``MergeConfiguration``. Models on the hub are planned from their
    headers, unless ``fetch``; ``told`` hears of downloads. Raises a MergekitError for everything that can be refused.
    """
    from mergekit.planning.build import build_plan
    from mergekit.planning.models import has_remote_models
    from mergekit.recipe import load_recipe

    options = options or RunOptions()
    load_methods(options)
    checked = load_recipe(recipe)
    if fetch and has_remote_models(checked):
        plan(recipe, options, told=told)  # refuse what headers tell before anything large is downloaded
    return build_plan(checked, plan_options(options, fetch, told))


def load_methods(options: RunOptions) -> None:
    """Run the files of methods that the options name: a recipe may use what they define."""
    from mergekit.methods import load_method_file

    for path in options.method_files:
        load_method_file(path)


def plan_options(options: RunOptions, fetch: bool, told: Told | None = None) -> PlanOptions:
    """What of a run's options changes its plan. ``fetch``: weights of hub models are downloaded, ``told`` hears."""
    from mergekit.planning.build import PlanOptions

    return PlanOptions(
        shard_size=options.shard_size,
        allow_crimes=options.allow_crimes,
        unsafe_truncate_embeddings=options.unsafe_truncate_embeddings,
        copy_tokenizer=options.copy_tokenizer,
        allow_nonfinite=options.allow_nonfinite,
        seed=options.seed,
        statistics=options.statistics,
        device=options.device,
        cache_dir=options.cache_dir,
        fetch=fetch,
        told=told or ((lambda model, done, total: None) if options.quiet else _log_download),
    )


def run_merge(
    recipe: str | Path | Mapping[str, Any] | MergeConfiguration,
    out: str | Path,
    options: RunOptions | None = None,
    *,
    on_plan: Callable[[Plan], None] | None = None,
    advance: Callable[[int], None] | None = None,
    **changes: Any,
) -> MergedModel:
    """Merge ``recipe`` into the folder ``out`` and return its path, which notebooks show as a table.

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
    hooks = Hooks(on_compile=log_compile, advance=advance or (lambda nbytes: None))
    for text in (*made.warnings, *made.notes, *run_plan(made, folder, options, hooks)):
        _LOG.warning("%s", text)
    return MergedModel(folder)
