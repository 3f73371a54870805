"""New inputs from old ones: changes to bytes, to trees of JSON and YAML, to headers and to pickles.

All of it is decided by the ``random.Random`` that is handed in, so a number makes the same input again.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Sequence
from random import Random
from typing import Any

__all__ = ["damage", "header", "json_file", "json_lines", "pickled", "yaml_file"]

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 3, 31, 1 << 31, 1 << 63, 1 << 64, 10**12, 10**400, 0.5, -0.0, 1e308, 5e-324,
    math.nan, math.inf, "", "x", "b", "..", "../../b", "/etc/passwd", "\x1b[31m", "a\nb", "\0", "\ud800", "x" * 3000,
    "(a+)+$", "union", "base", "LlamaForCausalLM", "F32", [], {}, [[]], {"a": {}}, ["x"], [None], [1, 2, 3], [0, 8],
    {"value": 1, "filter": "mlp"}, {"model": "x"}, {"path": "x", "revision": "\n"}, "{{ 1 }}", "{% for x in",
]  # fmt: skip
TOKENS = [
    b"1e999", b"9" * 5000, b"-", b"NaN", b"Infinity", b"[" * 3000, b'{"a":' * 3000, b"\\ud800", b"\0", b"\xff", b"\xf0",
    b"\xef\xbb\xbf", b"&a ", b"*a", b"<<: ", b"!!python/object/apply:os.mkdir [canary]", b"!!binary ", b"!!int ",
    b'"\\e[31m"', b"? ", b"- ", b": ", b"\t", b"\n", b"---\n", b"...\n", b"|\n", b">-\n", b"{", b"}", b"[", b"]", b'"',
    b"'", b",", b"#", b"!!set {", b"!!omap ", b"0x", b"0o7", b"1_000", b"1:60:60", b"2001-01-01", b"~", b"null", b"{{",
    b"{%", b"%}", b"}}", b"\xe2\x80\xa8", b"\xc2\x85", b"\x1b[2J", b"@", b"`", b"+", b"@main", b"/..", b"\r",
]  # fmt: skip
OPCODES = [
    b"cos\nmkdir\n", b"c__builtin__\neval\n", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"(", b"t", b"R", b"b", b"i", b"o", b"}", b"]", b")",
    b"Vcanary\n", b"K\x00", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8b\xff\xff\xff\x7f",
    b"q\x00", b"h\x00",
    b"r\xff\xff\xff\x7f", b"u", b"s", b"0", b"2", b"N", b"Q", b"\x81", b"\x92", b"\x93", b"\x95" + b"\xff" * 8, b".",
    b"T\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"\x96" + b"\xff" * 7 + b"\x7f", b"\x80\x05", b"G\x7f\xf0" + b"\0" * 6,
]  # fmt: skip


def damage(raw: bytes, random: Random, tokens: Sequence[bytes] = TOKENS) -> bytes:
    """One to four changes to bytes: flipped, cut, doubled, moved, or tokens put in."""
    data = bytearray(raw)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randint(0, len(data))
        end = min(len(data), at + random.choice((1, 1, 2, 5, 20, 200)))
        way = random.randrange(7)
        if way == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << random.randrange(8)
        elif way == 1:
            del data[at:end]
        elif way == 2:
            data[at:at] = data[at:end] * random.choice((1, 1, 3, 100))
        elif way == 3:
            data[at:end] = random.choice(tokens)
        elif way == 4:
            data[at:at] = random.choice(tokens)
        elif way == 5:
            del data[at:]
        else:
            data[at:end] = random.randbytes(random.choice((1, 2, 4, 8)))
    return bytes(data[: 1 << 20])


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below ``tree``."""
    found, waiting = [], [tree]
    while waiting and len(found) < 3000:
        node = waiting.pop()
        entries = (
            list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
        )
        found += [(node, key) for key, _ in entries]
        waiting += [value for _, value in entries]
    return found


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value)) if isinstance(value, (dict, list)) else value


def grow(tree: Any, random: Random, keys: Sequence[str] = ()) -> Any:
    """``tree`` with one to four of its nodes replaced, lost, renamed, wrapped, doubled or exchanged; in place."""
    for _ in range(random.choice((1, 1, 2, 4))):
        places = _places(tree)
        if not places or random.random() < 0.01:
            return _copy(random.choice(VALUES))
        node, key = random.choice(places)
        other, second = random.choice(places)
        way = random.randrange(8)
        if way <= 2:
            node[key] = _copy(random.choice(VALUES))
        elif way == 3:
            del node[key]
        elif way == 4 and isinstance(node, dict):
            name = random.choice([*keys, *(v for v in VALUES if isinstance(v, str)), str(second)])
            node[name] = node.pop(key) if random.random() < 0.5 else _copy(random.choice(VALUES))
        elif way == 5:
            depth = random.choice((1, 1, 2, 40, 400))
            for _ in range(depth):
                node[key] = [node[key]] if random.random() < 0.5 else {"a": node[key]}
        elif way == 6 and isinstance(node, list):
            node[key:key] = [_copy(node[key]) for _ in range(random.choice((1, 1, 70)))]
        elif second in (other if isinstance(other, dict) else range(len(other))):
            node[key] = _copy(other[second])
    return tree


def _loaded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _dumped(tree: Any, random: Random) -> bytes:
    try:
        text = json.dumps(tree, ensure_ascii=random.random() < 0.7).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b"[" * 5000
    return text


def json_file(raw: bytes, random: Random, keys: Sequence[str] = ()) -> bytes:
    """A JSON file with its tree or its bytes changed; ``keys`` are names worth giving."""
    tree = _loaded(raw) if random.random() < 0.75 else None
    changed = damage(raw, random) if tree is None else _dumped(grow(tree, random, keys), random)
    return damage(changed, random) if random.random() < 0.1 else changed


def json_lines(raw: bytes, random: Random) -> bytes:
    """Lines of JSON, some of them changed."""
    lines = [json_file(line, random) if random.random() < 0.3 else line for line in raw.split(b"\n")[:100]]
    return damage(b"\n".join(lines), random) if random.random() < 0.2 else b"\n".join(lines)


def yaml_file(raw: bytes, random: Random, keys: Sequence[str] = (), *, is_sound: bool = False) -> bytes:
    """YAML with its tree changed, if it ``is_sound`` (others may explode when they are read), else its bytes."""
    if not is_sound or random.random() < 0.4:
        return damage(raw, random)
    import yaml

    tree = grow(yaml.load(raw, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), random, keys)
    try:
        flow = random.choice((None, None, True))
        text = yaml.dump(tree, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), default_flow_style=flow)
    except (yaml.YAMLError, RecursionError, ValueError):
        return damage(raw, random)
    changed = text.encode("utf-8", "surrogatepass")
    return damage(changed, random) if random.random() < 0.2 else changed


def header(raw: bytes, random: Random) -> bytes:
    """A safetensors file with its length, its JSON or its data changed."""
    length = struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else 0
    text, data = raw[8 : 8 + min(length, len(raw))], raw[8 + min(length, len(raw)) :]
    if random.random() < 0.15:
        return damage(raw, random)
    if random.random() < 0.85:
        text = json_file(text, random, ("__metadata__", "dtype", "shape", "data_offsets"))
        if random.random() < 0.2:
            text = text.replace(b'"shape"', random.choice((b'"dtype"', b'"shape": [1], "shape"')), 1)
    claimed = len(text)
    if random.random() < 0.15:
        claimed = random.choice((0, 1, claimed - 1, claimed + 1, 1 << 20, 1 << 32, 1 << 63, (1 << 64) - 1)) % (1 << 64)
    if random.random() < 0.2:
        data = damage(data, random)
    return struct.pack("<Q", claimed) + text + data


def pickled(raw: bytes, random: Random) -> bytes:
    """A pickle, or a zip archive of one, with opcodes put in, bytes changed or records exchanged."""
    if raw[:2] != b"PK" or random.random() < 0.15:
        return damage(raw, random, OPCODES)
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
            for entry in old.infolist():
                content, name = old.read(entry), entry.filename
                if name.endswith("data.pkl") and random.random() < 0.85:
                    content = damage(content, random, OPCODES)
                elif random.random() < 0.05:
                    content = damage(content, random)
                if random.random() < 0.02:
                    name = random.choice(("../canary", "/canary", "archive/data/0", name + "x"))
                if random.random() < 0.98:
                    new.writestr(name, content, zipfile.ZIP_DEFLATED if random.random() < 0.02 else zipfile.ZIP_STORED)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError):
        return damage(raw, random, OPCODES)
    return damage(out.getvalue(), random) if random.random() < 0.1 else out.getvalue()
