"""Text of strangers inside Markdown: names that can't become markup, tables, fences that nothing closes early."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mergekit.errors import CONTROL

__all__ = ["escape", "fenced", "link", "table"]

_MARKUP = re.compile(r"[\\`*\[\]<>|#~!$]|(?<![^\W_])_|_(?![^\W_])|&(?=[#\w])")
_UNSEEN = re.compile(f"{CONTROL.pattern}+")


def escape(text: str) -> str:
    """``text`` as it is, in a line of Markdown.

    >>> escape("a|b_c *d*")
    'a\\\\|b_c \\\\*d\\\\*'
    """
    return _MARKUP.sub(lambda match: f"\\{match[0]}", _UNSEEN.sub(" ", text))


def link(text: str, address: str) -> str:
    """A link; ``address`` is one of ours, made of checked parts."""
    return f"[{escape(text)}]({address})"


def fenced(text: str, language: str = "") -> str:
    """A block of code, in a fence longer than any run of backticks in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A table of cells that are Markdown already; the last ``numbers`` columns are set flush right."""
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
