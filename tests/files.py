"""Small checkpoints for tests, written with numpy and struct only: what is read back was not written by what we test.

Sizes are distinct primes, so that a swapped axis shows. ``write_model`` makes a folder that looks like a small Llama;
``write_safetensors`` and ``raw_safetensors`` write single files, sound or hostile.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "HIDDEN",
    "INTERMEDIATE",
    "LAYERS",
    "VOCAB",
    "Array",
    "bf16",
    "config",
    "encode",
    "llama",
    "raw_safetensors",
    "read_model",
    "read_safetensors",
    "to_float",
    "write_model",
    "write_recipe",
    "write_safetensors",
    "write_sharded",
]

VOCAB, HIDDEN, INTERMEDIATE, KEYS, LAYERS = 31, 7, 13, 5, 3

Array = tuple[str, np.ndarray]
"""A tensor: its safetensors code, and an array whose bytes are the tensor's (bfloat16 and fp8 as unsigned integers)."""

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "I64": "<i8",
          "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1"}  # fmt: skip


def bf16(values: np.ndarray) -> np.ndarray:
    """Finite float32 ``values`` rounded to bfloat16 (to nearest, ties to even), as uint16."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").reshape(np.shape(values))


def to_float(array: Array) -> np.ndarray:
    """A tensor's values as float64."""
    code, raw = array
    if code == "BF16":
        return (raw.astype("<u4") << 16).view("<f4").astype(np.float64)
    return raw.astype(np.float64)


def encode(code: str, values: np.ndarray) -> Array:
    """``values`` as a tensor of type ``code``."""
    return code, bf16(values) if code == "BF16" else values.astype(_NUMPY[code])


def raw_safetensors(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with any header at all: JSON of ``header`` (bytes are taken as they are), announced as ``length``."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def write_safetensors(path: Path, tensors: Mapping[str, Array]) -> Path:
    """A sound safetensors file with ``tensors`` in this order."""
    header, data = {}, bytearray()
    for name, (code, array) in tensors.items():
        begin = len(data)
        data += array.tobytes()
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [begin, len(data)]}
    return raw_safetensors(path, header, bytes(data))


def read_safetensors(path: Path) -> dict[str, Array]:
    """The tensors of a sound safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        array = np.frombuffer(raw[8 + length + begin : 8 + length + end], _NUMPY[entry["dtype"]])
        found[name] = (entry["dtype"], array.reshape(entry["shape"]))
    return found


def read_model(folder: Path) -> dict[str, Array]:
    """The tensors of all safetensors files of a folder."""
    found: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(read_safetensors(path))
    return found


def write_sharded(folder: Path, shards: Sequence[Mapping[str, Array]]) -> None:
    """``shards`` as files with an index."""
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def config(**changes: Any) -> dict[str, Any]:
    """A config.json that describes ``llama()``; a change to None removes the key."""
    record = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **changes,
    }
    return {key: value for key, value in record.items() if value is not None}


def llama(
    seed: int, *, code: str = "BF16", layers: int = LAYERS, vocab: int = VOCAB, intermediate: int = INTERMEDIATE
) -> dict[str, Array]:
    """The tensors of a tiny Llama with random values."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for layer in range(layers):
        for name, shape in (
            ("input_layernorm", (HIDDEN,)),
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.k_proj", (KEYS, HIDDEN)),
            ("mlp.up_proj", (intermediate, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, intermediate)),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocab, HIDDEN)}
    random = np.random.default_rng(seed)
    return {name: encode(code, random.standard_normal(math.prod(s)).reshape(s)) for name, s in shapes.items()}


def write_model(
    folder: Path,
    seed: int = 0,
    tensors: Mapping[str, Array] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    **shape: Any,
) -> Path:
    """A model folder: config.json and model.safetensors, with ``tensors`` or those of ``llama(seed, **shape)``."""
    folder.mkdir(parents=True, exist_ok=True)
    record = config(**{"num_hidden_layers": shape.get("layers", LAYERS), **(settings or {})})
    (folder / "config.json").write_text(json.dumps(record))
    write_safetensors(folder / "model.safetensors", llama(seed, **shape) if tensors is None else tensors)
    return folder


def write_recipe(path: Path, text: str) -> Path:
    """A recipe file; ``text`` as it stands, but for the line breaks around it."""
    path.write_text(text.strip("\n") + "\n")
    return path
