"""Whether a run fits into the memory it may take: known before it starts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit.api.options import RunOptions
from mergekit.errors import UsageError

if TYPE_CHECKING:
    from mergekit.planning.plan import Plan

__all__ = ["admit", "machine_memory", "memory"]

_LIBRARIES = 175_000_000
"""The interpreter, numpy and numba with the kernels that a merge loads (measured: 162 to 170 MB)."""
_TORCH = 300_000_000
_TENSOR = 20_000
"""What the plan holds for a tensor of the output."""
_PLANNED = 135_000_000
"""What a process has had at most when a plan is ready, if it did nothing else before."""


def memory(plan: Plan, options: RunOptions | None = None) -> int:
    """About how many bytes of memory a run needs at its peak: the interpreter and libraries, the plan, and buffers.

    Calibrating the routers of a mixture takes more, and so does compiling the kernels, once on a machine.
    """
    from mergekit.execute import buffer_bytes, default_threads

    uses_torch = plan.device != "cpu" or any(source.pickled for source in plan.sources)
    libraries = _LIBRARIES + _TORCH * uses_torch + _TENSOR * len(plan.outputs)
    return libraries + buffer_bytes(plan, (options or RunOptions()).threads or default_threads())


def admit(plan: Plan, options: RunOptions) -> RunOptions:
    """``options`` with as many threads as fit; UsageError, with figures, if not even one does.

    The limit is ``max_memory``; without it, what the machine has.
    """
    from mergekit.execute import default_threads

    limit = options.max_memory if options.max_memory is not None else machine_memory()
    if limit is None:
        return options
    wanted = options.threads or default_threads()
    # Of a limit that the user set, what the process has taken for other things is used up.
    other = max(0, _peak() - _PLANNED) if options.max_memory is not None else 0
    for threads in range(wanted, 0, -1):
        needed = other + memory(plan, replace(options, threads=threads))
        if needed <= limit:
            return options if threads == wanted else replace(options, threads=threads)
    if options.max_memory is not None:
        raise UsageError(
            f"--max-memory {limit:,} bytes: this merge needs {_size(needed)} even with one thread; allow as much"
            f"{', or take a method that streams' if needed > 2 * _LIBRARIES else ''}"
        )
    raise UsageError(
        f"this merge needs about {_size(needed)} of memory even with one thread, and this machine has {_size(limit)}; "
        f"take a method that streams, or pass --max-memory {_size(needed)} to try it"
    )


def machine_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or its container's; None if that can't be told."""
    found = []
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        pass
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # no container, or one without a limit
            pass
    return min(found) if found else None


def _peak() -> int:
    """The most memory that this process has had so far, in bytes; 0 if that can't be told."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def _size(nbytes: int) -> str:
    """A size as the option takes it, rounded up."""
    return f"{-(-nbytes // 1_000_000)}MB"
