"""Small checkpoints written with NumPy: for tests of arithmetic and of the engine, where no architecture matters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mergekit.checkpoint import build_header
from mergekit.checkpoint.header import read_header
from mergekit.dtypes import BF16, F16, F32, F64, DType

NUMPY = {F16: np.float16, F32: np.float32, F64: np.float64}


def encode(values: np.ndarray, dtype: DType) -> bytes:
    """``values`` rounded to ``dtype`` by NumPy's rules (bfloat16: to nearest even on the bits)."""
    if dtype == BF16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16).tobytes()
    return np.ascontiguousarray(values).astype(NUMPY[dtype]).tobytes()


def decode(raw: bytes, dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    """The exact values of a stored tensor, as float64."""
    if dtype == BF16:
        bits = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64).reshape(shape)
    return np.frombuffer(raw, NUMPY[dtype]).astype(np.float64).reshape(shape)


def write_model(folder: Path, tensors: dict[str, np.ndarray], dtype: DType = F32, **config: object) -> Path:
    """A one-file checkpoint of float tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    header, _ = build_header((name, dtype, value.shape) for name, value in tensors.items())
    (folder / "model.safetensors").write_bytes(header + b"".join(encode(v, dtype) for v in tensors.values()))
    (folder / "config.json").write_text(json.dumps({"model_type": "test", "architectures": ["Test"], **config}))
    return folder


def read_model(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a one-file checkpoint, exactly, as float64."""
    path = folder / "model.safetensors"
    infos, _ = read_header(path)
    raw = path.read_bytes()
    return {n: decode(raw[i.offset : i.offset + i.nbytes], i.dtype, i.shape) for n, i in infos.items()}


def family(
    root: Path, count: int, dtype: DType = F32, shapes: dict[str, tuple[int, ...]] | None = None, delta: float = 0.3
) -> list[Path]:
    """A base and fine-tunes of it: ``count`` models that differ by ``delta`` of the weights' size."""
    shapes = shapes or {
        "embed.weight": (13, 7),
        "layers.0.w": (31, 11),
        "layers.1.w": (31, 11),
        "norm": (17,),
        "one": (),
    }
    folders = []
    for number in range(count):
        tensors = {}
        for position, (name, shape) in enumerate(shapes.items()):
            value = np.random.default_rng(position).standard_normal(shape)
            if number:
                value = value + delta * np.random.default_rng([position, number]).standard_normal(shape)
            tensors[name] = np.asarray(value)
        folders.append(write_model(root / f"m{number}", tensors, dtype))
    return folders
