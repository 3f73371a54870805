"""How tokens spell text: bytes behind printable letters, pieces with a sign for spaces, or plainly."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

__all__ = ["Alphabet", "alphabet_of", "as_bytes", "as_text", "is_byte"]

Alphabet = Literal["bytes", "pieces", "words", "plain"]
"""``bytes``: each letter stands for a byte (GPT-2); ``pieces``: a low line for a space, ``<0x0A>`` for a byte
(SentencePiece); ``words``: two signs before what continues a word (WordPiece); ``plain``: as it is."""

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def alphabet_of(record: Mapping[str, Any]) -> Alphabet:
    """The alphabet of a tokenizer, from its tokenizer.json."""
    model = record.get("model", {})
    types = set(_types(record.get("pre_tokenizer"))) | set(_types(record.get("decoder")))
    if "ByteLevel" in types:
        return "bytes"
    if model.get("type") == "WordPiece":
        return "words"
    if model.get("byte_fallback") is True or "Metaspace" in types or _SPACE in str(record.get("normalizer")):
        return "pieces"
    return "plain"


def as_bytes(token: str, alphabet: Alphabet) -> bytes:
    """The text that an ordinary token spells, in UTF-8. Where a word goes on, it is what ``plain`` would say.

    >>> as_bytes("\u0120caf\u00c3\u00a9", "bytes").decode(), as_bytes("\u2581caf\u00e9", "pieces").decode()
    (' caf\u00e9', ' caf\u00e9')
    >>> as_bytes("<0x0A>", "pieces")
    b'\\n'
    """
    if alphabet == "bytes":
        table = _letters()
        try:
            return bytes([table[letter] for letter in token])
        except KeyError:  # a token that was put in by hand
            return token.encode("utf-8", "surrogatepass")
    if alphabet == "pieces":
        match = _BYTE.fullmatch(token)
        if match:
            return bytes([int(match[1], 16)])
        token = token.replace(_SPACE, " ")
    return token.encode("utf-8", "surrogatepass")


def as_text(content: str, alphabet: Alphabet) -> bytes:
    """The text that an added token stands for, in UTF-8: its own characters."""
    return (content.replace(_SPACE, " ") if alphabet == "pieces" else content).encode("utf-8", "surrogatepass")


def is_byte(token: str, alphabet: Alphabet) -> bool:
    """Whether an ordinary token is there for a byte that no other token spells."""
    return alphabet == "pieces" and _BYTE.fullmatch(token) is not None


@lru_cache(maxsize=1)
def _letters() -> Mapping[str, int]:
    """The byte of each letter: printable Latin-1 stands for itself, the others for the bytes left, from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _types(node: Any) -> Iterator[str]:
    """The types of a component of a tokenizer and of its parts; nesting ends where hands would."""
    stack = [(node, 0)]
    while stack:
        part, depth = stack.pop()
        if isinstance(part, dict) and depth < 8:
            if isinstance(part.get("type"), str):
                yield part["type"]
            for key in ("pretokenizers", "decoders", "normalizers"):
                children = part.get(key)
                stack += [(child, depth + 1) for child in children] if isinstance(children, list) else []
