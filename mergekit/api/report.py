"""Reports on merges that were made, and on plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit.api.options import RunOptions
from mergekit.api.pages import check_page, write_page
from mergekit.api.reproduce import plan_of_folder
from mergekit.api.run import title_of
from mergekit.errors import MergekitError, ModelNotFoundError, RunError, UsageError

if TYPE_CHECKING:
    from mergekit.output.manifest import Manifest
    from mergekit.planning.plan import Plan

__all__ = ["report_model", "report_plan"]


def report_model(folder: Path, options: RunOptions | None = None, out: Path | None = None) -> Path:
    """Write the report of the merged model in ``folder`` to ``out`` (default: merge_report.html in it); its path.

    It is made from the small files there. What the recipe decides for each tensor comes from planning it again, from
    the headers of the models; where they are gone or changed, the report says so and goes without. Of ``options`` those
    that don't change a result are used. UsageError if nothing there tells of a merge, CheckpointError for damage.
    """
    from mergekit.output.manifest import MANIFEST, read_manifest
    from mergekit.output.report import REPORT, ROUTING, check_drawable, page, report_data
    from mergekit.output.stats import STATS

    check_drawable()
    if not folder.is_dir():
        raise ModelNotFoundError(f"no folder '{folder}'; give the folder of a merged model")
    manifest = read_manifest(folder)
    if manifest is None and not (folder / STATS).is_file():
        raise UsageError(f"{folder} has neither {MANIFEST} nor {STATS}, which a report is made from; merge it again")
    path = out or folder / REPORT
    check_page(path)
    names = [STATS, MANIFEST, ROUTING, "config.json", *([manifest.recipe_name] if manifest else [])]
    documents = {name: _text(folder / name) for name in names if (folder / name).is_file()}
    plan, gaps = _plan(folder, manifest, options or RunOptions())
    write_page(path, page(report_data(title_of(folder), documents, plan, gaps)))
    return path


def report_plan(plan: Plan, out: Path, title: str) -> Path:
    """Write the report of a plan, made before anything is merged, to the file ``out``; its path."""
    from mergekit.output.report import check_drawable, page, report_data

    check_drawable()
    write_page(out, page(report_data(title, {"config.json": plan.config} if plan.config else {}, plan, is_done=False)))
    return out


def _plan(folder: Path, manifest: Manifest | None, options: RunOptions) -> tuple[Plan | None, list[str]]:
    """The plan of a model if it can be made again, else why not."""
    if manifest is None:
        return None, ["There is no merge_manifest.json here, so parameters and provenance are not known."]
    try:
        plan, faults = plan_of_folder(folder, manifest, options)
    except MergekitError as error:
        plan, faults = None, [str(error)]
    if faults:
        from mergekit.output.card import without_paths

        return None, [
            f"The recipe could not be planned again, so parameters and the origins of layers are not known: "
            f"{without_paths(fault, None)}." for fault in faults[:1]
        ]  # fmt: skip
    return plan, []


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RunError(f"cannot read {path}: {reason}; make the model again") from None
