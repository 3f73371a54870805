"""Layer-by-layer forward passes beside transformers' own of whole models, dense and mixtures.

This file also runs in environments with other versions of transformers: ``pytest tests/test_moe_forward.py``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from mergekit.errors import CheckpointError, IncompatibleError, RunError
from mergekit.moe.forward import _batches, capture, route
from mergekit.moe.prompts import Tokens

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # waking a second thread takes longer than these sums

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VOCAB, HIDDEN, LAYERS, ORIGINAL = 61, 40, 3, 11
SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 37, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 47, "sliding_window": None,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager",
}  # fmt: skip


def longrope(num_factors: int) -> dict[str, Any]:
    factors = {"short_factor": [1 + 0.07 * i for i in range(num_factors)],
               "long_factor": [1.3 + 1.1 * i for i in range(num_factors)]}  # fmt: skip
    return {"rope_scaling": {"type": "longrope", **factors}, "original_max_position_embeddings": ORIGINAL}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": 5}),
    "phi3, longrope": ("phi3", longrope(5)),
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "mistral": ("mistral", {"head_dim": 6}),
    "mistral, window": ("mistral", {"sliding_window": 4}),
}
if VERSION >= (4, 49):
    CASES["phi3, part of each head"] = ("phi3", {"partial_rotary_factor": 0.8, "num_attention_heads": 4})
    CASES["phi3, part of each head, longrope"] = ("phi3", {"partial_rotary_factor": 0.8, **longrope(4)})


class FolderWeights:
    """Weights of a folder with one safetensors file; ``experts`` are tensors by dense name. Counts what is read."""

    def __init__(self, folder: Path, experts: Sequence[Mapping[str, torch.Tensor]] = (), **config: Any) -> None:
        self.config: Mapping[str, Any] = {**json.loads((folder / "config.json").read_text()), **config}
        self._file = safe_open(folder / "model.safetensors", "pt")
        self._experts = experts
        self.reads: Counter[str] = Counter()

    def tensor(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return self._file.get_tensor(name)

    def expert(self, expert: int, name: str) -> torch.Tensor:
        self.reads[f"{expert}: {name}"] += 1
        return self._experts[expert][name]

    def rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        table = self._file.get_slice(name)
        return torch.cat([table[i : i + 1] for i in ids])


def save(folder: Path, kind: str, changes: Mapping[str, Any]) -> Any:
    """A random model, returned and saved, with a config as version 4 writes it."""
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def prompts_of(lengths: Iterable[int]) -> list[Tokens]:
    rng = np.random.default_rng(7)
    return [Tokens(rng.integers(3, VOCAB, n), np.arange(n) > 0) for n in lengths]


@torch.no_grad()
def whole_forward(model: Any, prompts: Sequence[Tokens]) -> dict[str, np.ndarray]:
    """What transformers computes, prompt by prompt: [layers, tokens, hidden]."""
    found: dict[str, list[list[torch.Tensor]]] = {
        "residual": [[] for _ in range(LAYERS)],
        "mlp_input": [[] for _ in range(LAYERS)],
    }
    hooks = []
    for i, layer in enumerate(model.model.layers):
        mlp = getattr(layer, "mlp", None) or layer.block_sparse_moe
        hooks.append(layer.register_forward_pre_hook(lambda _, inputs, i=i: found["residual"][i].append(inputs[0][0])))
        hooks.append(mlp.register_forward_pre_hook(lambda _, inputs, i=i: found["mlp_input"][i].append(inputs[0][0])))
    for prompt in prompts:
        model(input_ids=torch.from_numpy(prompt.ids)[None])
    for hook in hooks:
        hook.remove()
    return {what: np.stack([torch.cat(parts).numpy() for parts in layers]) for what, layers in found.items()}


def captured(weights: FolderWeights, prompts: Sequence[Tokens], what: Any, **options: Any) -> np.ndarray:
    return np.stack([features.copy() for features in capture(weights, prompts, what, **options)])


@pytest.mark.parametrize("case", CASES)
def test_streamed_forward_is_transformers_own(case, tmp_path):
    model = save(tmp_path, *CASES[case])
    prompts = prompts_of([9, 23, 1, 14, 2, ORIGINAL, ORIGINAL + 1, 17])
    expected = whole_forward(model, prompts)
    for what in ("residual", "mlp_input"):
        for batch_tokens in (1, 40, 10_000):
            found = captured(FolderWeights(tmp_path), prompts, what, batch_tokens=batch_tokens)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected[what], rtol=0, atol=1e-5, err_msg=f"{what} {batch_tokens}")


def test_what_differs_is_seen():
    """The windows and rotary settings above change the result, so equality means something."""
    first = prompts_of([23])
    plain = {}
    for case, (kind, changes) in CASES.items():
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        plain.setdefault(kind, []).append((case, whole_forward(model, first)["mlp_input"][-1]))
    for found in plain.values():
        (_, reference), *others = found
        for case, other in others:
            assert "biases" in case or np.abs(other - reference).max() > 1e-3, case


def test_config_as_version_5_writes_it(tmp_path):
    """Its rotary settings are understood by version 4 too, which passes over them by itself."""
    model = save(tmp_path, *CASES["phi3, longrope"])
    prompts = prompts_of([23, 7])
    scaling = {**longrope(5)["rope_scaling"], "rope_type": "longrope", "rope_theta": 10000.0}
    weights = FolderWeights(tmp_path, rope_parameters={**scaling, "original_max_position_embeddings": ORIGINAL})
    for key in ("rope_theta", "rope_scaling"):
        weights.config.pop(key, None)
    found = captured(weights, prompts, "mlp_input")
    np.testing.assert_allclose(found, whole_forward(model, prompts)["mlp_input"], rtol=0, atol=1e-5)


def test_each_tensor_is_read_once_and_unused_ones_never(tmp_path):
    save(tmp_path, "phi3", {})
    weights = FolderWeights(tmp_path)
    captured(weights, prompts_of([5, 9, 2, 20]), "mlp_input", batch_tokens=8)
    assert set(weights.reads.values()) == {1}
    assert not {n for n in weights.reads if n.startswith((f"model.layers.{LAYERS - 1}.mlp", "lm_head", "model.norm"))}
    weights.reads.clear()
    captured(weights, prompts_of([5, 9, 2, 20]), "residual")
    assert not {n for n in weights.reads if f"layers.{LAYERS - 1}." in n}


def test_low_precision_weights_are_computed_in_float32(tmp_path):
    save(tmp_path, "phi3", {}).to(torch.bfloat16).save_pretrained(tmp_path)
    key = "dtype" if VERSION >= (5, 0) else "torch_dtype"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **{key: torch.float32}).eval()
    prompts = prompts_of([12, 5])
    expected = whole_forward(model, prompts)["mlp_input"]
    np.testing.assert_allclose(captured(FolderWeights(tmp_path), prompts, "mlp_input"), expected, rtol=0, atol=1e-5)


# Mixtures -------------------------------------------------------------------------------------------------


def mixture(folder: Path, experts: int, per_token: int, **changes: Any) -> tuple[Any, FolderWeights, np.ndarray]:
    """A random Mixtral, the dense parts it is made of, and its router rows."""
    moe = {"num_local_experts": experts, "num_experts_per_tok": per_token, "head_dim": 6, "intermediate_size": 36}
    model = save(folder, "mixtral", {**moe, **changes})
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    with safe_open(folder / "model.safetensors", "pt") as file:

        def part(layer: int, expert: int, name: str) -> torch.Tensor:
            return file.get_tensor(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight")

        tensors = [
            {f"model.layers.{i}.mlp.{n}.weight": part(i, e, names[n]) for i in range(LAYERS) for n in names}
            for e in range(experts)
        ]
        gates = [file.get_tensor(f"model.layers.{i}.block_sparse_moe.gate.weight") for i in range(LAYERS)]
    weights = FolderWeights(folder, tensors, model_type="mistral")
    return model, weights, torch.stack(gates).numpy()


@pytest.mark.parametrize(("experts", "per_token", "window"), [(5, 2, None), (3, 1, 6), (2, 2, None), (1, 1, None)])
def test_route_is_mixtral(tmp_path, experts, per_token, window):
    model, weights, gates = mixture(tmp_path, experts, per_token, sliding_window=window)
    prompts = prompts_of([9, 23, 4, 14])
    counts = np.concatenate([p.counts for p in prompts])
    expected = whole_forward(model, prompts)["mlp_input"] @ gates.transpose(0, 2, 1)
    likely = torch.softmax(torch.from_numpy(expected), -1).numpy()[:, counts]
    for batch_tokens in (10, 1000):
        told: list[tuple[int, int]] = []
        routes = route(weights, gates, per_token, prompts, batch_tokens=batch_tokens,
                       on_layer=lambda *at, told=told: told.append(at))  # fmt: skip
        np.testing.assert_allclose(routes.probabilities, likely, rtol=0, atol=1e-5)
        is_clear = np.diff(np.sort(likely, -1), axis=-1).min(-1, initial=1.0) > 1e-4
        order = np.argsort(-likely, -1)[..., :per_token]
        assert (routes.chosen[is_clear] == order[is_clear]).all()
        assert is_clear.mean() > 0.9
        assert told == [(1, LAYERS), (2, LAYERS), (3, LAYERS)]
    assert routes.chosen.shape == (LAYERS, int(counts.sum()), per_token)


def test_experts_are_loaded_one_at_a_time_and_only_if_chosen(tmp_path):
    _, weights, gates = mixture(tmp_path, 3, 1)
    prompts = prompts_of([9, 23])
    chosen = route(weights, gates, 1, prompts, batch_tokens=5).chosen
    assert set(weights.reads.values()) == {1}
    every = [Tokens(p.ids, np.ones(len(p.ids), bool)) for p in prompts]
    chosen = route(weights, gates, 1, every).chosen
    read = {(n.split(":")[0], n.split(".")[2]) for n in weights.reads if ".mlp." in n}
    assert read == {(str(e), str(i)) for i in range(LAYERS - 1) for e in np.unique(chosen[i])}


# Faults ---------------------------------------------------------------------------------------------------


def test_other_model_types_are_refused(tmp_path):
    save(tmp_path, "phi3", {})
    with pytest.raises(
        IncompatibleError, match="this is 'phi3small'; gate_mode random and cheap_embed need no forward"
    ):
        next(capture(FolderWeights(tmp_path, model_type="phi3small"), prompts_of([3]), "residual"))


@pytest.mark.parametrize(
    "broken",
    [
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        {"rope_scaling": {"rope_type": "spiral", "type": "spiral"}, "rope_parameters": None},
        {"hidden_act": "no_such_function"},
        {"num_attention_heads": 0},
        {"hidden_size": "many"},
    ],
)
def test_configs_that_transformers_refuses(tmp_path, broken):
    save(tmp_path, "phi3", {})
    with pytest.raises(RunError, match=r"transformers [\d.]+ can't run this phi3 model \(.*\); try a newer"):
        next(capture(FolderWeights(tmp_path, **broken), prompts_of([3]), "residual"))


def test_remote_code_is_not_run(tmp_path):
    save(tmp_path, "phi3", {})
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    prompts = prompts_of([3])
    plain = captured(FolderWeights(tmp_path), prompts, "residual")
    assert (captured(FolderWeights(tmp_path, auto_map=auto), prompts, "residual") == plain).all()


def test_tensors_of_another_size_are_refused(tmp_path):
    """Broadcasting would take a row for a matrix."""
    save(tmp_path, "phi3", {})
    weights = FolderWeights(tmp_path)
    read = weights.tensor
    weights.tensor = lambda name: read(name)[:1]  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.\S+ is \[1.*config\.json ask for \["):
        captured(weights, prompts_of([3]), "mlp_input")


def test_batches_hold_every_token_once_and_keep_lengths_apart():
    lengths = [3, 30, 1, 12, 11, 2, 30]
    for limit, boundary in [(1, 0), (32, 0), (64, 11), (10**6, 11)]:
        seen: list[int] = []
        for index, is_real in _batches(lengths, limit, boundary):
            rows, longest = index.shape
            assert rows * longest <= max(limit, longest)
            counts = is_real.sum(1)
            assert (is_real == (torch.arange(longest) < counts[:, None])).all(), "padding is on the right"
            assert not boundary or len({bool(n > boundary) for n in counts}) == 1
            seen += index[is_real].tolist()
        assert sorted(seen) == list(range(sum(lengths)))


def test_tokens_without_an_embedding_are_refused(tmp_path):
    save(tmp_path, "phi3", {})
    beyond = Tokens(np.asarray([1, VOCAB]), np.asarray([False, True]))
    with pytest.raises(IncompatibleError, match=f"token {VOCAB} of a prompt, but the model has {VOCAB} embeddings"):
        next(capture(FolderWeights(tmp_path), [beyond], "residual"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine")
def test_an_accelerator_agrees(tmp_path):
    _, weights, gates = mixture(tmp_path, 3, 2)
    prompts = prompts_of([9, 23, 4, 14])
    for what in ("residual", "mlp_input"):
        found, expected = (captured(weights, prompts, what, device=device) for device in ("cuda", "cpu"))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    found, expected = (route(weights, gates, 2, prompts, device=device).probabilities for device in ("cuda", "cpu"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
