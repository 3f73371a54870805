"""How our kernels are compiled: without the interpreter lock, cached on disk where a cache can be written."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numba

__all__ = ["cache_dir", "kernel", "reassociating_kernel"]


def source_digest() -> str:
    """A digest of the kernels' source text.

    numba checks a cached function against its own file only, although it contains the functions it inlined from
    other files; so each state of the sources gets a folder of its own. (``accelerator`` and the files of torch hold
    none of them.)
    """
    digest = blake2b(digest_size=6)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.stem.startswith(("accelerator", "torch_")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_dir() -> Path:
    """Where compiled kernels are kept: below ``MERGEKIT_KERNEL_CACHE``, else below the user's cache folder.

    A folder that can't be written is replaced by a temporary one: kernels are then compiled again by each run.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("MERGEKIT_KERNEL_CACHE") or home / "mergekit" / "kernels") / source_digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        temporary = tempfile.mkdtemp(prefix="mergekit-kernels-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)


if not os.environ.get("NUMBA_CACHE_DIR"):
    numba.config.CACHE_DIR = str(cache_dir())


def kernel(function: Callable[..., Any]) -> Any:
    """Compile ``function`` for the CPU: no interpreter lock, strict IEEE order of operations, cached on disk."""
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


def reassociating_kernel(function: Callable[..., Any]) -> Any:
    """Like ``kernel``, but sums may be regrouped into vector lanes. For float32 sums over at most a block."""
    return numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})(function)
