"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["size"]


def size(nbytes: float) -> str:
    """A number of bytes with a unit, three digits: decimal units, as disks and hubs count.

    >>> size(912), size(4248), size(2_200_000_000)
    ('912 bytes', '4.25 kB', '2.2 GB')
    """
    if nbytes < 1000:
        return f"{nbytes:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        nbytes /= 1000
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
    return f"{nbytes / 1000:.3g} TB"
