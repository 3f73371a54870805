"""Files that users name: written whole or not at all; pages never over something that is no page of ours."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mergekit.errors import RunError, UsageError

__all__ = ["check_page", "write_page", "write_whole"]

_MARK = b'<meta name="generator" content="mergekit '
"""What all pages have in their heads (``output/report/frame.html.j2``)."""
_HEAD = 4096


def check_page(path: Path) -> None:
    """UsageError if a page can't be written to ``path``, or would replace something else than a page of mergekit."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file for the page")
    if not target.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder '{path.parent}'; make it, or choose another name")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: it may not be written here; choose another name")
    if not _is_ours(target):
        raise UsageError(f"{path} is there, and no page of mergekit; choose another name")


def write_page(path: Path, text: str) -> None:
    """Write a page; RunError if that fails."""
    check_page(path)
    try:
        write_whole(path, text.encode("utf-8", "backslashreplace"))  # a file's name need not be text
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, where links lead; into a device or a pipe as it is. OSError."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        target.write_bytes(content)
        return
    partial = target.with_name(f".{target.name}.part")
    try:
        partial.write_bytes(content)
        os.replace(partial, target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _is_ours(target: Path) -> bool:
    """Whether nothing is lost if ``target`` is written: it is not there, is empty, a device or a page of ours."""
    try:
        if not stat.S_ISREG(target.stat().st_mode):
            return True
        with target.open("rb") as stream:
            head = stream.read(_HEAD)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return not head or _MARK in head
