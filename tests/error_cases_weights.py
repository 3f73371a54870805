"""Errors of weights that are pickled or quantised."""

from __future__ import annotations

import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from error_cases_build import Build, Case, Group, config, one_tensor, several, tensors, text, without
from files import Array, encode, llama

__all__ = ["GROUPS"]

WEIGHTS = "models/b/model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def _pickle(content: object) -> Build:
    """The weights of ``models/b`` as torch saves ``content``; a function gives it, so that torch is loaded late."""

    def build(folder: Path) -> None:
        import torch

        (folder / WEIGHTS).unlink()
        torch.save(content(torch) if callable(content) else content, folder / "models/b/pytorch_model.bin")

    return build


class _Code:
    """What runs a program when it is unpickled without care."""

    def __reduce__(self) -> Any:
        return eval, ("1",)


def _tar(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with tarfile.open(folder / "models/b/pytorch_model.bin", "w") as archive:
        archive.add(folder / "recipe.yml", "storages")


def _compressed(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with zipfile.ZipFile(folder / "models/b/pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}))


def _overlapping(folder: Path) -> None:
    """A record of the archive that is shorter than its tensor."""
    import torch

    (folder / WEIGHTS).unlink()
    path, sound = folder / "models/b/pytorch_model.bin", folder / "sound.bin"
    torch.save({"w": torch.ones(64), "v": torch.ones(64)}, sound)
    with zipfile.ZipFile(sound) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            raw = source.read(entry)
            target.writestr(entry.filename, raw[:16] if "/data/" in entry.filename else raw)


def _packed(changes: dict[str, Any] | None = None, lost: str = "", scheme: str = "nf4", **parts: Array) -> Build:
    """A model with a tensor of 16 x 8 numbers in 4 bits, whose description or tables are changed."""
    record = {"blocksize": 64, "dtype": "bfloat16", "shape": [16, 8], "quant_type": "nf4", **(changes or {})}
    raw = json.dumps(record).encode() if changes is None or "raw" not in changes else changes["raw"]
    found: dict[str, Array] = {
        "x.weight": ("U8", np.zeros((64, 1), "u1")),
        "x.weight.absmax": encode("F32", np.ones(2)),
        "x.weight.quant_map": encode("F32", np.linspace(-1, 1, 16)),
        f"x.weight.quant_state.bitsandbytes__{scheme}": ("U8", np.frombuffer(raw, "u1")),
        **{f"x.weight.{name}" if name else "x.weight": array for name, array in parts.items()},
    }
    return tensors({name: array for name, array in found.items() if name != lost})


NESTED = {
    "absmax": ("U8", np.zeros(2, "u1")),
    "nested_absmax": encode("F32", np.ones(1)),
    "nested_quant_map": encode("F32", np.linspace(-1, 1, 256)),
}
PICKLES = [
    Case(
        title="A pickle asks for code",
        build=_pickle({"w": _Code()}),
        code=1,
        message=(
            "models/b/pytorch_model.bin: this pickle asks for 'eval', which could run code: refused; use the "
            "safetensors version"
        ),
        meaning="Unpickling could run what it likes, so only tensors are taken.",
    ),
    Case(
        title="A pickle is damaged",
        build=several(without(WEIGHTS), text("models/b/pytorch_model.bin", "not at all")),
        code=1,
        message=(
            "models/b/pytorch_model.bin: the file is damaged, or not a pickle of tensors; download it again, "
            "or use the safetensors version"
        ),
        meaning="Fetch it again; the safetensors version is faster, too.",
    ),
    Case(
        title="A pickle is very old",
        build=_tar,
        code=1,
        message="models/b/pytorch_model.bin: a tar archive of 2017 or earlier; use the safetensors version",
        meaning="Archives of that kind can be made to run code.",
    ),
    Case(
        title="A pickle is compressed",
        build=_compressed,
        code=1,
        message=(
            "models/b/pytorch_model.bin: a compressed archive, which torch never writes; unpack it, or "
            "download it again"
        ),
        meaning="Compressed tensors can't be mapped into memory, and may be bombs.",
    ),
    Case(
        title="A pickle holds no dictionary",
        build=_pickle([1, 2]),
        code=1,
        message="models/b/pytorch_model.bin: expected a dictionary of tensors, found list",
        meaning="Save the model's `state_dict()`.",
    ),
    Case(
        title="Tensors of a pickle are nested",
        build=_pickle(lambda torch: {"model": {"w": torch.ones(2)}}),
        code=1,
        message="models/b/pytorch_model.bin: tensors are nested under 'model'; save one flat state_dict instead",
        meaning="This is a checkpoint of a training program: take the part that is the model out of it.",
    ),
    Case(
        title="A name in a pickle is no text",
        build=_pickle(lambda torch: {0: torch.ones(2)}),
        code=1,
        message="models/b/pytorch_model.bin: 0 is not the name of a tensor; the file is damaged or hostile",
        meaning="Save the model's `state_dict()`, whose keys are names.",
    ),
    Case(
        title="A tensor of a pickle is sparse",
        build=_pickle(lambda torch: {"w": torch.eye(2).to_sparse()}),
        code=1,
        message=(
            "models/b/pytorch_model.bin: tensor 'w' is torch.sparse_coo on cpu, not a plain array; save the "
            "plain weights"
        ),
        meaning="Convert it with `to_dense()`, or dequantise it, and save again.",
    ),
    Case(
        title="A tensor of a pickle is complex",
        build=_pickle(lambda torch: {"w": torch.ones(2, dtype=torch.complex64)}),
        code=1,
        message="models/b/pytorch_model.bin: tensor 'w' has the dtype complex64, which can't be merged",
        meaning="Only real numbers can be merged.",
    ),
    Case(
        title="Tensors of a pickle overlap",
        build=_overlapping,
        code=1,
        message="models/b/pytorch_model.bin: its tensors overlap; the file is damaged or hostile, download it again",
        meaning="The file is damaged, or made to harm.",
    ),
]
QUANTISED = [
    Case(
        title="Weights are quantised",
        build=tensors({**llama(1), **one_tensor("model.layers.0.self_attn.q_proj.qweight", "I32")}),
        code=1,
        message=(
            "models/b: GPTQ or AWQ weights ('model.layers.0.self_attn.q_proj.qweight') can't be merged; merge "
            "the unquantised (bfloat16 or float16) model and quantise the result"
        ),
        meaning="Packed integers are no numbers that could be averaged.",
    ),
    Case(
        title="Weights are integers",
        build=several(
            tensors({**llama(1), **one_tensor(QUERY, "I8")}),
            config(quantization_config={"quant_method": "compressed-tensors"}),
        ),
        code=1,
        message=(
            "models/b: compressed-tensors weights ('model.layers.0.self_attn.q_proj.weight') can't be merged; "
            "merge the unquantised (bfloat16 or float16) model and quantise the result"
        ),
        meaning="Packed integers are no numbers that could be averaged.",
    ),
    Case(
        title="Weights in fp8 have no scale",
        build=tensors({**llama(1), **one_tensor(QUERY, "F8_E4M3")}),
        code=1,
        message=(
            "models/b: fp8 tensor 'model.layers.0.self_attn.q_proj.weight' [7, 7] float8_e4m3fn has no usable "
            "scale beside it; merge the unquantised (bfloat16 or float16) model and quantise the result"
        ),
        meaning="fp8 is read where a scale for the tensor, its rows or its blocks lies beside it.",
    ),
    Case(
        title="A table of 4-bit weights is missing",
        build=_packed(lost="x.weight.absmax"),
        code=1,
        message=("models/b: tensor 'x.weight' (bitsandbytes 4-bit) has no 'x.weight.absmax'; download the model again"),
        meaning="The files are incomplete.",
    ),
    Case(
        title="4-bit weights are of an unknown scheme",
        build=_packed(scheme="nf5"),
        code=1,
        message=(
            "models/b: tensor 'x.weight' (bitsandbytes 4-bit) is quantised as 'nf5', which is neither nf4 nor "
            "fp4; the file is damaged or hostile, download it again"
        ),
        meaning="bitsandbytes knows nf4 and fp4.",
    ),
    Case(
        title="4-bit weights have no description",
        build=_packed({"raw": b"[]"}),
        code=1,
        message=(
            "models/b: tensor 'x.weight' (bitsandbytes 4-bit) has a description that is no JSON object; the "
            "file is damaged or hostile, download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="4-bit weights have a huge description",
        build=_packed({"raw": bytes(1 << 17)}),
        code=1,
        message=(
            "models/b: tensor 'x.weight.quant_state.bitsandbytes__nf4' has 131072 bytes of description; the "
            "file is damaged or hostile, download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="4-bit weights have odd blocks",
        build=_packed({"blocksize": 7}),
        code=1,
        message=(
            "models/b: tensor 'x.weight' (bitsandbytes 4-bit) has blocks of 7; they have 32 to 4096 elements, "
            "a power of two"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="4-bit weights had an unknown type",
        build=_packed({"dtype": "int8"}),
        code=1,
        message=(
            "models/b: tensor 'x.weight' (bitsandbytes 4-bit) had the unknown dtype 'int8'; the file is "
            "damaged or hostile, download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="4-bit weights had an impossible shape",
        build=_packed({"shape": [-16, -8]}),
        code=1,
        message=(
            "models/b: tensor 'x.weight' (bitsandbytes 4-bit) has the shape [-16, -8]; the file is damaged or "
            "hostile, download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="A table of 4-bit weights is too short",
        build=_packed(absmax=encode("F32", np.ones(1))),
        code=1,
        message=(
            "models/b: tensor 'x.weight' (bitsandbytes 4-bit) needs 2 scales, but 'x.weight.absmax' is [1] "
            "float32; the file is damaged or hostile, download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="Scales of 4-bit weights have no tables",
        build=_packed(absmax=("U8", np.zeros(2, "u1"))),
        code=1,
        message=(
            "models/b: tensor 'x.weight' (bitsandbytes 4-bit) has scales of type uint8 without the tables to "
            "read them; the file is damaged or hostile, download it again"
        ),
        meaning="Scales that are quantised themselves need `nested_absmax` and `nested_quant_map`.",
    ),
    Case(
        title="Scales of 4-bit weights have odd blocks",
        build=_packed({"nested_blocksize": 0, "nested_offset": 0.1}, **NESTED),
        code=1,
        message=(
            "models/b: tensor 'x.weight' (bitsandbytes 4-bit) has a nested_blocksize of 0; the file is damaged "
            "or hostile, download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="Scales of 4-bit weights have an odd offset",
        build=_packed({"nested_blocksize": 256, "nested_offset": "x"}, **NESTED),
        code=1,
        message=(
            "models/b: tensor 'x.weight' (bitsandbytes 4-bit) has a nested_offset of 'x'; the file is damaged "
            "or hostile, download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
]
GROUPS = (
    Group("Pickled weights", "Files called `*.bin` are read by torch's safe reader.", PICKLES),
    Group(
        "Quantised weights",
        "What is stored in 4 bits by bitsandbytes, or in fp8 with scales, is dequantised.",
        QUANTISED,
    ),
)
