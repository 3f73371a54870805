"""The random numbers: Philox4x32-10 as published, the layout that philox.py documents, and what masks rest on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernel_cases import TORCH_DEVICES
from mergekit.kernels.accelerator import random_words
from mergekit.kernels.philox import fill_random
from mergekit.seeds import stream_key
from oracles import philox

KEY = stream_key(7, "model.layers.3.mlp.up_proj.weight", 2)
FAR = 2**34
"""The element whose counter is the first beyond 32 bits."""


def group(first: int, key: tuple[int, int] = KEY) -> np.ndarray:
    """The random numbers of one group of 1,024 elements."""
    state = np.empty(1024, np.uint32)
    fill_random(first, np.uint32(key[0]), np.uint32(key[1]), state)
    return state


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_oracle_gives_the_known_answers_of_random123(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert list(philox(tuple(counter), tuple(key))) == words


def test_known_answer_shows_in_the_kernel():
    assert [hex(word) for word in group(0, (0, 0))[::256]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("first", [0, 1024, 13 * 1024, FAR - 1024, FAR, 5 * FAR + 7 * 1024])
def test_element_takes_its_lane_of_its_counter(first):
    counters = [first // 1024 * 256 + j for j in range(256)]
    words = [philox((c & 0xFFFFFFFF, c >> 32, 0, 0), KEY) for c in counters]
    assert group(first).tolist() == [words[e % 256][e // 256] for e in range(1024)]


@pytest.mark.parametrize("device", TORCH_DEVICES)
@pytest.mark.parametrize("key", [KEY, (0, 0), (0xFFFFFFFF, 0xFFFFFFFF)])
@pytest.mark.parametrize("first", [0, 3 * 1024, FAR - 1024])
def test_torch_gives_the_same_words(device, key, first):
    wanted = np.concatenate([group(first + at, key) for at in range(0, 3 * 1024, 1024)])
    words = random_words(first, 2 * 1024 + 17, *key, torch.device(device))
    assert np.array_equal(words.cpu().numpy(), wanted[: len(words)])


@pytest.mark.parametrize("pieces", [(1024, 1024, 3072), (4096, 1024), (2048, 3000)])
def test_torch_words_do_not_depend_on_the_start(pieces):
    starts = np.cumsum((0, *pieces[:-1]))
    parts = [random_words(int(s), n, *KEY, torch.device("cpu")) for s, n in zip(starts, pieces, strict=True)]
    whole = random_words(0, sum(pieces), *KEY, torch.device("cpu"))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.53, 0.9])
def test_kept_share_is_binomial(density):
    words = np.concatenate([group(at) for at in range(0, 509 * 1024, 1024)])
    kept, deviation = (words < round(density * 2**32)).sum(), math.sqrt(len(words) * density * (1 - density))
    assert abs(kept - len(words) * density) < 4 * deviation


def test_bits_are_balanced():
    words = np.concatenate([group(at) for at in range(0, 251 * 1024, 1024)])
    ones = [int((words >> bit & 1).sum()) for bit in range(32)]
    assert max(abs(count - len(words) / 2) for count in ones) < 4.5 * math.sqrt(len(words) / 4)


def test_streams_of_different_models_and_neighbours_are_unrelated():
    mine, other = (
        np.concatenate([group(at, stream_key(0, "t", model)) for at in range(0, 251 * 1024, 1024)]) / 2**32
        for model in (1, 2)
    )
    for a, b in ((mine, other), (mine[1:], mine[:-1]), (mine[256:], mine[:-256]), (mine[1024:], mine[:-1024])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / math.sqrt(len(a))
