"""Paths of this machine in texts for other people: found, and replaced by what they may see.

What counts as one is told in docs/publishing.md. Where a text can be read in two ways it does.
"""

from __future__ import annotations

import re

from mergekit.planning.plan import Plan, Source

__all__ = ["local_paths", "without_paths"]

_URL = r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>`]*"
_START = (
    r"(?:file:/+"
    r"|~(?:[^\W\d][\w.-]*)?(?=[/\\])"
    r"|[A-Za-z]:(?=[/\\])"
    r"|/+(?=[\w@~-]|\.\w)(?![A-Z_]+\])(?!\d[\d.]*(?![\w/.])))"  # not [/INST], not the end of 1 /2
)
"""A file: address, ~ or ~name, a drive, or the root."""
_PLAIN = r"(?:[^\s'\"`,;:()\[\]{}<>|#]|(?<=\w)'(?=\w))"
_SPACE = rf"[ \t]+(?!{_START}|[A-Za-z][\w+.-]*://|\d+/\d|#)"
_ANY = re.compile(
    rf"(?P<url>{_URL})"
    rf"|(?P<key>^[ \t]*(?:- +)*(?:[\w.-]+:[ \t]+|- +))(?P<value>{_START}[^\n#'\"]*?)(?=[ \t]+#|[ \t]*$)"
    rf"|(?<=(?P<quote>['\"`]))(?P<quoted>{_START}[^\n]*?)(?=(?P=quote)(?!\w))"
    rf"|(?:(?<=[\s'\"`(\[{{,;=:+@])|^)(?P<plain>{_START}(?:(?:{_PLAIN}|{_SPACE})*[/\\])?{_PLAIN}*)",
    re.M,
)
"""A URL, which stays; or a path that is all of a YAML value, between quotes, or in other text: there its folders may
hold spaces, and its last part ends at one."""


def local_paths(text: str) -> list[str]:
    """The absolute paths in ``text``, in order: what tells strangers about this machine."""
    found = ((m["value"] or m["quoted"] or m["plain"] or "").strip().rstrip(".") for m in _ANY.finditer(text))
    return list(dict.fromkeys(filter(None, found)))


def without_paths(text: str, plan: Plan | None) -> str:
    """``text`` with each local path of a source replaced by the model's short name, any other by its last part.

    Without a plan no source is known.

    >>> without_paths("/home/jane doe/models/a has no tokenizer; see https://hf.co/x/y", None)
    'a has no tokenizer; see https://hf.co/x/y'
    """
    sources = plan.sources if plan else ()
    names = {source.reference: source.short for source in sources}
    for source in sources:
        path, short = _first(source)
        names.update({path: short, source.folder: short})
    paths = sorted((p for p in names if len(p) > 1 and p != names[p]), key=len, reverse=True)
    # Not inside another word or path: a folder may be called "base".
    found = re.compile(rf"(?<![\w./-])({'|'.join(map(re.escape, paths))})(?![\w/-])")
    return _ANY.sub(_last_part, found.sub(lambda match: names[match[1]], text) if paths else text)


def _last_part(match: re.Match[str]) -> str:
    path = match["value"] or match["quoted"] or match["plain"]
    if path is None:
        return match[0]
    parts = [part for part in re.split(r"[/\\]+", path) if part]
    return (match["key"] or "") + (parts[-1].lstrip("~") if parts else "")


def _first(source: Source) -> tuple[str, str]:
    """The path of a source, and the short form of that: of a model with an adapter, the model's own."""
    return source.reference.partition("+")[0], source.short.partition("+")[0]
