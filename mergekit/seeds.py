"""Keys for the counter-based generator: the same bytes whatever the order, the threads or the device."""

from __future__ import annotations

from hashlib import blake2b

__all__ = ["stream_key"]


def stream_key(seed: int, tensor: str, position: int) -> tuple[int, int]:
    """The two 32-bit key words of the random stream of one model's share of one output tensor.

    ``seed`` is the recipe's seed, ``tensor`` the output name, ``position`` the model's place in the recipe.

    >>> stream_key(0, "a", 0) == stream_key(0, "a", 0) != stream_key(0, "a", 1)
    True
    """
    digest = blake2b(f"{seed}\0{tensor}\0{position}".encode(), digest_size=8, person=b"mergekit").digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
