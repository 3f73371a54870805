"""The phi3moe code that goes into output folders, beside the dense Phi-3 of the installed transformers (4.48 to 5).

This file also runs in environments with other versions of transformers: ``pytest tests/test_phi3moe.py``.
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.phi3 import Phi3ForCausalLM

import mergekit

CODE = Path(mergekit.__file__).parent / "moe" / "phi3moe"
CODE_FILES = ("configuration_phi3_moe.py", "modeling_phi3_moe.py")
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # waking a second thread takes longer than these sums

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, EXPERTS, ORIGINAL = 61, 48, 29, 2, 5, 17
COMMON = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
    "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 67, "original_max_position_embeddings": 67, "rope_theta": 10000.0, "rope_scaling": None,
    "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "torch_dtype": "float32",
}  # fmt: skip


def longrope(num_factors: int) -> dict[str, Any]:
    """Keys of a model trained to ``ORIGINAL`` tokens and stretched."""
    scaling = {
        "type": "longrope",
        "short_factor": [1 + 0.07 * i for i in range(num_factors)],
        "long_factor": [1.3 + 1.1 * i for i in range(num_factors)],
    }
    return {"rope_scaling": scaling, "original_max_position_embeddings": ORIGINAL}


FAMILIES: dict[str, dict[str, Any]] = {
    "mini-4k": {"sliding_window": 7},
    "mini-128k": longrope(8),
    "medium": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "phi-4": {"num_key_value_heads": 1, "rope_theta": 250000.0},
    "phi-4-mini": {
        **longrope(6), "num_key_value_heads": 1, "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Transformers copies a model's code into a folder of its own and imports it there: here not the user's folder."""

    def forget() -> None:
        for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        forget()
        yield
        forget()


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    if family == "phi-4-mini" and VERSION < (4, 49):
        pytest.skip("Phi-3 of this transformers has no partial rotary embedding")
    return {**COMMON, **FAMILIES[family], **changes}


def matrices(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Random matrices that keep the size of what they multiply; vectors near one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        made[name] = 1 + 0.1 * values if len(shape) == 1 else values / math.sqrt(shape[1])
    return made


def trunk(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a model but those of its MLPs."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = HIDDEN // heads
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.input_layernorm.weight": (HIDDEN,),
            f"model.layers.{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"model.layers.{layer}.self_attn.qkv_proj.weight": (size * (heads + 2 * groups), HIDDEN),
            f"model.layers.{layer}.self_attn.o_proj.weight": (HIDDEN, size * heads),
        }
    embedding = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(7)) / 4
    return {"model.embed_tokens.weight": embedding, **matrices(shapes, 0)}


def mlp(layer: int, seed: int) -> dict[str, torch.Tensor]:
    shapes = {"gate_up_proj.weight": (2 * INTERMEDIATE, HIDDEN), "down_proj.weight": (HIDDEN, INTERMEDIATE)}
    return matrices(shapes, 1000 * seed + layer + 1)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_dense(folder: Path, config: dict[str, Any], seed: int = 0, **tensors: torch.Tensor) -> Path:
    """A dense Phi-3 whose MLPs come from ``seed``."""
    made = trunk(config) | tensors
    for layer in range(LAYERS):
        made |= {f"model.layers.{layer}.mlp.{name}": value for name, value in mlp(layer, seed).items()}
    return write(folder, {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **config}, made)


def write_mixture(
    folder: Path, config: dict[str, Any], seeds: Sequence[int] = (0,) * EXPERTS, **tensors: torch.Tensor
) -> Path:
    """A phi3moe as mergekit writes it; expert e's MLPs come from ``seeds[e]``. ``tensors`` replace made ones."""
    made = trunk(config)
    for layer in range(LAYERS):
        place = f"model.layers.{layer}.mlp"
        made |= matrices({f"{place}.gate.weight": (len(seeds), HIDDEN)}, 100 + layer)
        for expert, seed in enumerate(seeds):
            made |= {f"{place}.experts.{expert}.{name}": value for name, value in mlp(layer, seed).items()}
    described = {
        "architectures": ["Phi3MoEForCausalLM"],
        "model_type": "phi3moe",
        "auto_map": {
            "AutoConfig": "configuration_phi3_moe.Phi3MoEConfig",
            "AutoModel": "modeling_phi3_moe.Phi3MoEModel",
            "AutoModelForCausalLM": "modeling_phi3_moe.Phi3MoEForCausalLM",
        },
        "num_local_experts": len(seeds),
        "num_experts_per_tok": 2,
        **config,
    }
    write(folder, described, made | tensors)
    for name in CODE_FILES:
        shutil.copy(CODE / name, folder)
    return folder


def load(folder: Path, auto: Any = AutoModelForCausalLM, **arguments: Any) -> Any:
    return auto.from_pretrained(folder, trust_remote_code=True, **arguments).eval()


def mixture(folder: Path, family: str = "medium", seeds: Sequence[int] = range(EXPERTS), **changes: Any) -> Any:
    """A loaded phi3moe with five different experts."""
    return load(write_mixture(folder / "moe", config_of(family, **changes), seeds))


def pair(folder: Path, family: str, **arguments: Any) -> tuple[Any, Any]:
    """A loaded dense model, and a mixture of its MLPs."""
    config = config_of(family)
    dense = load(write_dense(folder / "dense", config), **arguments)
    assert type(dense) is Phi3ForCausalLM
    return dense, load(write_mixture(folder / "moe", config), **arguments)


def tokens(length: int, batch: int = 2, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded() -> dict[str, torch.Tensor]:
    ids = tokens(11, batch=3)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 3, 6)):
        mask[row, :pads] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


# ------------------------------------------------------------------------------------------- the dense model's outputs


@pytest.mark.parametrize("length", [11, 23])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_equal_experts_is_the_dense_model(tmp_path, family, length):
    dense, moe = pair(tmp_path, family)
    assert type(moe).__name__ == "Phi3MoEForCausalLM"
    ids = tokens(length)
    expected = logits(dense, ids)
    assert expected.abs().max() > 1
    assert difference(logits(moe, ids), expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mini-4k", {"sliding_window": None}),
        ("mini-128k", {"rope_scaling": None}),
        ("mini-128k", {"original_max_position_embeddings": 31}),
        ("phi-4", {"rope_theta": 10000.0}),
        ("phi-4-mini", {"rope_scaling": None}),
        ("phi-4-mini", {"rope_scaling": None, "partial_rotary_factor": 1.0}),
    ],
)
def test_the_keys_of_the_family_are_in_use(tmp_path, family, change):
    moe = mixture(tmp_path / "a", family)
    changed = mixture(tmp_path / "b", family, **change)
    assert difference(logits(moe, tokens(23)), logits(changed, tokens(23))) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_text_is_the_dense_models(tmp_path, family):
    # From 13 tokens to 24, past the sliding window and past the length at which the rotary factors change.
    dense, moe = pair(tmp_path, family)
    arguments = {"max_new_tokens": 11, "min_new_tokens": 11, "do_sample": False}
    for inputs in ({"input_ids": tokens(13), "attention_mask": torch.ones(2, 13, dtype=torch.long)}, left_padded()):
        expected = dense.generate(**inputs, **arguments)
        assert expected.shape[1] == inputs["input_ids"].shape[1] + 11
        assert torch.equal(moe.generate(**inputs, **arguments), expected)


def test_padding_on_the_left_does_not_matter(tmp_path):
    moe = mixture(tmp_path)
    inputs = left_padded()
    together = moe.generate(**inputs, max_new_tokens=7, min_new_tokens=7, do_sample=False)
    for row, mask, ids in zip(together, inputs["attention_mask"], inputs["input_ids"], strict=True):
        alone = ids[mask.bool()][None]
        text = moe.generate(
            alone, attention_mask=torch.ones_like(alone), max_new_tokens=7, min_new_tokens=7, do_sample=False
        )
        assert torch.equal(text[0, -7:], row[-7:])


@pytest.mark.parametrize("per_token", [1, 2])
def test_a_router_with_one_answer_gives_that_expert(tmp_path, per_token):
    """The first hidden channel is kept at one, and the gate reads nothing else."""
    config = config_of("medium")
    fixed = trunk(config)
    fixed["model.embed_tokens.weight"][:, 0] = 1.0
    for layer in range(LAYERS):
        fixed[f"model.layers.{layer}.self_attn.o_proj.weight"][0] = 0.0
    fixed = {name: value for name, value in fixed.items() if "embed" in name or "o_proj" in name}

    def without_first_row(folder: Path) -> Path:
        stored = load_file(folder / "model.safetensors")
        for name, value in stored.items():
            if "down_proj" in name:
                value[0] = 0.0
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    for expert in (0, 3):
        gate = torch.zeros(EXPERTS, HIDDEN)
        gate[expert, 0] = 10000.0
        gates = {f"model.layers.{layer}.mlp.gate.weight": gate.clone() for layer in range(LAYERS)}
        dense = load(without_first_row(write_dense(tmp_path / f"dense{expert}", config, seed=expert, **fixed)))
        mixed = write_mixture(
            tmp_path / f"moe{expert}",
            {**config, "num_experts_per_tok": per_token},
            range(EXPERTS),
            **fixed,
            **gates,
        )
        moe = load(without_first_row(mixed))
        assert difference(logits(moe, tokens(13)), logits(dense, tokens(13))) == 0.0


def test_the_block_against_a_loop(tmp_path):
    block = mixture(tmp_path).model.layers[1].mlp
    hidden = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = block(hidden).reshape(-1, HIDDEN)
        for token, result in zip(hidden.reshape(-1, HIDDEN), out, strict=True):
            scores = np.exp((block.gate.weight @ token).double().numpy())
            best = np.argsort(-scores)[:2]
            expected = sum(scores[e] / scores[best].sum() * block.experts[e](token[None])[0].numpy() for e in best)
            np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_experts_agree_exactly_in_bfloat16(tmp_path, family):
    dense, moe = pair(tmp_path, family, torch_dtype=torch.bfloat16)
    assert next(moe.parameters()).dtype == torch.bfloat16
    assert difference(logits(moe, tokens(23)), logits(dense, tokens(23))) == 0.0


# -------------------------------------------------------------------------------------------------- loading and saving


@pytest.mark.parametrize("family", ["medium", "mini-128k", "phi-4-mini"])
def test_saving_keeps_names_values_and_code(tmp_path, family):
    moe = mixture(tmp_path, family)
    moe.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("moe", "again"))
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in CODE_FILES:
        assert (tmp_path / "again" / name).read_bytes() == (CODE / name).read_bytes()
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    again = load(tmp_path / "again")
    assert difference(logits(again, tokens(23)), logits(moe, tokens(23))) == 0.0
    if family == "phi-4-mini":
        assert "lm_head.weight" not in after
        assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_as_transformers_5_saves_it_means_the_same_everywhere(tmp_path, family):
    config = config_of(family)
    scaling = config.pop("rope_scaling") or {"type": "default"}
    rope = {"rope_type": scaling["type"], "rope_theta": config.pop("rope_theta"), **scaling}
    rope["partial_rotary_factor"] = config.pop("partial_rotary_factor", 1.0)
    config["rope_parameters"] = rope | {"original_max_position_embeddings": config["original_max_position_embeddings"]}
    saved = load(write_mixture(tmp_path / "saved", config, range(EXPERTS)))
    written = mixture(tmp_path, family)
    for length in (11, 23):
        assert difference(logits(saved, tokens(length)), logits(written, tokens(length))) == 0.0


def test_the_bare_model(tmp_path):
    moe = mixture(tmp_path)
    bare = load(tmp_path / "moe", AutoModel)
    assert type(bare).__name__ == "Phi3MoEModel"
    with torch.no_grad():
        hidden = moe(tokens(13), output_hidden_states=True).hidden_states
        assert difference(bare(tokens(13)).last_hidden_state, hidden[-1]) == 0.0


@pytest.mark.parametrize("trust", [None, False])
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel, AutoConfig])
def test_without_trust_loading_is_refused(tmp_path, monkeypatch, auto, trust):
    monkeypatch.setattr("sys.stdin", io.StringIO())  # left to itself, transformers asks
    folder = write_mixture(tmp_path / "moe", config_of("medium"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        auto.from_pretrained(folder, trust_remote_code=trust)


def test_a_folder_that_lost_its_code_is_refused(tmp_path):
    folder = write_mixture(tmp_path / "moe", config_of("medium", auto_map={}))
    with pytest.raises(ValueError, match="phi3moe"):
        load(folder)


@pytest.mark.parametrize("per_token", [0, EXPERTS + 1])
def test_too_few_or_too_many_experts_per_token(tmp_path, per_token):
    folder = write_mixture(tmp_path / "moe", config_of("medium", num_experts_per_tok=per_token))
    with pytest.raises(ValueError, match="num_local_experts = 5"):
        load(folder)


@pytest.mark.parametrize("name", CODE_FILES)
def test_the_code_needs_nothing_of_mergekit(name):
    assert not re.search(r"^\s*(from|import) mergekit", (CODE / name).read_text(), re.MULTILINE)


def test_no_dense_layers_are_made(tmp_path, monkeypatch):
    moe = mixture(tmp_path)
    layer = type(moe.model.layers[0]).__mro__[1]
    made = []
    original = layer.__init__
    monkeypatch.setattr(layer, "__init__", lambda self, *args: made.append(type(self)) or original(self, *args))
    type(moe)(moe.config)
    assert made == [type(moe.model.layers[0])] * LAYERS
    assert moe.config.num_hidden_layers == LAYERS


# ------------------------------------------------------------------------------------------------------------- outputs


def test_outputs_as_tuple_and_by_name(tmp_path):
    moe = load(write_mixture(tmp_path / "moe", config_of("medium")), attn_implementation="eager")
    wanted = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    with torch.no_grad():
        named = moe(tokens(13), labels=tokens(13), **wanted)
        plain = moe(tokens(13), labels=tokens(13), return_dict=False, **wanted)
    assert isinstance(plain, tuple)
    assert len(plain) == len(named.to_tuple())
    assert torch.equal(plain[0], named.loss)
    assert torch.equal(plain[1], named.aux_loss)
    assert torch.equal(plain[2], named.logits)
    assert [h.shape for h in named.hidden_states] == [(2, 13, HIDDEN)] * (LAYERS + 1)
    assert [a.shape for a in named.attentions] == [(2, 6, 13, 13)] * LAYERS
    assert [r.shape for r in named.router_logits] == [(26, EXPERTS)] * LAYERS


def test_routers_are_recorded_only_on_request(tmp_path):
    moe = mixture(tmp_path)
    with torch.no_grad():
        recorded = moe(tokens(13), output_router_logits=True).router_logits
        moe.config.output_router_logits = True
        by_config = moe(tokens(13)).router_logits
        assert moe(tokens(13), output_router_logits=False).router_logits is None
        assert moe(tokens(13), output_router_logits=False).aux_loss is None
    assert all(torch.equal(one, other) for one, other in zip(recorded, by_config, strict=True))


# ------------------------------------------------------------------------------------------------------------ training


def balance(router_logits: Sequence[torch.Tensor], per_token: int, mask: torch.Tensor | None) -> float:
    """Token by token, from equations 4 to 6 of the Switch Transformer paper, over all layers together."""
    assigned, probability, num_tokens = np.zeros(EXPERTS), np.zeros(EXPERTS), 0
    for layer in router_logits:
        for row, scores in enumerate(layer.double().numpy()):
            if mask is not None and not mask.reshape(-1)[row]:
                continue
            shares = np.exp(scores) / np.exp(scores).sum()
            assigned[np.argsort(-shares)[:per_token]] += 1
            probability += shares
            num_tokens += 1
    return EXPERTS * float((assigned / num_tokens) @ (probability / num_tokens))


@pytest.mark.parametrize("per_token", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_load_balancing_loss(tmp_path, masked, per_token):
    moe = mixture(tmp_path, num_experts_per_tok=per_token, router_aux_loss_coef=0.37)
    inputs = left_padded()
    mask = inputs["attention_mask"] if masked else None
    labels = inputs["input_ids"]
    with torch.no_grad():
        out = moe(inputs["input_ids"], mask, labels=labels, output_router_logits=True)
        plain = moe(inputs["input_ids"], attention_mask=mask, labels=labels).loss
    expected = balance(out.router_logits, per_token, mask)
    assert out.aux_loss.item() == pytest.approx(expected, rel=1e-6)
    assert out.loss.item() == pytest.approx(plain.item() + 0.37 * expected, rel=1e-6)


def test_the_load_balancing_loss_of_even_and_uneven_routers(tmp_path):
    loss = sys.modules[type(mixture(tmp_path)).__module__].load_balancing_loss
    even = torch.eye(EXPERTS).repeat(3, 1)
    assert loss([even], 1).item() == pytest.approx(1.0)
    one_sided = torch.tensor([[100.0, 0, 0, 0, 0]]).repeat(11, 1)
    assert loss([one_sided, one_sided], 1).item() == pytest.approx(EXPERTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # counts of tokens beyond 256 survive
        assert loss([torch.eye(EXPERTS).repeat(211, 1)], 1).item() == pytest.approx(1.0)


def test_generation_with_recorded_routers(tmp_path):
    moe = mixture(tmp_path)
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = moe.generate(**left_padded(), **arguments)
    moe.config.output_router_logits = True
    assert torch.equal(moe.generate(**left_padded(), **arguments), expected)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(tokens(11), labels=tokens(11), output_router_logits=True).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_two_experts_per_token_train_the_router(tmp_path):
    moe = mixture(tmp_path, router_aux_loss_coef=0.0)
    found = gradients(moe)
    for layer in range(LAYERS):
        assert found[f"model.layers.{layer}.mlp.gate.weight"].abs().max() > 1e-4


def test_idle_experts_have_a_gradient_of_zero(tmp_path):
    moe = mixture(tmp_path, num_experts_per_tok=1)
    moe.model.layers[0].mlp.gate.weight.data.zero_()  # a tie: the same expert for every token
    found = gradients(moe)
    sizes = [found[f"model.layers.0.mlp.experts.{e}.down_proj.weight"].abs().max().item() for e in range(EXPERTS)]
    assert sum(size > 0 for size in sizes) == 1


@pytest.mark.parametrize("arguments", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("method", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_checkpointing_keeps_all_gradients(tmp_path, monkeypatch, method, arguments):
    moe = mixture(tmp_path, router_aux_loss_coef=1.0)
    if not hasattr(moe, method):
        pytest.skip(f"this transformers has no {method}")
    expected = gradients(moe)
    getattr(moe, method)(arguments)
    block, calls = type(moe.model.layers[0].mlp), []
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    found = gradients(moe)
    assert len(calls) == 2 * LAYERS  # each layer is computed again on the way back
    for name, gradient in expected.items():
        assert difference(found[name], gradient) < 1e-6, name


def test_lora_on_the_experts(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    moe = mixture(tmp_path)
    before = logits(moe, tokens(13))
    tuned = peft.get_peft_model(
        moe, peft.LoraConfig(r=3, target_modules=["gate_up_proj", "down_proj", "qkv_proj"], task_type="CAUSAL_LM")
    )
    assert difference(logits(tuned, tokens(13)), before) == 0.0
    tuned.gradient_checkpointing_enable()
    tuned.enable_input_require_grads()
    tuned.train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(input_ids=tokens(11), labels=tokens(11), output_router_logits=True).loss.backward()
        optimizer.step()
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert any("mlp.experts.4.down_proj.lora_B" in name for name in trained)
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
    tuned.eval()
    after = logits(tuned, tokens(13))
    assert difference(after, before) > 1e-4
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "moe"), tmp_path / "adapter").eval()
    assert difference(logits(again, tokens(13)), after) < 1e-6
    assert difference(logits(again.merge_and_unload(), tokens(13)), after) < 1e-5
