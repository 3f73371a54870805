"""Merge again what a folder says it was made from, and compare: nothing is written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit.api.limits import admit
from mergekit.api.merge import plan as plan_merge
from mergekit.api.options import RunOptions
from mergekit.api.run import kernels_for, weighted
from mergekit.api.verify import Checksums, Verification
from mergekit.errors import CheckpointError, ModelNotFoundError, UsageError, some_of
from mergekit.refs import no_folder
from mergekit.version import __version__

if TYPE_CHECKING:
    from mergekit.api.moe import MoeOptions
    from mergekit.output.manifest import Manifest
    from mergekit.planning.plan import Plan

__all__ = ["plan_of_folder", "reproduce_model"]


def reproduce_model(
    folder: Path,
    options: RunOptions | None = None,
    *,
    trust_remote_code: bool = False,
    stage: Callable[[str], None] = lambda text: None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> Verification:
    """Run the recipe in ``folder`` again and compare with its merge_manifest.json, tensor by tensor.

    The models are looked for where the recipe says, from the current folder. Of ``options`` those that don't change the
    result are used (threads, cache_dir, method_files). ``faults`` is empty if every tensor and every small file comes
    out the same. UsageError if the folder does not hold what is needed.
    """
    from mergekit.output.manifest import read_manifest

    if not folder.is_dir():
        raise ModelNotFoundError(no_folder(str(folder), "give the folder of a merged model"))
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(
            f"{folder} has no merge_manifest.json (--no-write-model-card leaves it out), so there is nothing to "
            f"compare with"
        )
    recipe = _recipe(folder, manifest)
    options = _options(manifest, options or RunOptions())
    result = Verification()
    if manifest.version != __version__:
        result.lines.append(f"it was made by mergekit {manifest.version}, this is {__version__}")
    with tempfile.TemporaryDirectory(prefix="mergekit-reproduce-") as temporary:
        plan, prepare = _plan(recipe, manifest, options, trust_remote_code, stage)
        on_plan(plan)
        result.faults += _differences(plan, manifest)
        if not result.faults:
            prepare(Path(temporary))
            _compare(plan, manifest, Path(temporary), options, advance, result)
    return result


def plan_of_folder(folder: Path, manifest: Manifest, options: RunOptions) -> tuple[Plan, list[str]]:
    """The plan that the recipe in ``folder`` gives now, from headers only, and why it is not the one that was run.

    MergekitError if there is none any more: models that are gone, a recipe that changed.
    """
    recipe, options = _recipe(folder, manifest), _options(manifest, options)
    if manifest.mixture is None:
        plan = plan_merge(recipe, options)
    else:
        from mergekit.api.moe import plan_moe

        plan = plan_moe(recipe, options, _choices(manifest.mixture)).plan
    return plan, _differences(plan, manifest)


def _recipe(folder: Path, manifest: Manifest) -> Path:
    from mergekit.output.manifest import sha256

    path = folder / manifest.recipe_name
    if not path.is_file():
        raise UsageError(f"{folder} has no {manifest.recipe_name}, the recipe that it was made from; put it back")
    if sha256(path) != manifest.recipe:
        raise UsageError(f"{path} is not the recipe that the model was made from: it changed since")
    return path


def _options(manifest: Manifest, options: RunOptions) -> RunOptions:
    """``options`` with what a run of the manifest had, of those that change the result."""
    names = options.lasting()
    given = {name: value for name, value in manifest.options.items() if name in names}
    if any(type(value) is not type(names[name]) for name, value in given.items()):
        raise CheckpointError("the options in merge_manifest.json are not those of a merge")
    return replace(options, **given, seed=manifest.seed, device=manifest.device, statistics=False)


def _plan(
    recipe: Path, manifest: Manifest, options: RunOptions, trusted: bool, stage: Callable[[str], None]
) -> tuple[Plan, Callable[[Path], object]]:
    """The plan, and what has to be made in a folder before it can run."""
    if manifest.mixture is None:
        return plan_merge(recipe, options, fetch=True), lambda folder: None
    from mergekit.api.moe import plan_moe, prepare_moe
    from mergekit.api.run import Hooks

    choices = _choices(manifest.mixture, trusted)
    made = plan_moe(recipe, options, choices, fetch=True)
    return made.plan, lambda folder: prepare_moe(made, folder, options, choices, Hooks(stage=stage))


def _choices(family: str, trusted: bool = False) -> MoeOptions:
    from mergekit.api.moe import MoeOptions

    return MoeOptions(architecture=family, allow_all_same=True, trust_remote_code=trusted)


def _differences(plan: Plan, manifest: Manifest) -> list[str]:
    """Why the result can't be the same, told before anything is computed."""
    from mergekit.output.manifest import TensorRecord, inputs_of_plan

    mine, theirs = inputs_of_plan(plan), list(manifest.inputs)
    if len(mine) != len(theirs):
        return [f"the recipe names {len(mine)} models here, {len(theirs)} then"]
    faults = []
    for now, then in zip(mine, theirs, strict=True):
        if now["files"] != then.get("files"):
            revisions = [entry.get("revision") for entry in (then, now)]
            where = f": revision {revisions[0]} then, {revisions[1]} now" if all(revisions) else ""
            faults.append(f"{now['model']} has other weight files than it had{where}")
    planned = {o.name: TensorRecord.of(o, 0) for o in plan.outputs}
    other = [name for name in planned if name not in manifest.tensors]
    other += [n for n, record in manifest.tensors.items() if n not in planned or planned[n].place != record.place]
    if other and not faults:
        faults.append(f"{len(other)} tensors would be other ones, or lie elsewhere, first {other[0]}")
    return faults


def _compare(
    plan: Plan,
    manifest: Manifest,
    folder: Path,
    options: RunOptions,
    advance: Callable[[int], None],
    result: Verification,
) -> None:
    from mergekit.execute import run_threads

    options = admit(plan, options)
    sink, kernels = Checksums(), kernels_for(plan, None)
    ready = weighted(plan.with_prepared(folder), folder, kernels, options)
    threads = options.threads if plan.device == "cpu" else 1
    run_threads(ready, sink, kernels=kernels, threads=threads, advance=advance)
    other = [name for name, value in sink.found.items() if f"{value:016x}" != manifest.tensors[name].checksum]
    result.faults += _told(other, len(sink.found), "tensors")
    documents = _documents(plan)
    other = [name for name, digest in documents.items() if manifest.files.get(name) != digest]
    result.faults += _told(other, len(documents), "small files")
    if not result.faults:
        result.lines.append(f"all {len(sink.found):,} tensors and {len(documents)} small files come out the same")


def _documents(plan: Plan) -> Mapping[str, str]:
    """The SHA-256 of the small files that the plan alone decides."""
    from mergekit.output.manifest import sha256

    texts = {"config.json": plan.config, "model.safetensors.index.json": plan.index, **dict(plan.texts)}
    copies = {name: Path(plan.sources[source].folder) / name for source, name in plan.files}
    return {name: sha256(content) for name, content in {**copies, **texts}.items() if content}


def _told(names: Sequence[str], count: int, what: str) -> list[str]:
    return [f"{len(names):,} of {count:,} {what} come out different: {some_of(names)}"] if names else []
