"""Small tables for notebooks: plain HTML that takes on the colours of the page around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["html_table"]

_STYLE = "border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.5em 0"
_CELL = "padding: 0.15em 0.8em 0.15em 0; border-bottom: 1px solid rgba(128, 128, 128, 0.3)"


def html_table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = (), *, numbers: int = 0
) -> str:
    """A table with a caption above and a list of ``notes`` below; the last ``numbers`` columns go to the right.

    All texts are escaped, so names from files can't break out.

    >>> html_table("<a>", ["x"], [["1 < 2"]]).count("&lt;")
    2
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ["left"] * (len(cells) - numbers) + ["right"] * numbers
        return "".join(
            f'<{tag} style="{_CELL}; text-align: {side}">{escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<table style="{_STYLE}"><caption style="text-align: left; font-weight: bold">{escape(caption)}</caption>'
        f"<thead><tr>{line('th', head)}</tr></thead><tbody>{body}</tbody></table>"
        + (f"<ul>{listed}</ul>" if listed else "")
    )
