"""Token maps: which row of a model's embeddings belongs to each id of another vocabulary."""

from __future__ import annotations

from itertools import repeat

import numpy as np

from mergekit.vocab.alphabet import as_bytes
from mergekit.vocab.vocabulary import Vocabulary

__all__ = ["token_map", "untold"]


def token_map(output: Vocabulary, model: Vocabulary) -> np.ndarray:
    """For each id of ``output`` the id of the same token in ``model``, -1 where there is none; int64 [output.size].

    The same token is one of the same characters; between alphabets, an ordinary one that spells the same text.
    """
    found = np.full(output.size, -1, np.int64)
    count = len(output.ids)
    ids = np.fromiter(output.ids.values(), np.int64, count)
    if output.alphabet == model.alphabet:
        found[ids] = np.fromiter(map(model.ids.get, output.ids, repeat(-1)), np.int64, count)
        return found
    for token, number in output.ids.items():
        if token in output.added:
            exact = model.ids.get(token) if token in model.added else None
            spelt = token.encode("utf-8", "surrogatepass")
        else:
            exact, spelt = None, as_bytes(token, output.alphabet)
        found[number] = model.by_bytes.get(spelt, -1) if exact is None else exact
    return found


def untold(vocabulary: Vocabulary, rows: int) -> np.ndarray:
    """Which of ``rows`` embedding rows belong to no token, bool [rows]."""
    free = np.ones(rows, np.bool_)
    ids = np.fromiter(vocabulary.ids.values(), np.int64, len(vocabulary.ids))
    free[ids[ids < rows]] = False
    return free
