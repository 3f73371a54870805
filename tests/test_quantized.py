"""Quantised checkpoints: fp8 with its scales is read exactly; packed integers are refused, never averaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit
from command import assert_refused, mergekit_yaml
from files import HIDDEN, Array, bf16, encode, llama, read_safetensors, to_float, write_model, write_recipe

NAME = "model.layers.1.mlp.down_proj.weight"
COPY = "merge_method: passthrough\nmodels: [{model: x}]\ndtype: float32"
FORMATS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(Path("r.yml"), COPY)


def finite_codes(code: str) -> np.ndarray:
    """The bytes of an fp8 format that are numbers."""
    every = np.arange(256, dtype="u1")
    return every[np.isfinite(decoded(code, every))]


def decoded(code: str, raw: np.ndarray) -> np.ndarray:
    """fp8 bytes as float32, by torch."""
    return torch.from_numpy(raw.copy()).view(FORMATS[code]).to(torch.float32).numpy()


def by_formula(raw: int, exponent: int, mantissa: int, *, infinite: bool) -> float:
    """An fp8 number from its bits, as the OCP 8-bit floating point paper defines it."""
    sign, e, m = raw >> 7, (raw >> mantissa) & ((1 << exponent) - 1), raw & ((1 << mantissa) - 1)
    top = (1 << exponent) - 1
    if infinite and e == top:
        return math.nan if m else math.copysign(math.inf, -sign or 1)
    if not infinite and e == top and m == (1 << mantissa) - 1:
        return math.nan
    bias = (1 << (exponent - 1)) - 1
    value = (m / (1 << mantissa)) * 2.0 ** (1 - bias) if e == 0 else (1 + m / (1 << mantissa)) * 2.0 ** (e - bias)
    return -value if sign else value


@pytest.mark.parametrize(("code", "exponent", "mantissa"), [("F8_E4M3", 4, 3), ("F8_E5M2", 5, 2)])
def test_the_oracle_agrees_with_the_definition(code, exponent, mantissa):
    expected = [by_formula(raw, exponent, mantissa, infinite=code == "F8_E5M2") for raw in range(256)]
    assert np.array_equal(decoded(code, np.arange(256, dtype="u1")), np.array(expected, np.float32), equal_nan=True)


def model(folder: str, weight: Array, scale: Array | None, name: str, *, config: bool = True, **more: Array) -> None:
    """A model with one fp8 tensor, and its scale under ``NAME + name``."""
    tensors = {**llama(1), NAME: weight, **more}
    if scale is not None:
        tensors[NAME + name] = scale
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}} if config else {}
    write_model(Path(folder), tensors=tensors, settings=settings)


def result(out: str = "out", *args: str) -> np.ndarray:
    """The fp8 tensor, merged."""
    done = mergekit_yaml("r.yml", out, *args)
    assert done.code == 0, done.err
    return to_float(read_safetensors(Path(out, "model.safetensors"))[NAME])


def random_fp8(code: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(finite_codes(code), shape)


def random_scale(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).uniform(1e-3, 2, shape).astype("f4")


SCALES: dict[str, tuple[tuple[int, int], tuple[int, ...], tuple[int, int]]] = {
    "one number": ((HIDDEN, 13), (), (HIDDEN, 13)),
    "a list of one": ((HIDDEN, 13), (1,), (HIDDEN, 13)),
    "a matrix of one": ((HIDDEN, 13), (1, 1), (HIDDEN, 13)),
    "each row": ((29, 13), (29,), (1, 13)),
    "each row, as a column": ((29, 13), (29, 1), (1, 13)),
    "whole blocks": ((256, 384), (2, 3), (128, 128)),
    "blocks and a rest": ((257, 131), (3, 2), (128, 128)),
    "one block and less": ((101, 13), (1, 1), (128, 128)),
    "blocks of rows only": ((300, 13), (3, 1), (128, 128)),
    "blocks of columns only": ((13, 300), (1, 3), (128, 128)),
    "small blocks": ((67, 130), (5, 9), (16, 16)),
    "more than one read": ((1031, 521), (9, 5), (128, 128)),
}
"""Shape of the tensor, shape of its scale, rows and columns that share a scale."""


@pytest.mark.parametrize("code", FORMATS)
@pytest.mark.parametrize("case", SCALES)
def test_fp8_is_read_with_its_scales(case, code):
    shape, scale_shape, block = SCALES[case]
    raw, scale = random_fp8(code, shape), random_scale(scale_shape)
    model("x", (code, raw), ("F32", scale), "_scale_inv" if len(scale_shape) == 2 else "_scale")
    of_each = scale.reshape(-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    full = np.kron(of_each, np.ones(block, "f4"))[: shape[0], : shape[1]]
    assert np.array_equal(result(), decoded(code, raw) * full)


@pytest.mark.parametrize("code", FORMATS)
def test_every_number_of_fp8(code):
    codes = finite_codes(code)
    model("x", (code, np.tile(codes, (2, 1))), ("F32", np.ones(2, "f4")), "_scale")
    assert np.array_equal(result(), np.tile(decoded(code, codes), (2, 1)))


@pytest.mark.parametrize("scale_code", ["BF16", "F16", "F64"])
def test_scales_of_other_dtypes(scale_code):
    raw, scale = random_fp8("F8_E4M3", (29, 13)), encode(scale_code, random_scale((29, 1)))
    model("x", ("F8_E4M3", raw), scale, "_scale")
    assert np.array_equal(result(), decoded("F8_E4M3", raw) * to_float(scale).astype("f4"))


def test_not_a_number_in_fp8_stops_the_merge():
    raw = random_fp8("F8_E4M3", (29, 13))
    raw[5, 7] = 0x7F
    model("x", ("F8_E4M3", raw), ("F32", np.ones(29, "f4")), "_scale")
    assert_refused(mergekit_yaml("r.yml", "out"), 1, NAME, "NaN or infinity")
    assert np.isnan(result("out2", "--allow-nonfinite")).sum() == 1


@pytest.mark.parametrize("text", [
    "merge_method: linear\nmodels: [{model: x}, {model: b}]\nparameters: {weight: [1, 3]}",
    "merge_method: slerp\nbase_model: x\nmodels: [{model: x}, {model: b}]\nparameters: {t: 0.3}",
    "merge_method: ties\nbase_model: b\nmodels: [{model: x}]\nparameters: {weight: 1, density: 0.5}",
])  # fmt: skip
def test_a_merge_is_that_of_the_numbers(text):
    """fp8 with scales, or the same numbers in float32: the same bytes come out."""
    raw, scale = random_fp8("F8_E4M3", (131, 257)), random_scale((2, 3))
    other = {**llama(2), NAME: ("BF16", bf16(np.random.default_rng(5).standard_normal((131, 257))))}
    write_model(Path("b"), tensors=other)
    recipe = text + "\ndtype: bfloat16"
    outputs = []
    for tensor in (
        ("F8_E4M3", raw),
        ("F32", decoded("F8_E4M3", raw) * np.kron(scale, np.ones((128, 128), "f4"))[:131, :257]),
    ):
        model("x", tensor, ("F32", scale) if tensor[0] != "F32" else None, "_scale_inv")
        write_recipe(Path("r.yml"), recipe)
        outputs.append(result(f"out-{tensor[0]}"))
        outputs.append(Path(f"out-{tensor[0]}/model.safetensors").read_bytes())
    assert np.array_equal(outputs[0], outputs[2])
    assert outputs[1] == outputs[3]


def test_the_output_is_no_longer_quantised():
    model("x", ("F8_E4M3", random_fp8("F8_E4M3", (29, 13))), ("F32", np.ones(29, "f4")), "_scale",
          **{NAME.replace("weight", "input_scale"): ("F32", np.array(0.5, "f4"))})  # fmt: skip
    write_recipe(Path("r.yml"), "merge_method: passthrough\nmodels: [{model: x}]")
    plan = mergekit.plan("r.yml")
    assert plan.left_out == ()
    assert plan.warnings == ("the quantised inputs were dequantised; quantization_config is left out of config.json",)
    result()
    merged = read_safetensors(Path("out/model.safetensors"))
    assert sorted(merged) == sorted(llama(1))
    assert {code for code, _ in merged.values()} == {"BF16"}
    config = json.loads(Path("out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"


# Refused

REMEDY = "merge the unquantised (bfloat16 or float16) model and quantise the result"
LAYER = "model.layers.0.self_attn.q_proj"
INT32, BYTES = ("I32", np.ones((3, 5), "<i4")), ("U8", np.ones((5, 3), "u1"))
INT8, FP8, ROWS = ("I8", np.ones((7, 7), "i1")), ("F8_E4M3", np.ones((7, 7), "u1")), ("F32", np.ones(7, "<f4"))

PACKED: dict[str, tuple[dict[str, Array], Any, str]] = {
    "GPTQ": ({".qweight": INT32, ".qzeros": INT32, ".scales": ROWS, ".g_idx": INT32}, {"quant_method": "gptq"}, "GPTQ"),
    "AWQ": ({".qweight": INT32, ".qzeros": INT32, ".scales": ROWS}, {"quant_method": "awq"}, "AWQ"),
    "GPTQ or AWQ, unsaid": ({".qweight": INT32, ".qzeros": INT32, ".scales": ROWS}, None, "GPTQ or AWQ"),
    "bitsandbytes 4-bit without its description": (
        {".weight": BYTES, ".weight.absmax": BYTES, ".weight.quant_map": ROWS},
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes",
    ),
    "bitsandbytes 4-bit, unsaid": ({".weight": BYTES, ".weight.absmax": ROWS}, None, "bitsandbytes 4-bit"),
    "bitsandbytes 8-bit": ({".weight": INT8, ".SCB": ROWS}, {"load_in_8bit": True}, "q_proj"),
    "bitsandbytes 8-bit, unsaid": ({".weight": INT8, ".SCB": ROWS}, None, "bitsandbytes 8-bit"),
    "MXFP4": ({".down_proj_blocks": BYTES, ".down_proj_scales": BYTES}, {"quant_method": "mxfp4"}, "MXFP4"),
    "MXFP4, unsaid": ({".down_proj_blocks": BYTES, ".down_proj_scales": BYTES}, None, "MXFP4"),
    "compressed-tensors, packed": (
        {".weight_packed": INT32, ".weight_scale": ROWS}, {"quant_method": "compressed-tensors"}, "compressed-tensors",
    ),
    "compressed-tensors, integers": (
        {".weight": INT8, ".weight_scale": ROWS}, {"quant_method": "compressed-tensors"}, "compressed-tensors",
    ),
    "integers with a scale": ({".weight": INT8, ".weight_scale": ROWS}, None, "integer weights"),
    "fp8 beside integers": (
        {".weight": FP8, ".weight_scale": ROWS, ".x.weight": INT8, ".x.weight_scale": ROWS}, None, "integer weights",
    ),
    "four-bit floats of ModelOpt": (
        {".weight": BYTES, ".weight_scale": FP8, ".weight_scale_2": ROWS}, {"quant_method": "modelopt"}, "modelopt",
    ),
    "EXL2": ({".q_weight": INT32, ".q_scale": INT32}, None, "EXL2"),
    "HQQ": ({".W_q": BYTES}, None, "HQQ"),
    "AQLM": ({".codes": INT8, ".codebooks": ROWS}, None, "AQLM"),
    "Quanto": ({".weight._data": INT8, ".weight._scale": ROWS}, None, "Quanto"),
    "fp8 without scale": ({".weight": FP8}, None, "has no usable scale beside it"),
    "fp8, scale of other size": ({".weight": FP8, ".weight_scale": ("F32", np.ones(3, "<f4"))}, None, "no usable"),
    "fp8, scale of integers": ({".weight": FP8, ".weight_scale": ("I32", np.ones(7, "<i4"))}, None, "no usable"),
    "fp8 with three axes": (
        {".weight": ("F8_E4M3", np.ones((2, 7, 7), "u1")), ".weight_scale": ("F32", np.ones(2, "<f4"))}, None, "usable",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED)
def test_what_cannot_be_read_as_numbers_is_refused_with_the_remedy(case):
    added, settings, phrase = PACKED[case]
    tensors = {name: array for name, array in llama(1).items() if name != f"{LAYER}.weight"}
    tensors |= {LAYER + suffix: array for suffix, array in added.items()}
    write_model(Path("x"), tensors=tensors, settings={"quantization_config": settings} if settings else {})
    assert_refused(mergekit_yaml("r.yml", "out"), 1, "x: ", phrase, LAYER, REMEDY)
    assert not Path("out").exists()


def test_names_that_only_look_packed_are_fine():
    """Floating tensors under such names are nobody's packed integers."""
    names = ["model.layers.0.codes", "model.res_blocks", "model.layers.0.W_q"]
    tensors = {**llama(1), **dict.fromkeys(names, ROWS)}
    write_model(Path("x"), tensors=tensors)
    assert mergekit_yaml("r.yml", "out").code == 0


def test_gguf_is_refused():
    write_model(Path("x"))
    Path("x/model.safetensors").rename("x/model-q4.gguf")
    assert_refused(mergekit_yaml("r.yml", "out"), 1, "x: GGUF files can't be merged", "use the safetensors version")
    assert not Path("out").exists()
