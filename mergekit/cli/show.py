"""Numbers, curves and tables as people read them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from textwrap import wrap

__all__ = ["duration", "folded", "listed", "size", "sparkline", "table"]

_BARS = "▁▂▃▄▅▆▇█"


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


def duration(seconds: float) -> str:
    """A time with a unit: seconds, then minutes, then hours.

    >>> duration(4.4), duration(200), duration(9000)
    ('4 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int | None = None) -> list[str]:
    """Lines of a table; the last ``numbers`` columns (default: all but the first) go to the right.

    >>> table(["a", "n"], [["long", "1"], ["b", "23"]])
    ['a      n', 'long   1', 'b     23']
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    right = len(widths) - 1 if numbers is None else numbers
    marks = ["<"] * (len(widths) - right) + [">"] * right
    return [
        "  ".join(f"{cell:{mark}{width}}" for cell, mark, width in zip(row, marks, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]


def sparkline(values: Sequence[float], top: float, most: int = 32) -> str:
    """A curve of at most ``most`` signs (each the mean of its values) from 0 to ``top``.

    >>> sparkline([0, 0.5, 1], 1)
    '▁▅█'
    """
    step = -(-len(values) // most) or 1
    means = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
    return "".join(_BARS[min(int(mean / top * len(_BARS)), len(_BARS) - 1) if top > 0 else 0] for mean in means)


def folded(text: str, first: str = "", rest: str = "") -> list[str]:
    """``text`` in lines no wider than the terminal, nor than 100 signs, which begin with ``first`` and ``rest``.

    Names stay whole, however long. Without a terminal the lines are of 100 signs.
    """
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    return wrap(text, max(width, 20), initial_indent=first, subsequent_indent=rest, break_long_words=False,
                break_on_hyphens=False)  # fmt: skip


def listed(sentences: Iterable[str]) -> list[str]:
    """Sentences as a list, folded.

    >>> listed(["One.", "Two."])
    ['* One.', '* Two.']
    """
    return [line for text in sentences for line in folded(text, "* ", "  ")]
