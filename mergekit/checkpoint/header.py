"""The header of a safetensors file: read it with suspicion, write it with offsets known in advance.

Layout: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes. The JSON maps each tensor
name to its dtype code, shape and [begin, end) offsets into the bytes after the header; ``__metadata__`` is optional.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit.checkpoint.json_text import parse_json
from mergekit.dtypes import BY_CODE, DType
from mergekit.errors import CONTROL, CheckpointError

__all__ = ["MAX_HEADER", "TensorInfo", "build_header", "parse_header", "read_header"]

MAX_HEADER = 100 * 1024 * 1024
"""Bytes of JSON that we are willing to parse; the safetensors library has the same limit."""

_BITS = {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
"""Types that exist in the wild but that we can only recognise and refuse."""
_PICKLE = "pytorch_model.bin"
_DAMAGED = "the file is damaged or hostile, download it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor stands: ``file`` inside its checkpoint's folder, absolute byte ``offset``, ``nbytes``.

    ``offset`` is -1 for tensors of pickled shards, which have to be opened by torch.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        """``[11008, 4096] bfloat16``, for messages."""
        return f"{list(self.shape)} {self.dtype}"


def read_header(path: Path) -> tuple[dict[str, TensorInfo], str]:
    """The tensors of the safetensors file ``path``, and a digest of its header; CheckpointError if anything is off."""
    from hashlib import blake2b

    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = header_length(start, size, path)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if len(raw) != length:
        raise CheckpointError(f"{path}: truncated header; download the file again")
    return parse_header(raw, size, path), blake2b(raw, digest_size=8).hexdigest()


def header_length(start: bytes, size: int, path: Path | str) -> int:
    """The length of the JSON announced by the first 8 bytes of a file of ``size`` bytes."""
    if len(start) < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file; download it again")
    (length,) = struct.unpack("<Q", start)
    if length <= min(MAX_HEADER, size - 8):
        return int(length)
    # What stands there instead of a length tells what the file is.
    if start == b"version ":
        raise CheckpointError(f"{path}: this is a git-lfs pointer, not the weights; run `git lfs pull`")
    if start.lstrip()[:1] in (b"<", b"{"):
        raise CheckpointError(f"{path}: this is a web page or a server's answer, not the weights; download it again")
    if start.startswith((b"PK", b"\x80")):
        raise CheckpointError(f"{path}: this is a pickle under the name of a safetensors file; call it {_PICKLE}")
    raise CheckpointError(
        f"{path}: the header claims {length} bytes in a file of {size}; "
        f"the file is truncated or not safetensors, download it again"
    )


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name '{name}' occurs twice")
    return record


def parse_header(raw: bytes, size: int, path: Path | str) -> dict[str, TensorInfo]:
    """Check the header JSON ``raw`` of a file of ``size`` bytes in full; names in the order of their offsets."""
    try:
        record = parse_json(raw, _no_duplicates)
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not valid ({error!s:.120}); download the file again") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; download the file again")
    record.pop("__metadata__", None)
    data = 8 + len(raw)
    name = getattr(path, "name", str(path))
    infos = [_entry(key, value, data, size, str(name), path) for key, value in record.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    position = data
    for info in infos:
        if info.offset != position:
            word = "overlaps the tensor before it" if info.offset < position else "is preceded by a hole"
            raise CheckpointError(f"{path}: tensor '{info.name}' {word}; {_DAMAGED}")
        position += info.nbytes
    if position != size:
        raise CheckpointError(
            f"{path}: the tensors end at byte {position} but the file has {size}; "
            f"{'it is truncated' if position > size else 'it holds bytes that no tensor owns'}, download it again"
        )
    return {info.name: info for info in infos}


def _entry(name: str, value: object, data: int, size: int, file: str, path: Path | str) -> TensorInfo:
    def fault(text: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r:.200} {text}")

    if CONTROL.search(name):
        raise fault(f"has a name with control characters; {_DAMAGED}")
    if not isinstance(value, Mapping):
        raise fault(f"has no description; {_DAMAGED}")
    code, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(code, str) or (code not in BY_CODE and code not in _BITS):
        raise fault(f"has the unknown dtype {code!r:.80}; update mergekit, or download the file again")
    if code in _BITS:
        raise fault(f"has the packed dtype {code}, which can't be merged; use a bfloat16 or float16 version")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2:  # type: ignore[arg-type]
        raise fault(f"has a malformed shape or offsets; {_DAMAGED}")
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    dtype = BY_CODE[code]
    nbytes = math.prod(shape) * dtype.size
    begin, end = offsets
    if end < begin or data + end > size:
        raise fault(
            f"claims bytes {begin} to {end} of {max(size - data, 0)}; "
            f"the file is truncated or hostile, download it again"
        )
    if end - begin != nbytes:
        raise fault(f"has {end - begin} bytes but {shape!s:.80} {dtype} needs {nbytes}; {_DAMAGED}")
    return TensorInfo(name, dtype, tuple(shape), file, data + begin, nbytes)


def _whole(values: object) -> bool:
    return isinstance(values, list) and len(values) <= 64 and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def build_header(tensors: Iterable[tuple[str, DType, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """The header of a file that holds ``tensors`` in this order, and each one's absolute byte offset.

    The JSON is padded with spaces so that the first tensor starts at a multiple of 64 bytes.
    """
    record: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, position = [], 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * dtype.size
        begins.append(position)
        record[name] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, [start + begin for begin in begins]
