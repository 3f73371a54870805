"""Router rows: from features of tokens to the gate of each layer. Pure functions on NumPy arrays.

A router computes logits = W x of the input x of its experts, without a bias; its softmax and its choice see only the
differences between rows. Letters: N tokens, P prompts, E experts, L layers, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mergekit.seeds import stream_key

__all__ = [
    "condition_number",
    "discriminant_rows",
    "gap_for",
    "is_degenerate",
    "is_enough",
    "last_tokens",
    "prompt_means",
    "random_rows",
    "scale_to_gap",
    "uniform_rows",
    "unit_rows",
]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

SHRINKAGE = 0.1
"""The share of a plain sphere in the covariance. On experts made of the bundled models, MLPs trained only, 0.5 gave a
mean perplexity of 17.08, 0.1 gave 16.82, an estimate for each layer 16.74; 0.1 won from 70 tokens in all on."""
MIN_PROMPTS, MIN_TOKENS = 6, 50
_TINY = 1e-8
_CHUNK = 2048
_MAX_CONDITION = 5.0
_MAX_COSINE = 0.98


# Random ---------------------------------------------------------------------------------------------------


def random_rows(layers: int, experts: int, hidden: int, seed: int) -> Floats:
    """Normal rows of standard deviation 1/sqrt(H), float32 [L, E, H]: logits of about the size of 1.

    Unscaled ones, as in arcee mergekit, make a choice so sharp that it is worse than none (shared perplexity 7.1
    against 4.6 for equal weights in our toy).
    """
    rows = np.empty((layers, experts, hidden))
    for layer in range(layers):
        first, second = _uniform(layer, 2 * experts * hidden, seed).reshape(2, experts, hidden)
        # Box and Muller 1958; 1 - u is never zero.
        rows[layer] = np.sqrt(-2.0 * np.log1p(-first)) * np.cos(2.0 * math.pi * second)
    return (rows / math.sqrt(hidden)).astype(np.float32)


def uniform_rows(layers: int, experts: int, hidden: int, seed: int) -> Floats:
    """Rows uniform between -1/sqrt(H) and 1/sqrt(H), as a new linear layer has them; float32 [L, E, H]."""
    rows = [_uniform(layer, experts * hidden, seed).reshape(experts, hidden) for layer in range(layers)]
    return ((2.0 * np.stack(rows) - 1.0) / math.sqrt(hidden)).astype(np.float32)


def _uniform(layer: int, count: int, seed: int) -> Doubles:
    """``count`` numbers in [0, 1). Raw words of Philox, since NumPy may change what it makes of them."""
    raw = np.random.Philox(key=stream_key(seed, "router", layer)).random_raw(count)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, np.float64)


# Directions of prompts ------------------------------------------------------------------------------------


def last_tokens(features: Floats, lengths: NDArray[np.int64]) -> Doubles:
    """The last token of each prompt, float64 [P, H]; ``features`` [N, H] holds prompts of ``lengths`` [P] in a row."""
    return np.asarray(features[np.cumsum(lengths) - 1], np.float64)


def prompt_means(features: Floats, lengths: NDArray[np.int64]) -> Doubles:
    """The mean over the tokens of each prompt, float64 [P, H]."""
    ends = np.cumsum(lengths)
    means = [features[end - n : end].mean(0, dtype=np.float64) for end, n in zip(ends, lengths, strict=True)]
    return np.stack(means)


def unit_rows(
    vectors: Doubles,
    expert: NDArray[np.int64],
    is_negative: NDArray[np.bool_],
    experts: int,
    *,
    unit_sums: bool = False,
) -> Floats:
    """For each expert its positive prompts minus its negative ones, of length 1; float32 [E, H].

    ``vectors`` [P, H] belong to prompts of ``expert`` [P]. The prompts of a kind are averaged; with ``unit_sums`` (as
    ``cheap_embed`` does in arcee mergekit) added up and brought to length 1 before the difference is taken.
    """
    rows = np.zeros((experts, vectors.shape[1]))
    for e in range(experts):
        for negative, sign in ((False, 1.0), (True, -1.0)):
            mine = vectors[(expert == e) & (is_negative == negative)]
            if len(mine):
                rows[e] += sign * (_unit(mine.sum(0)) if unit_sums else mine.mean(0))
        rows[e] = _unit(rows[e])
    return rows.astype(np.float32)


def _unit(vector: Doubles) -> Doubles:
    return vector / max(float(np.linalg.norm(vector)), _TINY)


# Discriminants --------------------------------------------------------------------------------------------


def is_enough(prompts: NDArray[np.int64], tokens: NDArray[np.int64]) -> bool:
    """Whether the spread of tokens can be estimated: each expert has MIN_PROMPTS positive prompts, or MIN_TOKENS.

    ``prompts`` and ``tokens`` are int64 [E]. Eight prompts, two of them held out, are enough. On our tiny models the
    discriminant routes 4 to 9 points better than plain means from 25 tokens an expert on; with a dozen it varies.
    """
    return bool(np.all((prompts >= MIN_PROMPTS) | (tokens >= MIN_TOKENS)))


def gap_for(prompts: NDArray[np.int64]) -> float:
    """How decided a router should be, as its median gap between logits: 4, or 1 if an expert has under 4 prompts."""
    return 4.0 if np.all(prompts >= 4) else 1.0


def discriminant_rows(
    features: Floats | Doubles,
    expert: NDArray[np.int64],
    is_negative: NDArray[np.bool_],
    experts: int,
    shrinkage: float | None,
) -> Doubles:
    """Rows that tell the classes of tokens apart, equal at the middle between them; float64 [E, H], unscaled.

    Linear discriminant analysis (Fisher 1936; shrunk as by Ledoit and Wolf 2004): with class means m_e, their mean m
    and the covariance S = (1 - shrinkage) * (pooled within classes) + shrinkage * trace/H * I, row e is
    S^-1 (m_e - m), less its part along S^-1 m, so that w_e . m = 0: a router has no bias, and tokens lie far from
    the origin. ``shrinkage`` None takes S = I (plain means). A negative token of expert e counts as 1/(E - 1) of a
    token of each other class. ``features`` [N, H] are of ``expert`` [N]. One expert: zeros.
    """
    if experts == 1:
        return np.zeros((1, features.shape[1]))
    share = _memberships(expert, is_negative, experts)
    weight = share.sum(0)
    assert (weight > 0).all(), "every expert has a token"
    origin = features.mean(0, dtype=np.float64)
    means = sum(share[part].T @ (features[part] - origin) for part in _chunks(len(features))) / weight[:, None]
    middle = means.mean(0)
    targets = np.concatenate([means - middle, [middle + origin]]).T
    if _norm(means - middle) <= 1e-6 * _norm(origin):
        return np.zeros((experts, features.shape[1]))  # rounding errors, no classes
    solved = targets if shrinkage is None else _solve(features, origin, share, means, targets, shrinkage)
    rows, along, centre = solved[:, :-1].T, solved[:, -1], targets[:, -1]
    spread = float(centre @ along)
    return rows - np.outer(rows @ centre / spread, along) if spread > 0 else rows


def scale_to_gap(rows: Doubles, features: Floats, gap: float) -> Floats:
    """The rows scaled so that the median gap between the two highest logits of the tokens is ``gap``; float32."""
    if len(rows) == 1:
        return rows.astype(np.float32)
    gaps = []
    for part in _chunks(len(features)):
        logits = np.sort(features[part] @ rows.T, axis=1)
        gaps.append(logits[:, -1] - logits[:, -2])
    median = float(np.median(np.concatenate(gaps)))
    return (rows * (gap / median) if median > 0 else rows).astype(np.float32)


def _memberships(expert: NDArray[np.int64], is_negative: NDArray[np.bool_], experts: int) -> Doubles:
    """How much of each token belongs to each class, float64 [N, E]; the rows add up to 1."""
    own = np.eye(experts)
    others = (1.0 - own) / (experts - 1)
    return np.where(is_negative[:, None], others[expert], own[expert])


def _solve(
    features: Floats | Doubles, origin: Doubles, share: Doubles, means: Doubles, targets: Doubles, shrinkage: float
) -> Doubles:
    """S^-1 ``targets`` [H, E + 1]; ``means`` are relative to ``origin``.

    S = (1 - shrinkage)/N D'D + a I, where the rows of D [N + E E, H] are deviations from class means: of each token
    from the mean of its classes, and of classes from that mean for tokens that belong to several (negatives).
    """
    hidden, count = features.shape[1], len(features)
    between = _deviations_of_means(share, means)

    def deviations() -> Iterator[Doubles]:
        for part in _chunks(count):
            yield features[part] - origin - share[part] @ means
        yield between

    trace = sum(float(np.sum(d * d)) for d in deviations()) / count
    if trace == 0:
        return targets
    ridge, factor = shrinkage * trace / hidden, (1.0 - shrinkage) / count
    if count + len(between) >= hidden:
        covariance = ridge * np.eye(hidden)
        for d in deviations():
            covariance += factor * (d.T @ d)
        return np.asarray(np.linalg.solve(covariance, targets))
    # Woodbury: a system of the size of the tokens instead of the hidden size.
    d = np.concatenate(list(deviations()))
    gram = factor * (d @ d.T) + ridge * np.eye(len(d))
    return np.asarray((targets - factor * (d.T @ np.linalg.solve(gram, d @ targets))) / ridge)


def _deviations_of_means(share: Doubles, means: Doubles) -> Doubles:
    """For tokens that belong to several classes: the classes' deviations from their mean, weighted; [E E or 0, H]."""
    mixed, counts = np.unique(share[share.max(1) < 1], axis=0, return_counts=True)
    found = [np.sqrt(n * s)[:, None] * (means - s @ means) for s, n in zip(mixed, counts, strict=True)]
    return np.concatenate([np.zeros((0, means.shape[1])), *found])


def _chunks(count: int) -> Iterator[slice]:
    """Parts of a token axis, so that float64 copies stay small."""
    return (slice(start, start + _CHUNK) for start in range(0, count, _CHUNK))


def _norm(array: Doubles) -> float:
    return float(np.linalg.norm(array))


# Degeneracy -----------------------------------------------------------------------------------------------


def condition_number(rows: Floats | Doubles, *, is_centred: bool = False) -> float:
    """Largest over smallest singular value of a layer's rows [E, H], in float64; infinite if the smallest is zero.

    ``is_centred``: rows that add up to zero, as `discriminant_rows` makes them, have rank E - 1 at most; the last
    singular value says nothing then and is left out.
    """
    values = np.linalg.svd(np.asarray(rows, np.float64), compute_uv=False)
    values = values[: len(rows) - 1] if is_centred and len(rows) > 1 else values
    return float(values[0] / values[-1]) if values[-1] > 1e-7 * values[0] else math.inf


def is_degenerate(rows: Floats | Doubles, *, is_centred: bool = False) -> bool:
    """Whether a layer's rows hardly tell some experts apart.

    Rows of unit length: their condition number is above 5 (two rows: a cosine above 0.92), as in arcee mergekit.
    Centred rows: two have a cosine above 0.98, or the rank is below E - 1. Their condition number would also be large
    where one expert is merely further away than others; for two experts, always opposite, only zero rows count.
    """
    if len(rows) == 1:
        return False
    if not is_centred:
        return condition_number(rows) > _MAX_CONDITION
    exact = np.asarray(rows, np.float64)
    units = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    cosines = (units @ units.T)[~np.eye(len(rows), dtype=bool)]
    return bool(cosines.max() > _MAX_COSINE) or math.isinf(condition_number(rows, is_centred=True))
