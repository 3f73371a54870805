"""Token maps: which row of a model's embeddings belongs to each id of another vocabulary."""

from __future__ import annotations

from itertools import repeat

import numpy as np

from mergekit.vocab.alphabet import as_bytes, as_text
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
        if output.kind != model.kind:  # tokens of the one may be added tokens here, spelt out
            for token, added in output.added.items():
                if found[added["id"]] < 0 and not added.get("special"):
                    found[added["id"]] = model.by_bytes.get(as_text(token, output.alphabet), -1)
        return found
    for token, number in output.ids.items():
        entry = output.added.get(token)
        if entry is None:
            spelt = as_bytes(token, output.alphabet)
            found[number] = model.by_bytes.get(spelt, -1)
            if found[number] < 0 and (whole := spelt.decode("utf-8", "replace")) in model.added:
                found[number] = model.ids[whole]
            continue
        exact = model.ids.get(token, -1) if token in model.added else -1
        if exact < 0 and not entry.get("special"):
            exact = model.by_bytes.get(as_text(token, output.alphabet), -1)
        found[number] = exact
    return found


def untold(vocabulary: Vocabulary, rows: int) -> np.ndarray:
    """Which of ``rows`` embedding rows belong to no token, bool [rows]."""
    free = np.ones(rows, np.bool_)
    ids = np.fromiter(vocabulary.ids.values(), np.int64, len(vocabulary.ids))
    free[ids[ids < rows]] = False
    return free
