"""Router rows beside plain formulas, and what must hold for any features."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from mergekit.moe.report import RoutingReport, routing_report
from mergekit.moe.routers import (
    condition_number,
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

HIDDEN = 31


def tokens(experts: int, each: int, negatives: int = 0, hidden: int = HIDDEN, seed: int = 0):
    """Tokens about a point far from the origin, by class: (features float32, expert, is negative)."""
    rng = np.random.default_rng(seed)
    middle, axes = 5 * rng.standard_normal(hidden), rng.uniform(0.1, 3, hidden)
    centres = middle + rng.standard_normal((experts, hidden))
    expert = np.repeat(np.arange(experts), each + np.arange(experts))
    x = centres[expert] + axes * rng.standard_normal((len(expert), hidden))
    far = np.repeat(np.arange(experts), negatives)
    x = np.concatenate([x, middle + 2 * axes * rng.standard_normal((len(far), hidden))])
    is_negative = np.arange(len(x)) >= len(expert)
    return x.astype(np.float32), np.concatenate([expert, far]), is_negative


def dense_rows(x, expert, is_negative, experts, shrinkage):
    """The formula with nothing saved: every token copied into each class that it belongs to, S formed and inverted."""
    x = x.astype(np.float64)
    members = []
    for c in range(experts):
        weight = np.where(is_negative, (expert != c) / (experts - 1), expert == c)
        members.append((weight, (weight @ x) / weight.sum()))
    means = np.stack([mean for _, mean in members])
    within = sum(((x - mean) * weight[:, None]).T @ (x - mean) for weight, mean in members) / len(x)
    size = x.shape[1]
    covariance = (1 - shrinkage) * within + shrinkage * np.trace(within) / size * np.eye(size)
    inverse = np.linalg.inv(covariance)
    middle = means.mean(0)
    rows = (means - middle) @ inverse
    # Least distance in the metric of S, so that rows . middle = 0.
    along = inverse @ middle
    return rows - np.outer(rows @ middle / (middle @ along), along)


# Discriminants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [2, 3, 5])
@pytest.mark.parametrize("negatives", [0, 4])
@pytest.mark.parametrize("each", [3, 60], ids=["fewer tokens than sizes", "more tokens"])
def test_discriminants_are_the_formula(experts, negatives, each):
    x, expert, is_negative = tokens(experts, each, negatives, hidden=97)
    for shrinkage in (0.1, 0.5, 1.0):
        expected = dense_rows(x, expert, is_negative, experts, shrinkage)
        found = discriminant_rows(x, expert, is_negative, experts, shrinkage)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_full_shrinkage_points_where_plain_means_do():
    x, expert, is_negative = tokens(3, 9)
    found = [discriminant_rows(x, expert, is_negative, 3, shrinkage) for shrinkage in (None, 1.0)]
    np.testing.assert_allclose(*[rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in found], atol=1e-9)


def test_plain_means_by_hand():
    x = np.asarray([[1, 0, 0], [3, 0, 0], [0, 2, 0], [0, 0, 6]], np.float32)
    rows = discriminant_rows(x, np.asarray([0, 0, 1, 2]), np.zeros(4, bool), 3, None)
    middle = np.asarray([2, 2, 6]) / 3
    means = np.asarray([[2, 0, 0], [0, 2, 0], [0, 0, 6]], float)
    differences = means - middle
    expected = differences - np.outer(differences @ middle, middle) / (middle @ middle)
    np.testing.assert_allclose(rows, expected, atol=1e-12)


@pytest.mark.parametrize("experts", [2, 3, 6])
@pytest.mark.parametrize("shrinkage", [None, 0.5])
def test_equal_logits_in_the_middle(experts, shrinkage):
    x, expert, is_negative = tokens(experts, 9)
    rows = scale_to_gap(discriminant_rows(x, expert, is_negative, experts, shrinkage), x, 4.0)
    middle = np.stack([x[expert == e].mean(0) for e in range(experts)]).mean(0)
    logits = rows @ middle
    assert np.ptp(logits) < 1e-4 * np.abs(rows @ x.T).max()
    assert np.abs(rows.sum(0)).max() < 1e-5 * np.abs(rows).max()


def test_order_of_tokens_is_of_no_account():
    x, expert, is_negative = tokens(3, 20, 3)
    order = np.random.default_rng(5).permutation(len(x))
    found = [discriminant_rows(*(a[o] for a in (x, expert, is_negative)), 3, 0.5) for o in (slice(None), order)]
    np.testing.assert_allclose(*found, atol=1e-10 * np.abs(found[0]).max())


def test_same_input_same_bytes():
    x, expert, is_negative = tokens(3, 20, 3)
    first, second = (discriminant_rows(x, expert, is_negative, 3, 0.5).tobytes() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("shrinkage", [None, 0.5])
def test_units_of_the_features_are_of_no_account(shrinkage):
    x, expert, is_negative = tokens(3, 20, 3)
    small = (x * np.float32(1 / 1024)).astype(np.float32)
    for features in (x, small):
        rows = scale_to_gap(discriminant_rows(features, expert, is_negative, 3, shrinkage), features, 4.0)
        logits = features.astype(np.float64) @ rows.T
        if features is x:
            expected = logits
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_discriminants_find_classes_that_means_do_not():
    """One noisy direction hides the classes from means; the spread of tokens tells it from the rest."""
    rng = np.random.default_rng(2)
    expert = np.repeat([0, 1], 300)
    x = rng.standard_normal((600, HIDDEN))
    x[:, 0] += 12 * rng.standard_normal(600) + 2 * expert
    x[:, 1] += 2 * expert
    x = (x + 3).astype(np.float32)
    right = {}
    for shrinkage in (None, 0.1):
        rows = discriminant_rows(x[::2], expert[::2], np.zeros(300, bool), 2, shrinkage)
        right[shrinkage] = ((x[1::2] @ rows.T).argmax(1) == expert[1::2]).mean()
    assert right[None] < 0.7
    assert right[0.1] > 0.8


def test_negatives_push_away():
    x, expert, is_negative = tokens(3, 9)
    stray = x.mean(0) + np.float32(3) * np.random.default_rng(4).standard_normal((30, HIDDEN)).astype(np.float32)
    plain = discriminant_rows(x, expert, is_negative, 3, 0.5)
    more = np.concatenate([x, stray])
    of = np.concatenate([expert, np.zeros(30, int)])
    pushed = discriminant_rows(more, of, np.arange(len(more)) >= len(x), 3, 0.5)
    assert (stray @ pushed.T).argmax(1).tolist().count(0) < (stray @ plain.T).argmax(1).tolist().count(0)


def test_classes_that_are_one_give_zero_rows():
    """Rounding errors must not be blown up into a router."""
    x = np.repeat(np.random.default_rng(0).standard_normal((5, HIDDEN)), 2, axis=0).astype(np.float32)
    rows = discriminant_rows(x, np.arange(10) % 2, np.zeros(10, bool), 2, 0.5)
    assert not scale_to_gap(rows, x, 4.0).any()
    same = np.ones((6, HIDDEN), np.float32)
    assert not discriminant_rows(same, np.arange(6) % 3, np.zeros(6, bool), 3, 0.5).any()


def test_one_token_each_is_enough_for_rows():
    x = np.asarray([[1, 2, 3], [3, 2, 1.5]], np.float32)
    for shrinkage in (None, 0.5):
        rows = discriminant_rows(x, np.asarray([0, 1]), np.zeros(2, bool), 2, shrinkage)
        assert (scale_to_gap(rows, x, 1.0) @ x.T).argmax(0).tolist() == [0, 1]


def test_one_expert_gives_zero_rows():
    rows = discriminant_rows(np.ones((4, 7), np.float32), np.zeros(4, int), np.zeros(4, bool), 1, 0.5)
    assert scale_to_gap(rows, np.ones((4, 7), np.float32), 4.0).tolist() == [[0.0] * 7]


@pytest.mark.parametrize("gap", [1.0, 4.0])
def test_scale_sets_the_median_gap(gap):
    x, expert, is_negative = tokens(4, 700)
    rows = scale_to_gap(discriminant_rows(x, expert, is_negative, 4, 0.5), x, gap)
    logits = np.sort(x.astype(np.float64) @ rows.T, axis=1)
    assert np.median(logits[:, -1] - logits[:, -2]) == pytest.approx(gap, rel=1e-5)


def test_when_there_is_enough():
    assert is_enough(np.asarray([6, 6]), np.asarray([9, 9]))
    assert is_enough(np.asarray([6, 1]), np.asarray([9, 50]))
    assert not is_enough(np.asarray([6, 5]), np.asarray([500, 49]))
    assert gap_for(np.asarray([4, 9])) == 4.0
    assert gap_for(np.asarray([3, 9])) == 1.0


# Directions of prompts ------------------------------------------------------------------------------------


def test_pooling_by_loops():
    lengths = np.asarray([3, 1, 4])
    x = np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32)
    parts = [x[:3], x[3:4], x[4:]]
    np.testing.assert_array_equal(last_tokens(x, lengths), [part[-1] for part in parts])
    np.testing.assert_allclose(prompt_means(x, lengths), [part.mean(0) for part in parts], rtol=1e-6)


def test_unit_rows_by_hand():
    vectors = np.asarray([[2, 0], [4, 0], [0, 3], [0, 9], [5, 5.0]])
    expert, is_negative = np.asarray([0, 0, 0, 0, 1]), np.asarray([False, False, True, True, False])
    root = math.sqrt(0.5)
    means = np.asarray([3, -6]) / math.hypot(3, 6)
    np.testing.assert_allclose(unit_rows(vectors, expert, is_negative, 2), [means, [root, root]], rtol=1e-6)
    sums = unit_rows(vectors, expert, is_negative, 2, unit_sums=True)
    np.testing.assert_allclose(sums, [[root, -root], [root, root]], rtol=1e-6)


def test_unit_rows_of_nothing_are_zero():
    vectors = np.asarray([[1.0, 2], [1, 2]])
    rows = unit_rows(vectors, np.asarray([0, 0]), np.asarray([False, True]), 2)
    assert rows.tolist() == [[0, 0], [0, 0]]


# Random ---------------------------------------------------------------------------------------------------


def test_random_rows_belong_to_seed_and_layer():
    for make in (random_rows, uniform_rows):
        rows = make(3, 5, 64, 1)
        assert rows.dtype == np.float32
        assert rows.shape == (3, 5, 64)
        assert rows.tobytes() == make(3, 5, 64, 1).tobytes()
        assert (make(2, 5, 64, 1) == rows[:2]).all()
        assert not (make(3, 5, 64, 2) == rows).any()
        assert not (rows[0] == rows[1]).any()


def test_random_rows_are_what_they_say():
    normal = random_rows(4, 8, 1024, 0).astype(np.float64) * 32
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    assert 0.045 < (np.abs(normal) > 1.96).mean() < 0.055
    flat = uniform_rows(4, 8, 1024, 0).astype(np.float64) * 32
    assert abs(flat).max() <= 1
    assert abs(flat.mean()) < 0.02
    assert abs(flat.std() - math.sqrt(1 / 3)) < 0.01


def test_random_rows_are_known():
    """NumPy promises Philox's words, not what it makes of them."""
    assert random_rows(1, 1, 3, 0).ravel() == pytest.approx([0.02148042, -0.68457013, 1.00741446])
    assert uniform_rows(1, 1, 3, 0).ravel() == pytest.approx([-0.09497444, 0.01827328, 0.33293059])


# Degeneracy -----------------------------------------------------------------------------------------------


def test_condition_number_of_two_rows_is_their_angle():
    for cosine in (0.0, 0.5, 0.9):
        rows = np.asarray([[1, 0], [cosine, math.sqrt(1 - cosine**2)]])
        assert condition_number(rows) == pytest.approx(math.sqrt((1 + cosine) / (1 - cosine)))
    assert condition_number(np.ones((2, 3))) == math.inf


def test_degenerate_unit_rows():
    rng = np.random.default_rng(0)
    apart = rng.standard_normal((4, 64))
    apart /= np.linalg.norm(apart, axis=1, keepdims=True)
    assert not is_degenerate(apart)
    assert is_degenerate(np.concatenate([apart[:3], apart[:1] + 0.01]))


def test_degenerate_centred_rows():
    rng = np.random.default_rng(0)
    centred = rng.standard_normal((4, 64))
    centred -= centred.mean(0)
    assert condition_number(centred) > 1e7
    assert condition_number(centred, is_centred=True) < 2
    assert not is_degenerate(centred, is_centred=True)
    two = np.stack([centred[0], -centred[0]])
    assert not is_degenerate(two, is_centred=True), "opposite rows are as far apart as can be"
    assert is_degenerate(0 * two, is_centred=True)
    alike = np.stack([centred[0], centred[0] + 0.001 * centred[1], -2 * centred[0] - 0.001 * centred[1]])
    assert is_degenerate(alike, is_centred=True)
    line = np.stack([centred[0], -2 * centred[0], 0 * centred[0], centred[0] * 1.0])
    assert is_degenerate(line, is_centred=True)
    assert not is_degenerate(centred[:1] * 0, is_centred=True), "one expert has no choice"


# Report ---------------------------------------------------------------------------------------------------


def report(**changes) -> RoutingReport:
    chosen = np.asarray([[[0, 1], [0, 2], [1, 0], [2, 1]], [[1, 0], [0, 1], [1, 2], [2, 0]]])
    likely = np.asarray([[[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3, [0, 0, 1]]] * 2, np.float32)
    options = {"degenerate": (1,), "notes": ("a note",), **changes}
    return routing_report(chosen, likely, np.asarray([0, 0, 1, 2]), ["org/code", "prose", "a|b"], [True] * 3, **options)


def test_report_by_hand():
    found = report()
    assert found.layers[0].accuracy == (1.0, 1.0, 1.0)
    assert found.layers[1].accuracy == (0.5, 1.0, 1.0)
    assert found.accuracy == pytest.approx((6 - 0.5) / 6)
    # Expert 0 has two tokens, which weigh 1/6 each; a place is half a token.
    np.testing.assert_allclose(found.layers[0].load, [4 / 12, 5 / 12, 3 / 12])
    assert found.layers[0].entropy == pytest.approx(math.log(2) / 6 + math.log(3) / 3)
    assert found.entropy_share == pytest.approx(found.layers[0].entropy / math.log(3))
    assert found.tokens == (2, 1, 1)
    assert sum(found.layers[1].load) == pytest.approx(1)


def test_report_in_words():
    found = report()
    assert found.table()[0].startswith("routing: 92 % of 4 held-out tokens find their expert (by chance 33 %)")
    assert found.table()[-2:] == ["a note", "router rows hardly tell some experts apart in layers 1"]
    assert len({len(line) for line in found.table()[2:5]}) == 1
    page = found.markdown()
    assert "| 1 | \u2593 50 | \u2588 100 | \u2588 100 |" in page
    assert "code right" in page
    assert "a\\|b" in page
    assert found.to_json() == report().to_json()
    one, likely = np.zeros((1, 1, 1), int), np.ones((1, 1, 1), np.float32)
    optimistic = routing_report(one, likely, np.zeros(1, int), ["a"], [False])
    assert "optimistic: all experts" in "\n".join(optimistic.table())
    assert optimistic.entropy_share == 0


def test_report_without_tokens():
    empty = np.zeros((0, 0, 2))
    none = routing_report(empty.astype(int), empty.astype(np.float32), np.zeros(0, int), ["a", "b"], [False] * 2)
    assert none.accuracy is None
    assert none.table() == ["routing was not measured: no prompts"]
    assert none.markdown() == "Routing was not measured: no prompts.\n"


def test_routers_need_numpy_only():
    heavy = {"torch", "transformers", "numba", "scipy"}
    code = f"import sys, mergekit.moe.routers; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
