"""The rules that explain differences. Each has an id and a sentence, and says exactly where it applies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recipes import Case

Mask = np.ndarray

RULES: dict[str, str] = {
    "P1": "arithmetic is float32 here whatever the types of the inputs; 0.1.5 computes in `dtype` or the stored type "
    "(with arithmetic in float32 it agrees)",
    "T1": "of entries of equal magnitude at the edge of what `ties` and `breadcrumbs` keep, those of lower index are "
    "kept; 0.1.5 keeps whichever an unstable sort puts first",
    "T2": "entries of equal magnitude share one probability in `della` (that of their mean rank); 0.1.5 ranks them in "
    "the order of an unstable sort (with shared probabilities it agrees)",
    "T3": "of places of equal variance at the edge of `select_topk`, those of lower index are kept by `sce`; in 0.1.5 "
    "that is left to torch, and the models' shares follow",
    "M1": "the types of all tensors are those that config.json names; 0.1.5 writes float32 from `arcee_fusion` and "
    "`ramplus_tl` without `out_dtype`",
    "M4": "`sce` weighs models by their squared deltas however small; 0.1.5 gives all the same weight where the mean "
    "squares sum to less than 1e-6, as for most fine-tunes",
    "M9": "sign consensus with `normalize` and negative weights divides by the sum of the agreeing weights' "
    "magnitudes; 0.1.5 by their plain sum, which may be near zero or negative",
    "M10": "weights that sum to zero are refused where they would be divided by; 0.1.5 writes infinities or NaN",
    "M18": "`model_stock` divides by the lengths of task vectors however small; 0.1.5 by 1e-6 where two of them "
    "multiply to less, which makes close models look orthogonal",
    "M19": "`sce` divides by the shares of the models that agree however small; 0.1.5 by at least 1e-6, which "
    "shrinks the change where only models with a tiny share agree",
    "A1": "`arcee_fusion` computes the divergence of rows in float64; in float32, as in 0.1.5, that of close models is "
    "rounding noise, and other entries pass the threshold (with `dtype: float64` it agrees)",
    "A2": "`karcher` computes angles in float64; in float32, as in 0.1.5, those between close models are rounding "
    "noise, and the mean strays by as much as the models differ (with `dtype: float64` it agrees)",
    "C1": "a merge of a tied model and one with a head of its own is untied in config.json; in 0.1.5 it is tied if the "
    "model that config.json comes from is, and its merged head is never used",
    "R1": "unknown keys and parameters are refused; 0.1.5 ignores them",
    "R2": "`bf16` is accepted as the name of a type; 0.1.5 fails on it",
}

DOUBLE = {"arcee_fusion": "A1", "karcher": "A2"}
"""Methods whose numbers are compared with float64 arithmetic of the other tool, and the rule about its float32."""

TOLERANCE = 2e-6
"""How far two float32 results may be apart, as a share of the largest term that either adds up at that element."""

REFUSALS = (
    ("R1", "ours", r"there is no '|has no parameter '"),
    ("R2", "theirs", r'Unimplemented dtype "bf16"'),
    ("M10", "ours", r"weights sum to zero"),
)
"""Rule, whose message, and what it says."""


@dataclass
class Tensor:
    """What is merged into one tensor: the method's parameters, and the inputs in float32, the base first."""

    case: Case
    name: str
    parameters: dict[str, Any]
    has_base: bool
    inputs: list[np.ndarray]

    @property
    def deltas(self) -> list[np.ndarray]:
        """Differences from the base, in float32 as both tools see them."""
        return [x - self.inputs[0] for x in self.inputs[1:]]

    def largest_term(self) -> np.ndarray:
        """The largest |c x| that each element of a result is summed up from."""
        size = np.abs(np.array(self.inputs, np.float64)).max(0)
        weights = np.array(self.parameters.get("weight", (1.0,)), np.float64)
        factor = float(np.abs(weights).sum()) * max(1.0, abs(self.parameters.get("lambda_", 1.0)))
        relative = self.case.method == "nuslerp"
        if relative or self.parameters.get("normalize") or self.parameters.get("normalize_weights"):
            factor /= max(abs(float(weights.sum())), 1e-3)
        return size * max(1.0, factor)

    def rounding(self, result: np.ndarray) -> np.ndarray:
        """How far rounding may move a result: little in float32, a step where the result has 16 bits."""
        half = "16" in f"{[self.case.recipe.get(key) for key in ('out_dtype', 'dtype', 'models', 'slices')]}"
        return TOLERANCE * self.largest_term() + np.abs(result) * (2.0**-7 if half else TOLERANCE)


def refusal(c: Case, ours: str | None, theirs: str | None) -> str | None:
    """The rule by which one tool refuses a recipe."""
    for rule, whose, pattern in REFUSALS:
        if re.search(pattern, (ours if whose == "ours" else theirs) or ""):
            return rule
    return None


def config(c: Case, key: str, ours: Any, theirs: Any) -> str | None:
    """The rule by which a field of config.json differs."""
    if key == "tie_word_embeddings" and theirs and not ours and "/tied" in str(c.recipe):
        return "C1"
    return None


def element_type(c: Case, ours: torch.dtype, theirs: torch.dtype) -> str | None:
    """The rule by which the type of a tensor differs."""
    if c.method in ("arcee_fusion", "ramplus_tl") and theirs == torch.float32 and "out_dtype" not in c.recipe:
        return "M1"
    return None


def numbers(tensor: Tensor, ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[str, Mask]]:
    """Rules, each with the elements that it explains."""
    for rule in NUMBERS:
        where = rule(tensor, ours, theirs)
        if where is not None:
            yield rule.__name__.lstrip("_").upper(), np.broadcast_to(where, ours.shape)


def _t1(tensor: Tensor, ours: np.ndarray, theirs: np.ndarray) -> Mask | None:
    """Entries of a magnitude at an edge of what is kept."""
    if tensor.case.method not in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        return None
    found = np.zeros(ours.shape, bool)
    gammas = tensor.parameters.get("gamma", (0.0,) * len(tensor.deltas))
    for delta, density, gamma in zip(tensor.deltas, tensor.parameters["density"], gammas, strict=True):
        if not 0 < density < 1:
            continue
        size = np.abs(delta)
        order = np.sort(size, axis=None)[::-1]
        kept = int(density * delta.size)
        kept = max(1, kept) if tensor.case.method == "ties" else kept
        top = 0 if tensor.case.method == "ties" else min(int(gamma * delta.size), delta.size - kept)
        for edge in (top, top + kept):  # the entries before and behind an edge have the same magnitude
            if 0 < edge < delta.size and order[edge - 1] == order[edge]:
                found |= size == order[edge]
    return found


def _t3(tensor: Tensor, ours: np.ndarray, theirs: np.ndarray) -> Mask | None:
    """Places of equal variance at the edge of what ``select_topk`` keeps; the models' shares follow, a little."""
    share = tensor.parameters.get("select_topk", 1.0)
    if tensor.case.method != "sce" or not 0 < share < 1:
        return None
    variance = np.var(np.array(tensor.deltas, np.float64), axis=0)
    order = np.sort(variance, axis=None)[::-1]
    kept = int(np.count_nonzero(variance) * share)
    if not 0 < kept < order.size or order[kept] < order[kept - 1] * (1 - 1e-5):
        return None
    tied = np.abs(variance - order[kept]) <= 2e-5 * order[kept]
    return tied | (np.abs(ours - theirs) <= 0.2 * np.abs(theirs - tensor.inputs[0]).max())


def _m4(tensor: Tensor, ours: np.ndarray, theirs: np.ndarray) -> Mask | None:
    """A tensor whose squares are all small, where equal shares give what the other tool wrote."""
    if tensor.case.method != "sce" or len(tensor.deltas) < 2:
        return None
    squares, _, told = _sce(tensor, 1e-6)
    return _told(tensor, ours, theirs, _sce(tensor, 0.0)[2], told) if squares < 1.0001e-6 else None


def _m19(tensor: Tensor, ours: np.ndarray, theirs: np.ndarray) -> Mask | None:
    """Elements where the agreeing models have less than a millionth, if dividing by that is what the other tool did."""
    if tensor.case.method != "sce" or len(tensor.deltas) < 2:
        return None
    _, divisor, told = _sce(tensor, 1e-6)
    return (divisor < 1.0001e-6) & _told(tensor, ours, theirs, _sce(tensor, 0.0)[2], told)


def _told(tensor: Tensor, ours: np.ndarray, theirs: np.ndarray, here: np.ndarray, there: np.ndarray) -> Mask:
    """Where both tools wrote what their formulas say."""
    return (np.abs(ours - here) <= tensor.rounding(ours)) & (np.abs(theirs - there) <= tensor.rounding(theirs))


def _sce(tensor: Tensor, guard: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The sum of mean squares, the agreeing models' shares, and the result; both are guarded by ``guard``."""
    deltas = np.array(tensor.deltas, np.float64)
    share = tensor.parameters["select_topk"]
    if share < 1:
        variance = np.var(deltas, axis=0)
        kept = int(np.count_nonzero(variance) * share)
        deltas = deltas * (variance >= (np.sort(variance, axis=None)[::-1][kept - 1] if kept else np.inf))
    squares = np.square(deltas).reshape(len(deltas), -1).mean(1)
    total = squares.sum()
    shares = squares / total if total > guard else np.full(len(deltas), 1 / len(deltas))
    agree = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    shares = agree * shares.reshape(-1, *(1 for _ in deltas.shape[1:]))
    divisor = shares.sum(0)
    merged = (deltas * shares).sum(0) / np.maximum(divisor, guard or 1e-300)
    return float(total), divisor, tensor.inputs[0] + merged


def _m9(tensor: Tensor, ours: np.ndarray, theirs: np.ndarray) -> Mask | None:
    """Elements where both divide the same sum: here by the agreeing weights' magnitudes, there by their plain sum."""
    weights = np.array(tensor.parameters.get("weight", ()), np.float64)
    if "elect" not in tensor.parameters or not tensor.parameters["normalize"] or not (weights < 0).any():
        return None
    here, there = ours - tensor.inputs[0], theirs - tensor.inputs[0]
    changed = np.array(tensor.deltas) != 0
    found = np.zeros(ours.shape, bool)
    for subset in range(1, 2 ** len(weights)):
        chosen = np.array([bool(subset >> i & 1) for i in range(len(weights))])
        if not (weights[chosen] < 0).any():
            continue
        magnitudes, plain = np.abs(weights[chosen]).sum(), weights[chosen].sum() or 1.0
        slack = tensor.rounding(theirs) * abs(plain) + tensor.rounding(ours) * magnitudes
        same = np.abs(here * magnitudes - there * plain) <= slack
        found |= same & changed[chosen].all(0)
    return found


def _m18(tensor: Tensor, ours: np.ndarray, theirs: np.ndarray) -> Mask | None:
    """Vectors whose lengths multiply to less than 1e-6, if a cosine divided by that gives what the other tool wrote."""
    if tensor.case.method != "model_stock":
        return None
    base = tensor.inputs[0].astype(np.float64)
    rows = tensor.parameters["filter_wise"] and base.ndim > 1
    shape = (-1, base.shape[-1]) if rows else (1, -1)
    deltas = [(x - base).reshape(shape) for x in tensor.inputs[1:]]
    plain, guarded, short = [], [], np.zeros(len(deltas[0]), bool)
    for i, one in enumerate(deltas):
        for other in deltas[:i]:
            lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
            dot = (one * other).sum(-1)
            plain.append(dot / np.maximum(lengths, 1e-300))
            guarded.append(dot / np.maximum(lengths, 1e-6))
            short |= lengths < 1e-6
    here, there = (_stock(base, deltas, np.mean(cosines, axis=0)) for cosines in (plain, guarded))
    found: Mask = np.broadcast_to(short[:, None], base.reshape(shape).shape).reshape(base.shape)
    return found & _told(tensor, ours, theirs, here, there)


def _stock(base: np.ndarray, deltas: list[np.ndarray], cosine: np.ndarray) -> np.ndarray:
    t = len(deltas) * cosine / (1 + (len(deltas) - 1) * cosine)
    return base + (t[:, None] * np.mean(deltas, axis=0)).reshape(base.shape)


NUMBERS = (_t1, _t3, _m4, _m9, _m18, _m19)
