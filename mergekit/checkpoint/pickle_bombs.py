"""Pickles that are small and describe something without end: lists of lists of lists, each used many times.

torch's restricted reader runs no code, but it compares, hashes and prints what it reads. This looks at a pickle's
instructions alone, and counts the objects that would be met by walking through the result.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any

__all__ = ["is_bomb"]

_MOST_OBJECTS = 20_000_000
"""A checkpoint of 100,000 tensors has a tenth of that."""
_PUT, _GET = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_ADDED = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
_ADDED_FROM_MARK = ("APPENDS", "SETITEMS", "ADDITEMS")


class _Object:
    """What an instruction makes: its parts, and how many objects a walk through it meets (0: not counted yet)."""

    __slots__ = ("parts", "total")

    def __init__(self, parts: list[_Object]) -> None:
        self.parts, self.total = parts, 0


def is_bomb(stream: IO[bytes]) -> bool:
    """Whether the pickle that starts here makes an object that unfolds enormously, or contains itself.

    Reads up to its end. Of a damaged one, what comes before the damage counts: a reader may get as far.
    """
    made: list[_Object] = []
    try:
        _interpret(stream, made)
    except (ValueError, IndexError, KeyError, OverflowError, EOFError, MemoryError):
        pass
    return any(map(_is_enormous, made))


def _interpret(stream: IO[bytes], made: list[_Object]) -> None:
    """Gather all objects of a pickle in ``made``, without their values."""
    stack: list[_Object] = []
    marks: list[int] = []
    memo: dict[Any, _Object] = {}
    for code, argument, _ in pickletools.genops(stream):
        name = code.name
        if name in _PUT:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _GET:
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _ADDED:
            parts = _popped(stack, len(stack) - _ADDED[name])
            stack[-1].parts += parts
        elif name in _ADDED_FROM_MARK:
            parts = _popped(stack, marks.pop())
            stack[-1].parts += parts
        elif pickletools.markobject in code.stack_before:
            _push(stack, made, _popped(stack, marks.pop()), code)
        elif name not in ("PROTO", "FRAME"):
            _push(stack, made, _popped(stack, len(stack) - len(code.stack_before)), code)


def _push(stack: list[_Object], made: list[_Object], parts: list[_Object], code: pickletools.OpcodeInfo) -> None:
    new = [_Object(parts) for _ in code.stack_after]
    stack += new
    made += new


def _popped(stack: list[_Object], start: int) -> list[_Object]:
    if start < 0:
        raise IndexError("the stack is empty")
    parts = stack[start:]
    del stack[start:]
    return parts


def _is_enormous(root: _Object) -> bool:
    """Whether a walk meets too many objects, or the same one below itself."""
    open_now: set[int] = set()
    path = [root]
    while path:
        node = path[-1]
        if node.total:
            path.pop()
            continue
        waiting = [part for part in node.parts if not part.total]
        if id(node) not in open_now:
            open_now.add(id(node))
            if any(id(part) in open_now for part in waiting):
                return True
            path += waiting
        elif waiting:  # opened again below itself
            return True
        else:
            node.total = 1 + sum(part.total for part in node.parts)
            open_now.discard(id(node))
            path.pop()
            if node.total > _MOST_OBJECTS:
                return True
    return False
