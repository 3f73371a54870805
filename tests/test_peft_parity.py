"""The same as PEFT and bitsandbytes, where they are installed: adapters that PEFT wrote, numbers that both quantise.

    python3 -m venv env && env/bin/pip install -e . pytest peft bitsandbytes accelerate
    env/bin/python -m pytest tests/test_peft_parity.py

Known differences: of the 8-bit codes of double quantisation, bitsandbytes 0.50 on the CPU gets one or two in a thousand
wrong by one step; ours are the nearest. (CUDA has not been compared.)
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mergekit
from files import read_model, to_float
from mergekit.dtypes import BF16, F16, F32
from mergekit.kernels import four_bit
from mergekit.kernels.codec import CODES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="needs peft (and bitsandbytes), which are in an environment of their own")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    import torch
    import transformers
    from bitsandbytes import functional

pytestmark = pytest.mark.filterwarnings("ignore")
DTYPES = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16}
NO_SCALES = np.empty(0, np.float32)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def model(kind: str = "llama", tied: bool = False, **settings: Any) -> Any:
    """A small random model in the folder ``base``."""
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(vocab_size=61, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    else:
        config = transformers.LlamaConfig(
            vocab_size=61, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True, dtype="float32", **settings,
        )  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    made.save_pretrained("base")
    return made


def adapter(made: Any, **settings: Any) -> Any:
    """``made`` with a random adapter, saved in the folder ``adapter``."""
    wrapped = peft.get_peft_model(made, peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 9, **settings}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                # A magnitude has to stay near the length that it was made from.
                parameter.add_(torch.randn_like(parameter) * (0.01 if "magnitude" in name else 0.2))
    wrapped.eval()
    wrapped.save_pretrained("adapter")
    return wrapped


def logits(made: Any) -> torch.Tensor:
    with torch.no_grad():
        return made(torch.arange(40).reshape(2, 20)).logits.double()


CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 6, "model.layers.1.self_attn.v_proj": 2},
        "alpha_pattern": {r".*\.0\.mlp\.down_proj": 3, "q_proj": 5},
    },
    "some layers": {"target_modules": ["k_proj"], "layers_to_transform": [1]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "embeddings, dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "all biases": {"target_modules": ["q_proj", "down_proj"], "bias": "all"},
    "own biases": {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_baked_model_computes_what_peft_computes(case):
    wrapped = adapter(model(), **CASES[case])
    wanted = logits(wrapped)
    mergekit.run_merge({"merge_method": "passthrough", "models": [{"model": "base+adapter"}]}, "out")
    found = logits(transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval())
    assert (found - wanted).norm() / wanted.norm() < 2e-6
    assert (logits(transformers.AutoModelForCausalLM.from_pretrained("base")) - wanted).norm() / wanted.norm() > 1e-3
    merged = {n: p.detach().double().numpy() for n, p in wrapped.merge_and_unload().named_parameters()}
    ours = {name: to_float(array) for name, array in read_model(Path("out")).items()}
    assert ours.keys() == merged.keys()
    for name, value in merged.items():
        assert np.abs(ours[name] - value).max() <= 2e-6 * max(1, np.abs(value).max()), name


@pytest.mark.parametrize("dora", [False, True])
def test_transposed_layers(dora):
    wrapped = adapter(model("gpt2"), target_modules=["c_attn", "c_proj", "c_fc"], use_dora=dora, fan_in_fan_out=True)
    mergekit.run_merge({"merge_method": "passthrough", "models": [{"model": "base+adapter"}]}, "out")
    found = logits(transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval())
    wanted = logits(wrapped)
    assert (found - wanted).norm() / wanted.norm() < 2e-6


@pytest.mark.parametrize("settings", [
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
])  # fmt: skip
def test_tied_heads(settings):
    """The result computes what the wrapped model does, whose two ends PEFT sets apart without saying so."""
    wrapped = adapter(model(tied=True), **settings)
    wanted = logits(wrapped)
    mergekit.run_merge({"merge_method": "passthrough", "models": [{"model": "base+adapter"}]}, "out")
    found = logits(transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval())
    assert (found - wanted).norm() / wanted.norm() < 2e-6


def test_a_resized_vocabulary():
    made = model()
    made.resize_token_embeddings(67)
    wrapped = adapter(made, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    mergekit.run_merge({"merge_method": "passthrough", "models": [{"model": "base+adapter"}]}, "out")
    out = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
    assert out.config.vocab_size == 67
    assert (logits(out) - logits(wrapped)).norm() / logits(wrapped).norm() < 2e-6


# 4 bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(256, 320), (37, 192), (31, 34)])
def test_numbers_are_quantised_bit_for_bit(scheme, dtype, shape):
    weight = torch.randn(shape).to(DTYPES[dtype])
    weight[0, :] = 0
    packed, state = functional.quantize_4bit(weight, quant_type=scheme)
    wanted = functional.dequantize_4bit(packed, state).float().numpy().reshape(-1)
    ours = weight.float().numpy().reshape(-1).copy()
    four_bit.requantize(ours, 64, *four_bit.levels(scheme), NO_SCALES, CODES[dtype])
    assert np.array_equal(ours, wanted)
    unpacked = np.empty(ours.size, np.float32)
    table, scales = state.code.numpy(), state.absmax.numpy()
    four_bit.unpack(packed.numpy().reshape(-1), 0, 64, table, scales, CODES[dtype], unpacked)
    assert np.array_equal(unpacked, wanted)


def test_double_quantisation_is_the_nearest():
    assert np.array_equal(four_bit.dynamic_map(), functional.create_dynamic_map().numpy())
    weight = torch.randn(512, 2048)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    wanted = functional.dequantize_4bit(packed, state).numpy().reshape(-1)
    ours = weight.numpy().reshape(-1).copy()
    scales = np.empty(ours.size // 64, np.float32)
    four_bit.largest(ours, 64, scales)
    four_bit.requantize(ours, 64, *four_bit.levels("nf4"), four_bit.double_quantize(scales), CODES[F32])
    off = np.abs(ours - wanted) > 1e-6
    assert off.mean() < 0.005
    assert np.abs(ours - wanted).max() < 0.05
    rounded = four_bit.double_quantize(scales)
    theirs = functional.dequantize_blockwise(state.absmax, state.state2).numpy() + state.offset.numpy()
    assert np.abs(rounded - scales).mean() <= np.abs(theirs - scales).mean()


SCHEMES = {"nf4": {"bnb_4bit_quant_type": "nf4"}, "fp4": {"bnb_4bit_quant_type": "fp4"},
           "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}  # fmt: skip


def loaded_in_4_bits(scheme: str, dtype: torch.dtype) -> Any:
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **SCHEMES[scheme])
    return transformers.AutoModelForCausalLM.from_pretrained("base", quantization_config=settings, dtype=dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_adapter_on_a_quantised_base(scheme):
    """Logits of the result against those of the quantised base with the adapter, all in float32."""
    model()
    wrapped = adapter(loaded_in_4_bits(scheme, torch.float32), target_modules=["q_proj", "up_proj"])
    wanted = logits(wrapped)
    errors = {}
    for asked in (scheme, "none"):
        recipe = {"merge_method": "passthrough", "models": [{"model": "base+adapter"}], "base_quantization": asked}
        mergekit.run_merge(recipe, "out", overwrite=True)
        found = logits(transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval())
        errors[asked] = float((found - wanted).norm() / wanted.norm())
    assert errors[scheme] < (1e-5 if scheme != "nf4-double" else 2e-3)
    assert errors["none"] > 20 * errors[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_that_bitsandbytes_packed(scheme, dtype):
    """Read from the stored tables: the very numbers that bitsandbytes unpacks, with and without an adapter."""
    model()
    packed = loaded_in_4_bits(scheme, dtype)
    packed.save_pretrained("packed")
    quantised = json.loads(Path("packed/config.json").read_text())["quantization_config"]
    assert quantised["quant_method"] == "bitsandbytes"
    mergekit.run_merge({"merge_method": "passthrough", "models": [{"model": "packed"}]}, "out")
    ours = read_model(Path("out"))
    for name, module in packed.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            wanted = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert np.array_equal(to_float(ours[f"{name}.weight"]), wanted.double().numpy()), name
    if dtype != torch.float32:
        return
    wrapped = adapter(packed, target_modules=["q_proj", "up_proj"], use_dora=True)
    recipe = {"merge_method": "passthrough", "models": [{"model": "packed+adapter"}]}
    mergekit.run_merge(recipe, "baked")
    found = logits(transformers.AutoModelForCausalLM.from_pretrained("baked", dtype=torch.float32).eval())
    wanted = logits(wrapped)
    assert (found - wanted).norm() / wanted.norm() < 1e-5
