"""Check a model folder: its files against each other, its tensors against the manifest of the merge that wrote them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit.api.loading import first_line, load_model, silent_transformers
from mergekit.errors import RunError, some_of

if TYPE_CHECKING:
    from mergekit.checkpoint import Checkpoint
    from mergekit.output.manifest import Manifest
    from mergekit.planning.plan import OutputTensor, Plan

__all__ = ["Checksums", "Verification", "verify_model"]


@dataclass(slots=True)
class Verification:
    """What was found. ``faults`` is empty for a sound model; ``lines`` say what was looked at."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Checksums:
    """A sink that keeps nothing but the checksums of tensors, and which of them hold NaN or infinity."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.nonfinite: list[str] = []
        self._lock = threading.Lock()

    def write(self, output: OutputTensor, start: int, data: np.ndarray) -> None:
        """Nothing is written."""

    def finish(self, output: OutputTensor, checksum: int, figures: Mapping[str, Any] | None) -> None:
        """Keep a checksum."""
        with self._lock:
            self.found[output.name] = checksum

    def note(self, tensor: str, text: str) -> None:
        """Keep its name: what is noted while copying is that a tensor is not finite."""
        with self._lock:
            self.nonfinite.append(tensor)


def verify_model(
    folder: Path,
    *,
    load: bool = False,
    sha256: bool = False,
    trust_remote_code: bool = False,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> Verification:
    """Check the model in ``folder``; every byte of its weights is read (again for ``sha256`` and ``load``).

    Headers, sizes and index agree, all values are finite, config.json and the tokenizer fit the embeddings, and what
    merge_manifest.json says is so. ``load``: transformers loads it and it continues a text (``trust_remote_code``: also
    by the code that lies in the folder). ``sha256``: a line with the SHA-256 of each file. ModelNotFoundError if there
    is no model, CheckpointError if one can't be read at all.
    """
    from mergekit.checkpoint import open_checkpoint
    from mergekit.output.manifest import read_manifest
    from mergekit.output.staging import STAGING, holds_weights

    result = Verification()
    checkpoint = open_checkpoint(folder)
    manifest = read_manifest(folder)
    if (folder / STAGING).exists():
        result.faults.append(f"{STAGING} holds the work of a merge that did not end; run its command again")
    _check_tensors(checkpoint, manifest, result, threads, advance)
    _check_config(checkpoint, result)
    known = {file.name for file in checkpoint.files}
    stray = [name for name in holds_weights(folder) if not name.endswith(".index.json") and name not in known]
    if stray:
        result.faults.append(f"weights that are no part of it, which other programs may load instead: {some_of(stray)}")
    if manifest is not None:
        _check_files(folder, manifest, result)
    if sha256:
        result.lines += _digests(folder)
    if load:
        _check_loading(folder, checkpoint, result, trust_remote_code)
    return result


def _check_tensors(
    checkpoint: Checkpoint,
    manifest: Manifest | None,
    result: Verification,
    threads: int | None,
    advance: Callable[[int], None],
) -> None:
    from mergekit.execute import run_threads
    from mergekit.output.manifest import MANIFEST, TensorRecord

    sink, plan = Checksums(), _reading(checkpoint)
    run_threads(plan, sink, threads=threads, advance=advance)
    result.lines.append(
        f"{len(plan.outputs):,} tensors, {checkpoint.nbytes():,} bytes in {len(checkpoint.files)} files: headers, "
        f"sizes and index agree"
    )
    bad = sorted(sink.nonfinite)
    if bad:
        result.faults.append(f"{len(bad)} tensors hold NaN or infinity: {some_of(bad)}")
    else:
        result.lines.append("all values are finite")
    if manifest is None:
        result.lines.append(
            f"no {MANIFEST} (--no-write-model-card leaves it out, as others do): there are no checksums to compare"
        )
        return
    found = {output.name: TensorRecord.of(output, sink.found[output.name]) for output in plan.outputs}
    wanted = manifest.tensors
    faults = {
        "are missing": [name for name in wanted if name not in found],
        "were not written by the merge": [name for name in found if name not in wanted],
        "are in another file, type or shape than was written": [
            name for name in wanted if name in found and found[name].place != wanted[name].place
        ],
        "changed since they were written": [
            name for name in wanted if name in found and found[name].checksum != wanted[name].checksum
        ],
    }
    result.faults += [f"{len(names):,} tensors {what}: {some_of(names)}" for what, names in faults.items() if names]
    if not any(faults.values()):
        result.lines.append(f"every tensor has the checksum of {MANIFEST}, taken when it was written")


def _reading(checkpoint: Checkpoint) -> Plan:
    """A plan that copies every tensor of a checkpoint to where it is."""
    from mergekit.planning.expression import Read
    from mergekit.planning.plan import OutputTensor, Plan, Source

    name = str(checkpoint.folder)
    source = Source(name, checkpoint.folder.name, name, checkpoint.files, checkpoint.pickled)
    outputs = tuple(
        OutputTensor(i.name, i.shape, i.dtype, i.file, max(i.offset, 0), i.nbytes, Read(0, i))
        for i in checkpoint.tensors.values()
    )
    return Plan(
        version="", method="passthrough", seed=0, sources=(source,), base=None, donor=0, outputs=outputs, shards=(),
        config="", index=None, files=(), left_out=(), warnings=(), notes=(), recipe="",
    )  # fmt: skip


def _check_config(checkpoint: Checkpoint, result: Verification) -> None:
    """config.json and the tokenizer against the tensors."""
    from mergekit.families.config import layer_count
    from mergekit.families.layout import infer_layout
    from mergekit.output.check import vocabulary_faults

    if not checkpoint.config:
        result.faults.append("config.json is missing or empty, so no program can load this model")
        return
    faults = vocabulary_faults(checkpoint.folder, {name: i.shape for name, i in checkpoint.tensors.items()})
    said = layer_count(checkpoint.config)
    if said is not None and infer_layout(checkpoint.tensors, checkpoint.config).main is None:
        faults.append(f"config.json says {said} layers, but no stack of layers in the weights has as many")
    # Some families mean it so: rows for images, layers that share their weights. Loading would tell.
    result.lines += [f"note: {fault}" for fault in faults]
    if not faults:
        result.lines.append("config.json and the tokenizer fit the weights")


def _check_files(folder: Path, manifest: Manifest, result: Verification) -> None:
    """The small files against the manifest."""
    from mergekit.output.manifest import sha256

    missing = [name for name in manifest.files if not (folder / name).is_file()]
    changed = [n for n, digest in manifest.files.items() if n not in missing and sha256(folder / n) != digest]
    for names, what in ((missing, "are missing"), (changed, "changed since the merge")):
        if names:
            result.faults.append(f"{len(names)} files {what}: {some_of(names)}")
    if not missing and not changed:
        result.lines.append(f"{len(manifest.files)} small files are as they were written")


def _digests(folder: Path) -> list[str]:
    from mergekit.output.manifest import sha256

    return [f"{sha256(path)}  {path.name}" for path in sorted(folder.iterdir()) if path.is_file()]


def _check_loading(folder: Path, checkpoint: Checkpoint, result: Verification, trusted: bool) -> None:
    import torch
    import transformers

    with silent_transformers(), torch.no_grad():
        try:
            model, amiss = load_model(folder, torch.float32, trusted=trusted)
            if amiss:
                result.faults.append(f"transformers {transformers.__version__} finds fault with it: {amiss}")
            prompt = torch.arange(8).reshape(1, 8) % model.config.get_text_config().vocab_size
            more = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        except RunError as error:
            result.faults.append(str(error))
            return
        except Exception as error:  # transformers raises whatever its parts do
            result.faults.append(f"it loads, but can't generate ({first_line(error)})")
            return
    result.lines.append(
        f"transformers {transformers.__version__} loads it as {type(model).__name__}, and it generates: token ids "
        f"{more[0, 8:].tolist()}"
    )
