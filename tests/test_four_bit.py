"""4-bit quantisation: known codes, oracles in plain NumPy, checkpoints that bitsandbytes packed, hostile tables."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import yaml

import mergekit
from command import assert_refused, mergekit_yaml, warm_up
from command import mergekit as program
from files import Array, config, encode, llama, read_model, to_float, write_model, write_recipe, write_safetensors
from four_bit_files import FP4, NF4, dynamic, quantise, rounded, to_packed
from hub_server import HubServer
from lora_files import MODULES, PREFIX, expected, low_rank, write_adapter
from mergekit.dtypes import BF16, F16, F32
from mergekit.execute import run_threads
from mergekit.kernels import four_bit
from mergekit.kernels.codec import CODES
from models import write_model as write_plain
from test_remote import run
from test_same_bytes import Collect

Q = "model.layers.0.self_attn.q_proj"
LINEAR = tuple(MODULES)
NO_SCALES = np.empty(0, np.float32)


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    warm_up()
    monkeypatch.chdir(tmp_path)


def left(values: Any, scheme: str = "nf4", dtype: Any = F32) -> np.ndarray:
    """What the kernel leaves of ``values``."""
    result = np.array(values, np.float32)
    four_bit.requantize(result, 64, *four_bit.levels(scheme), NO_SCALES, CODES[dtype])
    return result


# The numbers


def test_the_tables_are_those_of_the_paper():
    """NF4: quantiles of the normal distribution on each side of zero, eight above it and seven below, scaled to 1."""
    quantile, outermost = NormalDist().inv_cdf, 0.9677083
    sides = [[quantile(p) for p in np.linspace(outermost, 0.5, n)[:-1]] for n in (9, 8)]
    made = np.sort([0, *sides[0], *(-q for q in sides[1])]) / sides[0][0]
    assert np.abs(made - NF4).max() < 1e-6
    assert np.array_equal(four_bit.levels("nf4")[0], NF4)
    assert np.array_equal(four_bit.levels("fp4")[0], np.unique(FP4))
    assert np.abs(four_bit.dynamic_map() - dynamic()).max() < 1e-7
    assert len(four_bit.dynamic_map()) == len(dynamic()) == 256


def test_known_codes():
    """A block with 1 in it: each level stays, and what lies between two goes to the nearer."""
    assert np.array_equal(left(NF4), NF4)
    assert left([1, 0.04, 0.039, -0.0455, -0.046, 0.9, 0.8]).tolist() == [
        1, NF4[8], 0, 0, NF4[6], 1, NF4[14],
    ]  # fmt: skip
    assert np.array_equal(left(FP4, "fp4"), FP4)
    assert np.allclose(left([-12, 5.1, 0.04, 0.03, 11, 9.9], "fp4"), [-12, 6, 0.0625, 0, 12, 8])


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_a_number_in_the_middle_goes_down(scheme):
    """As torch.bucketize does, with which bitsandbytes rounds."""
    table, bounds = four_bit.levels(scheme)
    found = left([1, *bounds], scheme)[1:]
    assert np.array_equal(found, table[:-1])
    assert np.array_equal(left([1, *np.nextafter(bounds, np.float32(2))], scheme)[1:], table[1:])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_properties(scheme, dtype):
    """At most 16 numbers a block; the largest stays; nothing moves further than half the widest gap; once is enough."""
    values = np.random.default_rng(3).standard_normal(64 * 50 + 17).astype(np.float32)
    once = left(values, scheme, dtype)
    widest = {"nf4": 0.152, "fp4": 0.167}[scheme]
    for start in range(0, len(values), 64):
        block, result = values[start : start + 64], once[start : start + 64]
        assert len(np.unique(result)) <= 16
        largest = np.abs(block).argmax()
        assert result[largest] == rounded(block[largest : largest + 1], dtype.code)[0]
        assert np.abs(result - block).max() <= (widest + 0.004) * np.abs(block).max()
    if dtype == F32:
        assert np.array_equal(left(once, scheme), once)


def test_zeros_and_numbers_that_are_none():
    assert not left(np.zeros(70)).any()
    assert np.isnan(left([0, np.nan, 1])[1])
    assert not np.isfinite(left([np.inf, 1, 0])).all()
    assert not np.isfinite(four_bit.double_quantize(np.array([np.inf, 1, 2], np.float32))).all()
    assert left([1e-45, 0]).tolist() == [0, 0]  # below what a scale can be divided by


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [64, 1, 63, 65, 64 * 7 + 5])
def test_against_the_oracle(scheme, size):
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    assert np.array_equal(left(values, scheme), quantise(values, scheme)[2])


# Under an adapter


def base_and_adapter(code: str = "F32", dtype: str = "float32", **changes: Any) -> dict[str, Array]:
    tensors = llama(1, code=code)
    write_model(Path("base"), tensors=tensors, settings={"torch_dtype": dtype})
    write_adapter(Path("adapter"), low_rank(2), **changes)
    return tensors


def baked(quantised: str, **keys: Any) -> dict[str, np.ndarray]:
    recipe = {"merge_method": "passthrough", "models": [{"model": "base+adapter"}], "base_quantization": quantised}
    mergekit.run_merge({**recipe, **keys}, "out", overwrite=True)
    return {name: to_float(array) for name, array in read_model(Path("out")).items()}


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double", "fp4"])
@pytest.mark.parametrize(("code", "dtype"), [("F32", "float32"), ("BF16", "bfloat16"), ("F32", "bfloat16"),
                                             ("F32", "float16")])  # fmt: skip
def test_linear_layers_are_quantised_in_the_type_they_are_loaded_in(scheme, code, dtype):
    tensors = base_and_adapter(code, dtype)
    load = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    below = dict(tensors)
    for name, array in tensors.items():
        if any(module in name for module in LINEAR):
            values = rounded(to_float(array).astype(np.float32), load)
            below[name] = ("F32", quantise(values, scheme, code=load)[2])
    wanted = expected(below, low_rank(2), 2.0)
    found = baked(scheme, dtype="float32")
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() < 2e-6 * max(1, np.abs(value).max()), name
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert np.array_equal(found[name], to_float(tensors[name]))


def test_layers_without_an_adapter_are_quantised_too():
    tensors = llama(1, code="F32")
    write_model(Path("base"), tensors=tensors, settings={"torch_dtype": "float32"})
    write_adapter(Path("adapter"), low_rank(2, {"mlp.up_proj": MODULES["mlp.up_proj"]}))
    found = baked("nf4")
    assert np.array_equal(found[f"{Q}.weight"], quantise(tensors[f"{Q}.weight"][1])[2])


def test_double_quantisation_of_many_blocks():
    """More than 256 scales, so that the scales of scales differ; and blocks that don't start where a read does."""
    random = np.random.default_rng(0)
    values = random.standard_normal((223, 127)).astype(np.float32) * np.linspace(1, 3, 223, dtype=np.float32)[:, None]
    write_plain(Path("base"), {"layers.0.w.weight": values}, torch_dtype="float32")
    a, b = encode("F32", np.zeros((1, 127))), encode("F32", np.zeros((223, 1)))
    name = f"{PREFIX}layers.0.w.lora_"
    write_adapter(Path("adapter"), {f"{name}A.weight": a, f"{name}B.weight": b}, r=1)
    recipe = {"merge_method": "passthrough", "models": [{"model": "base+adapter"}], "base_quantization": "nf4-double"}
    plan = mergekit.plan(recipe)
    sink = Collect(plan)
    run_threads(plan, sink, threads=2, block=4096)
    found = np.frombuffer(sink.data["layers.0.w.weight"], np.float32).reshape(values.shape)
    wanted = quantise(values, "nf4-double")[2]
    # A scale that lies within a rounding of the middle between two codes may go either way.
    assert (np.abs(found - wanted) > 1e-6).mean() < 0.01
    assert np.abs(found - wanted).max() < 0.02


def test_other_models_of_a_recipe_are_left_alone():
    tensors = base_and_adapter()
    recipe = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("base+adapter", 0), ("base", 1))],
        "base_quantization": "nf4",
    }
    mergekit.run_merge(recipe, "out")
    for name, array in read_model(Path("out")).items():
        assert np.array_equal(array[1], tensors[name][1]), name


def test_saved_modules_are_not_quantised():
    write_model(Path("base"), 1, code="F32", settings={"torch_dtype": "float32"})
    saved = encode("F32", np.random.default_rng(0).standard_normal((7, 7)))
    write_adapter(Path("adapter"), {f"{PREFIX}{Q}.modules_to_save.default.weight": saved}, modules_to_save=["q_proj"])
    assert np.array_equal(baked("nf4")[f"{Q}.weight"], saved[1])


def test_when_the_base_is_quantised_without_being_asked():
    base_and_adapter(base_model_name_or_path="unsloth/base-bnb-4bit")
    recipe = {"merge_method": "passthrough", "models": [{"model": "base+adapter"}]}
    (note,) = mergekit.plan(recipe).notes
    assert "'unsloth/base-bnb-4bit', which is quantised; 'base_quantization: nf4-double'" in note
    (note,) = mergekit.plan({**recipe, "base_quantization": "auto"}).notes
    assert "quantised as nf4-double" in note
    auto = baked("auto")
    assert all(np.array_equal(value, auto[name]) for name, value in baked("nf4-double").items())
    base_and_adapter()
    for asked in ("none", "auto"):
        assert mergekit.plan({**recipe, "base_quantization": asked}).notes == ()


def test_what_is_refused_in_recipes():
    base_and_adapter()
    text = "merge_method: passthrough\nmodels: [{model: base+adapter}]\n"
    write_recipe(Path("r.yml"), f"{text}base_quantization: int4")
    assert_refused(
        mergekit_yaml("r.yml", "out"), 2, "r.yml:3:1: no quantisation 'int4'", "none, nf4, nf4-double, fp4, auto"
    )
    write_recipe(Path("r.yml"), f"{text}base_quantization: nf4")
    write_model(
        Path("base"), tensors={**llama(1), "model.layers.0.mlp.experts.0.w1.weight": encode("F32", np.ones((5, 5)))}
    )
    assert_refused(mergekit_yaml("r.yml", "out"), 2, "r.yml:2:11: ", "quantising experts", "not built")
    write_model(Path("base"), 1, settings={"model_type": "gpt2"})
    assert_refused(mergekit_yaml("r.yml", "out"), 2, "transposed layers of 'gpt2'")


# Packed checkpoints


def packed_model(folder: str = "base", **form: Any) -> dict[str, np.ndarray]:
    """A Llama whose linear layers are packed; its values."""
    tensors: dict[str, Array] = {}
    values = {}
    for name, array in llama(1).items():
        values[name] = to_float(array)
        if any(module in name for module in LINEAR):
            added, values[name] = to_packed(name, values[name].astype(np.float32), **form)
            tensors |= added
        else:
            tensors[name] = array
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": form.get("scheme", "nf4")}
    write_model(Path(folder), tensors=tensors, settings={"quantization_config": quantised})
    return values


FORMS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4": {"scheme": "fp4"},
    "double": {"nested": True},
    "float16": {"code": "F16"},
    "float32, wide blocks": {"code": "F32", "block": 128},
    "small blocks": {"block": 32, "nested": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_packed_checkpoints_are_read_through_their_tables(form):
    values = packed_model(**FORMS[form])
    recipe = {"merge_method": "passthrough", "models": [{"model": "base"}]}
    plan = mergekit.plan(recipe)
    assert plan.left_out == ()
    mergekit.run_merge(recipe, "out")
    found = read_model(Path("out"))
    assert sorted(found) == sorted(values)
    for name, value in values.items():
        assert np.array_equal(to_float(found[name]), value), name
    codes = {found[f"{Q}.weight"][0], found["model.norm.weight"][0]}
    assert codes == {FORMS[form].get("code", "BF16"), "BF16"}
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())


def test_packed_as_another_type_and_in_pickles():
    """``quant_storage``: the same bytes, declared as bfloat16."""
    random = np.random.default_rng(0)
    tensors, values = to_packed("w.weight", random.standard_normal((34, 6)).astype("f4"), code="F32", storage="BF16")
    write_model(Path("base"), tensors=tensors)
    recipe = {"merge_method": "passthrough", "models": [{"model": "base"}]}
    mergekit.run_merge(recipe, "out")
    assert np.array_equal(read_model(Path("out"))["w.weight"][1], values)
    import torch

    Path("base/model.safetensors").unlink()
    state = {n: torch.from_numpy(np.array(raw)) for n, (code, raw) in tensors.items() if code != "BF16"}
    state["w.weight"] = torch.from_numpy(tensors["w.weight"][1].astype("<i2")).view(torch.bfloat16)
    torch.save(state, "base/pytorch_model.bin")
    mergekit.run_merge(recipe, "again")
    assert np.array_equal(read_model(Path("again"))["w.weight"][1], values)


def test_packed_models_merge_with_others():
    values = packed_model("packed", nested=True)
    other = llama(2, code="F32")
    write_model(Path("other"), tensors=other)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("other", "packed")],
    }
    mergekit.run_merge(recipe, "out")
    for name, array in read_model(Path("out")).items():
        wanted = (to_float(other[name]) + values[name]) / 2
        assert np.allclose(to_float(array), wanted, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("asked", ["none", "auto", "nf4"])
def test_an_adapter_on_a_packed_base_goes_onto_its_own_numbers(asked):
    values = packed_model(nested=True)
    added = low_rank(2)
    write_adapter(Path("adapter"), added, base_model_name_or_path="org/base-bnb-4bit")
    recipe = {"merge_method": "passthrough", "models": [{"model": "base+adapter"}], "base_quantization": asked}
    notes = mergekit.plan(recipe).notes
    assert [("its own tables are used, not 'nf4'" in note) for note in notes] == ([True] if asked == "nf4" else [])
    wanted = expected({name: ("F32", value.astype("f4")) for name, value in values.items()}, added, 2.0)
    found = baked(asked, dtype="float32")
    for name, value in wanted.items():
        assert np.allclose(found[name], value, rtol=0, atol=2e-6 * max(1, np.abs(value).max())), name


def test_slices_of_a_packed_model():
    values = packed_model()
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "base", "layer_range": r}]} for r in ([2, 3], [0, 2])],
    }
    mergekit.run_merge(recipe, "out")
    found = read_model(Path("out"))
    assert np.array_equal(to_float(found[f"{Q}.weight"]), values[f"{Q.replace('.0.', '.2.')}.weight"])


# Hostile tables

STATE = "x.weight.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> dict[str, Array | None]:
    text = to_packed("x.weight", np.ones((16, 8), "f4"), nested=True, **changes)[0][STATE]
    return {STATE: text}


HOSTILE: dict[str, tuple[Mapping[str, Array | None], str]] = {
    "no description": ({STATE: ("U8", np.frombuffer(b"zzz", "u1"))}, "a description that is no JSON object"),
    "a list": ({STATE: ("U8", np.frombuffer(b"[1]", "u1"))}, "no JSON object"),
    "nested deeply": ({STATE: ("U8", np.frombuffer(b"[" * 60000, "u1"))}, "no JSON object"),
    "a long description": ({STATE: ("U8", np.zeros(1 << 17, "u1"))}, "131072 bytes of description"),
    "an unknown scheme": ({STATE: None, STATE[:-3] + "nf5": ("U8", np.frombuffer(b"{}", "u1"))}, "'nf5'"),
    "no weight": ({"x.weight": None}, "has no 'x.weight'"),
    "no scales": ({"x.weight.absmax": None}, "has no 'x.weight.absmax'"),
    "no numbers": ({"x.weight.quant_map": None}, "has no 'x.weight.quant_map'"),
    "a huge shape": (state(shape=[1 << 40, 1 << 40]), "bytes of codes, but 'x.weight' is [64, 1] uint8"),
    "a negative shape": (state(shape=[-16, -8]), "has the shape [-16, -8]"),
    "a shape of text": (state(shape="16"), "has the shape '16'"),
    "no shape": (state(shape=None), "has the shape None"),
    "a scalar": (state(shape=[]), "has the shape []"),
    "a block of 7": (state(blocksize=7), "blocks of 7"),
    "a block of 0": (state(blocksize=0), "blocks of 0"),
    "a dtype of integers": (state(dtype="int8"), "unknown dtype 'int8'"),
    "a dtype of numbers": (state(dtype=3), "unknown dtype 3"),
    "outer blocks of 0": (state(nested_blocksize=0), "nested_blocksize of 0"),
    "outer blocks without end": (state(nested_blocksize=10**30), "nested_blocksize of 1000"),
    "an infinite offset": (state(nested_offset=float("inf")), "nested_offset of inf"),
    "few codes": ({"x.weight": ("U8", np.zeros((63, 1), "u1"))}, "needs 64 bytes of codes"),
    "few scales": ({"x.weight.absmax": ("U8", np.zeros(1, "u1"))}, "needs 2 scales"),
    "scales of integers": ({"x.weight.absmax": ("I32", np.zeros(2, "<i4"))}, "scales of type int32"),
    "few numbers": ({"x.weight.quant_map": encode("F32", np.zeros(15))}, "needs 16 numbers"),
    "numbers of integers": ({"x.weight.quant_map": ("U8", np.zeros(16, "u1"))}, "needs 16 numbers"),
    "no outer scales": ({"x.weight.nested_absmax": None}, "without the tables"),
    "few outer scales": ({"x.weight.nested_absmax": encode("F32", np.zeros(2))}, "needs 1 scales of its scales"),
    "few outer numbers": ({"x.weight.nested_quant_map": encode("F32", np.zeros(9))}, "needs 256 numbers"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_tables_that_do_not_fit_are_refused(case):
    changes, phrase = HOSTILE[case]
    tensors = {**to_packed("x.weight", np.ones((16, 8), "f4"), nested=True)[0], **changes}
    Path("base").mkdir()
    Path("base/config.json").write_text(json.dumps(config()))
    write_safetensors(Path("base/model.safetensors"), {n: a for n, a in tensors.items() if a is not None})
    write_recipe(Path("r.yml"), "merge_method: passthrough\nmodels: [{model: base}]")
    assert_refused(mergekit_yaml("r.yml", "out"), 1, "base: tensor 'x.weight", phrase)
    assert not Path("out").exists()


# From a hub


def test_a_packed_model_and_an_adapter_on_a_hub(tmp_path):
    """Planned from headers and descriptions, merged, and offered with both names in the card."""
    random = np.random.default_rng(0)
    values = random.standard_normal((1021, 509)).astype("f4")
    tensors, _ = to_packed("layers.0.w.weight", values[:8], nested=True)
    codes = np.resize(tensors["layers.0.w.weight"][1], (-(-values.size // 2), 1))
    tensors["layers.0.w.weight"] = ("U8", codes)
    blocks = -(-values.size // 64)
    tensors["layers.0.w.weight.absmax"] = ("U8", random.integers(0, 256, blocks).astype("u1"))
    tensors["layers.0.w.weight.nested_absmax"] = encode("F32", np.ones(-(-blocks // 256)))
    text = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [1021, 509],
                       "nested_blocksize": 256, "nested_offset": 1.5}).encode()  # fmt: skip
    tensors["layers.0.w.weight.quant_state.bitsandbytes__nf4"] = ("U8", np.frombuffer(text, "u1"))
    write_model(Path("packed"), tensors=tensors, settings={"model_type": "test", "architectures": ["Test"]})
    a, b = encode("F32", random.standard_normal((8, 509))), encode("F32", random.standard_normal((1021, 8)))
    name = f"{PREFIX}layers.0.w.lora_"
    write_adapter(Path("adapter"), {f"{name}A.weight": a, f"{name}B.weight": b}, r=8)
    write_recipe(Path("r.yml"), "merge_method: passthrough\nmodels: [{model: org/packed+org/adapter@main}]")
    with HubServer({"org/packed": Path("packed"), "org/adapter": Path("adapter")}) as server:
        env = {**os.environ, **server.environment(tmp_path / "home")}
        done = run("plan", "r.yml", "--json", env=env)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["tensors"][0]["action"] == "dequantize, bake"
        assert server.sent("resolve") < 20_000
        done = run("merge", "r.yml", "out", env=env)
        assert done.returncode == 0, done.stderr
    write_recipe(Path("r.yml"), "merge_method: passthrough\nmodels: [{model: packed+adapter}]")
    assert mergekit_yaml("r.yml", "local").code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("local/model.safetensors").read_bytes()
    card = Path("out/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["org/packed", "org/adapter"]
    assert re.search(r"\| \[org/packed\]\(https://huggingface.co/org/packed/tree/\w{40}\)\+org/adapter \|", card)


def test_bake_takes_the_quantisation_as_an_option():
    tensors = base_and_adapter()
    result = program("lora", "bake", "base", "adapter", "out", "--base-quantization", "nf4", "--quiet")
    assert result.code == 0, result.err
    wanted = lora_on_nf4(tensors)
    assert np.allclose(to_float(read_model(Path("out"))[f"{Q}.weight"]), wanted, rtol=0, atol=1e-5)


def lora_on_nf4(tensors: Mapping[str, Array]) -> np.ndarray:
    below = {f"{Q}.weight": ("F32", quantise(tensors[f"{Q}.weight"][1])[2])}
    return expected(below, low_rank(2), 2.0)[f"{Q}.weight"]
