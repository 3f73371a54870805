"""Router rows from prompts end to end, on the bundled models: what they are made of, and that they route."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from mergekit.errors import NonFiniteError, RecipeError
from mergekit.moe import calibrate as module
from mergekit.moe.calibrate import Calibration, calibrate, degenerate_layers, measure
from mergekit.moe.prompts import Prompt, PromptSet, hold_out
from mergekit.moe.report import RoutingReport
from mergekit.moe.routers import SHRINKAGE, discriminant_rows, scale_to_gap

transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)  # waking a second thread takes longer than these sums

MODELS = Path(__file__).parent.parent / "models"
DOMAINS = ("code", "prose", "calc")
LAYERS, HIDDEN = 4, 128
ROUTED = ("cheap_embed", "hidden", "hidden_avg", "router_input")


class BundledWeights:
    """The bundled base, and the other bundled models as its experts."""

    def __init__(self) -> None:
        self.config: Mapping[str, Any] = json.loads((MODELS / "base" / "config.json").read_text())
        self._base, *self._experts = (
            safe_open(MODELS / name / "model.safetensors", "pt") for name in ("base", *DOMAINS)
        )

    def tensor(self, name: str) -> torch.Tensor:
        return self._base.get_tensor(name)

    def expert(self, expert: int, name: str) -> torch.Tensor:
        return self._experts[expert].get_tensor(name)

    def rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        return self._base.get_tensor(name)[torch.as_tensor(ids)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODELS / "base", local_files_only=True)


@pytest.fixture(scope="module")
def base() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MODELS / "base", local_files_only=True).float().eval()


def prompts_of(*texts: str) -> tuple[Prompt, ...]:
    return tuple(Prompt("here", text) for text in texts)


SETS = (
    PromptSet(prompts_of("def main(argv):", "import sys", "class Point:\n    x = 1"), prompts_of("1+1=2")),
    PromptSet(prompts_of("This method returns a new object.", "It is an error if"), prompts_of("return None", "if x:")),
    PromptSet(prompts_of("12+7=19", "What is 17 plus 25?")),
)


def rows_of(mode: str, sets: Sequence[PromptSet], tokenizer: Any, **options: Any) -> Calibration:
    given = {"experts": len(sets), "layers": LAYERS, "hidden": HIDDEN, **options}
    return calibrate(mode, sets, tokenizer, BundledWeights(), **given)


def routed(mode: str, sets: Sequence[PromptSet], tokenizer: Any, **options: Any) -> RoutingReport:
    rows = rows_of(mode, sets, tokenizer).rows
    given = {"names": DOMAINS, "experts_per_token": 2, "gate_mode": mode, **options}
    return measure(rows, sets, tokenizer, BundledWeights(), **given)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


# What rows are made of ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden", "hidden_last", "hidden_avg"])
def test_rows_as_arcee_mergekit_makes_them(mode, tokenizer, base):
    """Prompt by prompt with transformers itself; but without padding, which that averages in."""

    @torch.no_grad()
    def vectors(prompts: Sequence[Prompt]) -> np.ndarray:
        found = []
        for prompt in prompts:
            ids = tokenizer("<s>" + prompt.text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            states = torch.stack(base(ids, output_hidden_states=True).hidden_states[:-1])[:, 0].double().numpy()
            if mode == "cheap_embed":
                found.append(np.repeat(states[:1].sum(1), LAYERS, 0))
            else:
                found.append(states.mean(1) if mode == "hidden_avg" else states[:, -1])
        return unit(np.sum(found, 0)) if mode == "cheap_embed" else np.mean(found, 0)

    expected = [unit(vectors(s.positive) - vectors(s.negative) if s.negative else vectors(s.positive)) for s in SETS]
    found = rows_of(mode, SETS, tokenizer).rows
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("times", [1, 6], ids=["means", "discriminants"])
def test_router_input_is_made_of_what_routers_see(times, tokenizer, base):
    longer = [prompts_of(*(p.text + " " * i for p in s.positive for i in range(times))) for s in SETS]
    sets = [PromptSet(positive, s.negative) for positive, s in zip(longer, SETS, strict=True)]
    seen: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs, i=i: seen[i].append(inputs[0][0, 1:].double()))
        for i, layer in enumerate(base.model.layers)
    ]
    expert, is_negative = [], []
    for negative in (False, True):
        for e, one in enumerate(sets):
            for prompt in one.negative if negative else one.positive:
                with torch.no_grad():
                    base(tokenizer(prompt.text, return_tensors="pt")["input_ids"])
                expert.append(e)
                is_negative.append(negative)
    for hook in hooks:
        hook.remove()
    lengths = [len(part) for part in seen[0]]
    of, negative = np.repeat(expert, lengths), np.repeat(is_negative, lengths)
    found = rows_of("router_input", sets, tokenizer)
    for layer, parts in enumerate(seen):
        tokens = torch.cat(parts).numpy()
        if times == 1:
            means = np.stack([part.mean(0).numpy() for part in parts])
            rows = discriminant_rows(means, np.asarray(expert), np.asarray(is_negative), 3, None)
        else:
            rows = discriminant_rows(tokens, of, negative, 3, SHRINKAGE)
        expected = scale_to_gap(rows, tokens[~negative], 1.0 if times == 1 else 4.0)
        np.testing.assert_allclose(found.rows[layer], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert bool(found.notes) == (times == 1)


@pytest.mark.parametrize("mode", ROUTED)
def test_batches_are_of_no_account(mode, tokenizer, monkeypatch):
    """How prompts share batches, and so how much padding there is, changes rounding only."""
    whole = rows_of(mode, SETS, tokenizer).rows
    monkeypatch.setattr(module, "capture", lambda *args, **options: CAPTURE(*args, **options, batch_tokens=7))
    np.testing.assert_allclose(rows_of(mode, SETS, tokenizer).rows, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


CAPTURE = module.capture


@pytest.mark.parametrize("mode", ROUTED)
def test_same_input_same_bytes(mode, tokenizer):
    assert rows_of(mode, SETS, tokenizer).rows.tobytes() == rows_of(mode, SETS, tokenizer).rows.tobytes()


def test_held_out_prompts_are_not_looked_at(tokenizer):
    more = [PromptSet(s.positive, s.negative, prompts_of("held out")) for s in SETS]
    for mode in ROUTED:
        assert (rows_of(mode, more, tokenizer).rows == rows_of(mode, SETS, tokenizer).rows).all()


def test_random_rows_need_nothing():
    for mode in ("random", "uniform_random"):
        first, second = (
            calibrate(mode, (), None, None, experts=3, layers=2, hidden=64, seed=seed).rows for seed in (0, 1)
        )
        assert first.shape == (2, 3, 64)
        assert not (first == second).any()


def test_one_expert_has_zero_rows(tokenizer):
    made = rows_of("router_input", SETS[:1], tokenizer)
    assert made.rows.shape == (LAYERS, 1, HIDDEN)
    assert not made.rows.any()
    assert made.notes == ("one expert: the router has nothing to choose",)


def test_what_all_prompts_begin_with_does_not_count(tokenizer):
    """Such tokens are the same for every expert, whatever comes after them."""
    header = [PromptSet(prompts_of(*(f"Question:\n{p.text}" for p in s.positive))) for s in SETS]
    sample, _ = module._read([(e, False, s.positive) for e, s in enumerate(header)], tokenizer, "plain", None)
    for before, after in zip(sample.prompts, module._without_shared_start(sample).prompts, strict=True):
        assert tokenizer.decode(before.ids[before.counts & ~after.counts].tolist()) == "Question:\n"
    same, _ = module._read([(e, False, prompts_of("x", "x")) for e in range(2)], tokenizer, "plain", None)
    assert [int(p.counts.sum()) for p in module._without_shared_start(same).prompts] == [1] * 4


def test_many_prompts_are_cut_down_alike(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_MAX_TOKENS", 30)
    sets = [PromptSet(prompts_of(*(f"{i} and {i}" for i in range(n)))) for n in (9, 2)]
    made = rows_of("router_input", sets, tokenizer)
    assert made.notes[0] == "expert 0: 3 of 9 prompts used, 15 tokens are enough"
    assert not any("expert 1: " in note and "used" in note for note in made.notes)


def test_layers_are_told(tokenizer):
    told: list[tuple[int, int]] = []
    rows_of("router_input", SETS, tokenizer, on_layer=lambda *at: told.append(at))
    assert told == [(i + 1, LAYERS) for i in range(LAYERS)]


def test_broken_models_are_said(tokenizer):
    weights = BundledWeights()
    weights.tensor = lambda name: BundledWeights().tensor(name) * (np.nan if "layers.1." in name else 1)  # type: ignore[method-assign]
    for mode in ("router_input", "hidden"):
        with pytest.raises(NonFiniteError, match=r"layer [12] of the base model computes NaN"):
            calibrate(mode, SETS, tokenizer, weights, experts=3, layers=LAYERS, hidden=HIDDEN)


def test_prompts_that_say_nothing_are_refused(tokenizer):
    with pytest.raises(RecipeError, match="no token that counts"):
        rows_of("hidden", [SETS[0], PromptSet(prompts_of("<pad>"))], tokenizer)


# Where prompts go -----------------------------------------------------------------------------------------


def snippets(tokenizer: Any, count: int, start: int = 0) -> list[PromptSet]:
    """Prompts of 32 tokens from the held-out text of each domain, in turn from all over it."""
    sets = []
    for domain in DOMAINS:
        text = (MODELS / "heldout" / f"{domain}.txt").read_text(encoding="utf-8")
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        step = len(ids) // 64
        places = [step * i for i in range(start, start + count)]
        sets.append(PromptSet(prompts_of(*(tokenizer.decode(ids[at : at + 32]) for at in places))))
    return sets


@pytest.fixture(scope="module")
def reports(tokenizer) -> dict[str, RoutingReport]:
    train, test = snippets(tokenizer, 12), snippets(tokenizer, 40, 24)
    sets = [PromptSet(a.positive, (), b.positive) for a, b in zip(train, test, strict=True)]
    return {mode: routed(mode, sets, tokenizer) for mode in ROUTED}


def test_router_input_routes_best(reports):
    """Measured on tokens that no router was made from: 0.90, hidden_avg 0.77, hidden 0.75, cheap_embed 0.61."""
    accuracy = {mode: report.accuracy for mode, report in reports.items()}
    best = accuracy.pop("router_input")
    assert best > 0.8
    assert best > max(accuracy.values()) + 0.05
    assert all(min(layer.accuracy) > 0.5 for layer in reports["router_input"].layers)


def test_reports_say_what_was_measured(reports, tokenizer):
    assert all(report.is_held_out == (True,) * 3 for report in reports.values())
    assert all(report.degenerate == () for report in reports.values())
    split, remarks = hold_out(snippets(tokenizer, 8))
    assert remarks == ()
    assert routed("router_input", split, tokenizer).is_held_out == (True,) * 3
    seen = routed("router_input", SETS, tokenizer, experts_per_token=3)
    assert any(line.startswith("optimistic: all experts") for line in seen.table())
    assert any("every expert" in line for line in seen.table())
    assert seen.layers[0].load == pytest.approx([1 / 3] * 3)


def test_experts_without_prompts_are_not_measured(tokenizer):
    gates = calibrate("random", (), None, None, experts=3, layers=LAYERS, hidden=HIDDEN).rows
    options: dict[str, Any] = {"names": DOMAINS, "experts_per_token": 1, "gate_mode": "random"}
    found = measure(gates, (SETS[0], PromptSet(()), SETS[2]), tokenizer, BundledWeights(), **options)
    assert found.layers[0].accuracy[1] is None
    assert "expert 1 (prose) has no prompts, so its routing is not measured" in found.table()
    nothing = measure(gates, [PromptSet(())] * 3, tokenizer, BundledWeights(), **options)
    assert nothing.accuracy is None


@pytest.mark.parametrize("mode", ROUTED)
def test_experts_with_the_same_prompts_are_said(mode, tokenizer):
    code, _, calc = snippets(tokenizer, 8)
    alike = rows_of(mode, [code, code, calc], tokenizer).rows
    assert degenerate_layers(alike, mode) == tuple(range(LAYERS))
    both = rows_of(mode, [code, code], tokenizer).rows
    assert degenerate_layers(both, mode) == tuple(range(LAYERS))
    assert mode != "router_input" or not both.any()
