"""Calibration: router rows from prompts, by any gate mode; and measuring where prompts go in the mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit.errors import NonFiniteError
from mergekit.moe.forward import Weights, capture, embeddings_of, route
from mergekit.moe.prompts import Prompt, PromptSet, Tokens, tokenise
from mergekit.moe.report import RoutingReport, routing_report
from mergekit.moe.routers import (
    MIN_PROMPTS,
    MIN_TOKENS,
    SHRINKAGE,
    discriminant_rows,
    gap_for,
    is_degenerate,
    is_enough,
    last_tokens,
    prompt_means,
    random_rows,
    scale_to_gap,
    uniform_rows,
    unit_rows,
)

__all__ = ["Calibration", "calibrate", "degenerate_layers", "measure"]

OnLayer = Callable[[int, int], None]
"""Told each finished layer and the number of layers."""
_Group = tuple[int, bool, tuple[Prompt, ...]]
_MAX_TOKENS = 8192
"""Tokens that go through the model together: what is kept of them is 2 x 100 MB at a hidden size of 3,072."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Router rows float32 [layers, experts, hidden], and what there is to say about how they came about."""

    rows: NDArray[np.float32]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """Prompts as tokens, and for each its expert (int64) and whether it is a negative one (bool)."""

    prompts: tuple[Tokens, ...]
    expert: NDArray[np.int64]
    is_negative: NDArray[np.bool_]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each prompt."""
        return np.asarray([len(p.ids) for p in self.prompts], np.int64)

    @property
    def counts(self) -> NDArray[np.bool_]:
        """Which tokens of all prompts in a row count."""
        return np.concatenate([p.counts for p in self.prompts])

    @property
    def counted(self) -> NDArray[np.int64]:
        """The number of tokens of each prompt that count."""
        return np.asarray([p.counts.sum() for p in self.prompts], np.int64)


def calibrate(
    gate_mode: str,
    sets: Sequence[PromptSet],
    tokenizer: Any,
    weights: Weights | None,
    *,
    experts: int,
    layers: int,
    hidden: int,
    seed: int = 0,
    device: str = "cpu",
    apply_chat_template: bool = False,
    on_layer: OnLayer = lambda layer, layers: None,
) -> Calibration:
    """Router rows of a mixture of ``experts``, one set of prompts each; held-out prompts are not looked at.

    ``tokenizer`` is the base model's, of transformers. ``random`` and ``uniform_random`` use neither sets, tokenizer
    nor weights; ``cheap_embed`` reads embeddings only. Raises RecipeError for prompts that can't be used, RunError or
    IncompatibleError if no forward pass is possible, NonFiniteError if it gives no numbers.
    """
    shape = (layers, experts, hidden)
    if gate_mode in ("random", "uniform_random"):
        return Calibration((random_rows if gate_mode == "random" else uniform_rows)(*shape, seed))
    assert weights is not None, "the other gate modes compute"
    assert len(sets) == experts
    if experts == 1:
        return Calibration(np.zeros(shape, np.float32), ("one expert: the router has nothing to choose",))
    mode = "chat" if apply_chat_template else "plain" if gate_mode == "router_input" else "legacy"
    groups = [(e, False, s.positive) for e, s in enumerate(sets)] + [(e, True, s.negative) for e, s in enumerate(sets)]
    sample, notes = _read(groups, tokenizer, mode, None if gate_mode == "cheap_embed" else _MAX_TOKENS)
    if gate_mode == "cheap_embed":
        found = _embedding_rows(weights, sample, experts)
        if not np.isfinite(found).all():
            raise NonFiniteError("the embeddings of the base model hold NaN or infinity for tokens of the prompts")
        rows = np.repeat(found[None], layers, axis=0)
    else:
        rows = np.empty(shape, np.float32)
        made = _discriminants if gate_mode == "router_input" else _prompt_directions
        for layer, found in enumerate(made(weights, sample, gate_mode, experts, device, notes)):
            rows[layer] = found
            if not np.isfinite(found).all():
                raise NonFiniteError(f"layer {layer} of the base model computes NaN or infinity for the prompts")
            on_layer(layer + 1, layers)
    return Calibration(rows, tuple(notes))


def measure(
    gates: NDArray[np.float32],
    sets: Sequence[PromptSet],
    tokenizer: Any,
    weights: Weights,
    *,
    names: Sequence[str],
    experts_per_token: int,
    gate_mode: str,
    device: str = "cpu",
    apply_chat_template: bool = False,
    on_layer: OnLayer = lambda layer, layers: None,
) -> RoutingReport:
    """Run the held-out prompts of each expert through the mixture, or its positive ones if it has none held out.

    ``gates`` [layers, experts, hidden] as they will be stored; ``names`` of the experts stand in the report.
    """
    groups = [(e, False, s.held_out or s.positive) for e, s in enumerate(sets)]
    sample, notes = _read(groups, tokenizer, "chat" if apply_chat_template else "plain", _MAX_TOKENS)
    notes += [f"expert {e} ({names[e]}) has no prompts, so its routing is not measured" for e, _, p in groups if not p]
    if not sample.prompts:
        chosen, probabilities = np.zeros((0, 0, experts_per_token), np.int64), np.zeros((0, 0, len(sets)), np.float32)
    else:
        sample = _without_shared_start(sample)
        routes = route(weights, gates, experts_per_token, sample.prompts, device=device, on_layer=on_layer)
        chosen, probabilities = routes.chosen, routes.probabilities
    return routing_report(
        chosen,
        probabilities,
        np.repeat(sample.expert, sample.counted),
        names,
        [bool(s.held_out) for s in sets],
        degenerate=degenerate_layers(gates, gate_mode),
        notes=notes,
    )


def degenerate_layers(gates: NDArray[np.float32], gate_mode: str) -> tuple[int, ...]:
    """The layers whose rows hardly tell some experts apart, for rows made by ``gate_mode``."""
    is_centred = gate_mode == "router_input"
    return tuple(layer for layer, rows in enumerate(gates) if is_degenerate(rows, is_centred=is_centred))


# Gate modes -----------------------------------------------------------------------------------------------


def _embedding_rows(weights: Weights, sample: _Sample, experts: int) -> NDArray[np.float32]:
    """The direction of the sum of the prompts' embeddings (``cheap_embed``), [experts, hidden]."""
    table, place = embeddings_of(weights, sample.prompts)
    parts = np.split(place, np.cumsum(sample.lengths)[:-1])
    sums = np.stack([table.numpy()[part].sum(0, dtype=np.float64) for part in parts])
    return unit_rows(sums, sample.expert, sample.is_negative, experts, unit_sums=True)


def _prompt_directions(
    weights: Weights, sample: _Sample, gate_mode: str, experts: int, device: str, notes: list[str]
) -> Iterator[NDArray[np.float32]]:
    """The direction of the stream that enters each layer, at the last token or the mean over tokens of a prompt."""
    pool = prompt_means if gate_mode == "hidden_avg" else last_tokens
    for features in capture(weights, sample.prompts, "residual", device=device):
        yield unit_rows(pool(features, sample.lengths), sample.expert, sample.is_negative, experts)


def _discriminants(
    weights: Weights, sample: _Sample, gate_mode: str, experts: int, device: str, notes: list[str]
) -> Iterator[NDArray[np.float32]]:
    """What tells the experts' tokens apart where the router of each layer sees them (``router_input``)."""
    sample = _without_shared_start(sample)
    expert, is_negative = np.repeat(sample.expert, sample.counted), np.repeat(sample.is_negative, sample.counted)
    prompts = np.bincount(sample.expert[~sample.is_negative], minlength=experts)
    tokens = np.bincount(expert[~is_negative], minlength=experts)
    gap = gap_for(prompts)
    shrinkage = SHRINKAGE if is_enough(prompts, tokens) else None
    if shrinkage is None:
        few = int(np.argmin(tokens))
        notes.append(
            f"routers from means of prompts: expert {few} has {prompts[few]} prompts of {tokens[few]} tokens in all; "
            f"from {MIN_PROMPTS} prompts or {MIN_TOKENS} tokens for every expert on, the spread of tokens counts too"
        )
    for features in capture(weights, sample.prompts, "mlp_input", device=device):
        seen = features[sample.counts]
        if shrinkage is None:
            # A long prompt would outweigh the few others.
            means = prompt_means(seen, sample.counted)
            rows = discriminant_rows(means, sample.expert, sample.is_negative, experts, None)
        else:
            rows = discriminant_rows(seen, expert, is_negative, experts, shrinkage)
        yield scale_to_gap(rows, seen[~is_negative], gap)


# Samples --------------------------------------------------------------------------------------------------


def _read(groups: Sequence[_Group], tokenizer: Any, mode: str, max_tokens: int | None) -> tuple[_Sample, list[str]]:
    """The prompts of ``groups`` (expert, is negative, prompts) as tokens, at most ``max_tokens``; and remarks."""
    found: list[tuple[Tokens, int, bool]] = []
    notes: list[str] = []
    groups = [group for group in groups if group[2]]
    for expert, is_negative, prompts in groups:
        tokens, remarks = tokenise(tokenizer, prompts, mode)
        notes += remarks
        ends = np.cumsum([len(t.ids) for t in tokens], dtype=np.int64)
        fits = len(tokens) if max_tokens is None else max(1, int((ends <= max_tokens // len(groups)).sum()))
        if fits < len(tokens):
            notes.append(f"expert {expert}: {fits} of {len(tokens)} prompts used, {ends[fits - 1]} tokens are enough")
        found += [(t, expert, is_negative) for t in tokens[:fits]]
    sample = _Sample(
        tuple(t for t, _, _ in found),
        np.asarray([e for _, e, _ in found], np.int64),
        np.asarray([n for _, _, n in found], np.bool_),
    )
    return sample, notes


def _without_shared_start(sample: _Sample) -> _Sample:
    """The tokens that all prompts begin with do not count: they tell nothing apart.

    Such are the headers of a chat template, or "Question:". The last token that counts always does.
    """
    if len(sample.prompts) == 1:
        return sample
    shortest = int(sample.lengths.min())
    starts = np.stack([p.ids[:shortest] for p in sample.prompts])
    shared = int(np.cumprod((starts == starts[0]).all(0)).sum())
    prompts = []
    for prompt in sample.prompts:
        counts = prompt.counts.copy()
        counts[: min(shared, int(np.flatnonzero(counts)[-1]))] = False
        prompts.append(replace(prompt, counts=counts))
    return replace(sample, prompts=tuple(prompts))
