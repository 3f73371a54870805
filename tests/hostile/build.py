"""Hostile inputs that are too large, or too odd, to be committed. Each is written by a function; none is ever run."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from lora_files import settings

__all__ = ["BUILT"]

_MERGE = b"merge_method: linear\nmodels:\n- model: x\n- model: b\nparameters: {weight: 1}\n"
_DIGITS = b"9" * 5000
"""More than Python turns into a number."""


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _header(text: bytes, data: bytes = b"") -> Callable[[Path], object]:
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _sparse(size: int, start: bytes = b"") -> Callable[[Path], object]:
    """A file that claims to be large and takes no room."""

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            stream.write(start)
            stream.truncate(size)

    return write


def _repeated(start: bytes, unit: bytes, count: int, end: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(start + unit * count + end)


def _long_header(unit: bytes, count: int) -> Callable[[Path], object]:
    """A header of ``count`` times ``unit`` in its metadata, and one sound tensor."""

    def write(path: Path) -> None:
        text = b'{"__metadata__":[' + unit * count + b'0],"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        _header(text, bytes(8))(path)

    return write


def _many_tensors(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    _header(json.dumps({f"t{i}": entry for i in range(3000)}).encode())(path)


def _bomb(record: str, size: int) -> Callable[[Path], object]:
    """A zip archive of a few kB with a record of ``size`` bytes of zeros."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/version", b"3\n")
            with archive.open(record, "w", force_zip64=True) as stream:
                for _ in range(size >> 20):
                    stream.write(bytes(1 << 20))

    return write


def _overlapping_bomb(path: Path) -> None:
    """A zip archive whose directory lists one stored record a thousand times (David Fifield 2019, without deflate)."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(1 << 20))
        entry = archive.infolist()[-1]
        for number in range(1, 1000):
            twin = zipfile.ZipInfo(f"archive/data/{number}")
            for name in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(twin, name, getattr(entry, name))
            archive.filelist.append(twin)


def _link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def _adapter(**changes: object) -> Callable[[Path], object]:
    return _bytes(json.dumps(settings(**changes)).encode())


def _deep_tuples(path: Path) -> None:
    path.write_bytes(b"\x80\x02N" + b"\x85" * 100_000 + b".")


BUILT: dict[str, Callable[[Path], object]] = {
    "header/built-deep-lists": _header(b"[" * 90_000),
    "header/built-deep-objects": _header(b'{"a":' * 90_000),
    "header/built-digits": _header(b'{"w":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % _DIGITS, bytes(8)),
    "header/built-sparse-terabyte": _sparse(1 << 40, struct.pack("<Q", 1 << 39)),
    "header/built-sparse-100-MB": _sparse(110 << 20, struct.pack("<Q", 100 << 20)),
    "header/built-many-tensors": _many_tensors,
    "header/built-metadata-of-lists": _long_header(b"[],", 12 << 20),
    "header/built-link-to-zero": _link("/dev/zero"),
    "header/built-link-to-itself": _link("model.safetensors"),
    "header/built-link-to-secret": _link("/etc/passwd"),
    "header/built-pipe": os.mkfifo,
    "header/built-folder": Path.mkdir,
    "index/built-deep": _bytes(b"[" * 200_000),
    "index/built-digits": _bytes(b'{"weight_map": %s}' % _DIGITS),
    "index/built-link-to-secret": _link("/etc/passwd"),
    "index/built-link-to-zero": _link("/dev/zero"),
    "index/built-many": _repeated(b'{"weight_map":{', b'"a":"s1.safetensors",', 100_000, b'"a":"s1.safetensors"}}'),
    "index/built-sparse": _sparse(300 << 20),
    "pickle/built-bomb-in-data": _bomb("archive/data.pkl", 300 << 20),
    "pickle/built-bomb-in-storage": _bomb("archive/data/0", 300 << 20),
    "pickle/built-overlapping-records": _overlapping_bomb,
    "pickle/built-deep-tuples": _deep_tuples,
    "pickle/built-sparse-terabyte": _sparse(1 << 40, b"\x80\x02"),
    "pickle/built-text-of-100-MB-claimed": _bytes(b"\x80\x02X" + struct.pack("<I", 1 << 31) + bytes(1000)),
    "recipe/built-digits": _bytes(_MERGE + b"seed: " + _DIGITS + b"\n"),
    "recipe/built-float-digits": _bytes(_MERGE + b"dtype: 1." + _DIGITS + b"\n"),
    "recipe/built-deep-flow": _bytes(b"a: " + b"[" * 200_000),
    "recipe/built-deep-map": _bytes(b"{a: " * 100_000),
    "recipe/built-deep-block": _bytes("".join(" " * i + "a:\n" for i in range(2000)).encode()),
    "recipe/built-large": _repeated(_MERGE + b"# ", b"x", 5_000_000, b"\n"),
    "recipe/built-many-entries": _repeated(b"a: [", b"1,", 1_000_000, b"1]"),
    "recipe/built-key-of-1-MB": _repeated(_MERGE + b'? "', b"k", 1 << 20, b'"\n: 1\n'),
    "recipe/built-text-of-1-MB": _repeated(_MERGE + b'dtype: "', b"f", 1 << 20, b'"\n'),
    "recipe/built-aliases": _bytes(_MERGE + b"x: &x 1\ny: [" + b"*x," * 99_000 + b"]\n"),
    "recipe/built-folder": Path.mkdir,
    "recipe/built-link-to-zero": _link("/dev/zero"),
    "reference/built-long": _repeated(b"merge_method: linear\nmodels:\n- model: ./", b"a", 100_000, b"\n"),
    "config/built-deep": _bytes(b'{"a":' * 100_000),
    "config/built-digits": _bytes(b'{"vocab_size": %s}' % _DIGITS),
    "config/built-sparse": _sparse(300 << 20),
    "config/built-lists": _repeated(b'{"a":[', b"[],", 12 << 20, b"0]}"),
    "config/built-link-to-zero": _link("/dev/zero"),
    "config/built-pipe": os.mkfifo,
    "generation/built-digits": _bytes(b'{"eos_token_id": %s}' % _DIGITS),
    "tokenizer/built-digits": _bytes(b'{"model":{"type":"BPE","vocab":{"a":%s},"merges":[]}}' % _DIGITS),
    "tokenizer/built-deep": _bytes(b'{"model":' * 100_000),
    "tokenizer/built-many-merges": _repeated(
        b'{"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":[', b'"a b",', 300_000, b'"a b"]}}'
    ),
    "tokenizer/built-token-of-1-MB": _repeated(b'{"model":{"type":"WordLevel","vocab":{"', b"a", 1 << 20, b'":0}}}'),
    "tokenizer_config/built-digits": _bytes(b'{"added_tokens_decoder":{"%s":{"content":"q"}}}' % _DIGITS),
    "template/built-deep": _bytes(b"{{ " + b"(" * 20_000 + b"1" + b")" * 20_000 + b" }}"),
    "template/built-blocks": _bytes(b"{% if 1 %}" * 5000 + b"x" + b"{% endif %}" * 5000),
    "adapter/built-digits": _bytes(b'{"peft_type":"LORA","lora_alpha":6,"r":%s}' % _DIGITS),
    "adapter/built-deep": _bytes(b'{"a":' * 100_000),
    "adapter/built-many-patterns": _adapter(rank_pattern={f".*m{i}": 3 for i in range(300)}),
    "adapter/built-patterns-without-end": _adapter(rank_pattern={f".*m{i}": 3 for i in range(20_000)}),
    "adapter_weights/built-sparse-terabyte": _sparse(1 << 40, struct.pack("<Q", 1 << 39)),
    "moe/built-digits": _bytes(b"base_model: base\nexperts_per_token: " + _DIGITS + b"\n"),
    "moe_config/built-digits": _bytes(b'{"hidden_size": %s}' % _DIGITS),
    "prompts/built-digits": _bytes(_DIGITS),
    "prompts/built-sparse": _sparse(100 << 20),
    "prompts/built-pipe": os.mkfifo,
    "prompts/built-many": _repeated(b"", b'"ab"\n', 50_000, b""),
}
"""The cases, by ``kind/name``: what writes one at a path."""
