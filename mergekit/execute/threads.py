"""Follow a plan on the threads of one machine.

Workers take (phase, range) units of the tensor at hand; when none is left they open the next tensor, so at most about
one tensor per worker is in flight. Memory is a few blocks per worker, whatever the size of a tensor.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mergekit.execute.buffers import Buffers
from mergekit.execute.inputs import Inputs
from mergekit.execute.merge_work import make_work
from mergekit.execute.work import Sink, Work
from mergekit.planning.plan import OutputTensor, Plan

__all__ = ["default_threads", "run_threads", "run_works"]

Advance = Callable[[int], None]


def default_threads() -> int:
    """One thread for each processor that this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on every system
        return max(1, os.cpu_count() or 1)


def run_threads(
    plan: Plan,
    sink: Sink,
    *,
    outputs: Iterable[OutputTensor] | None = None,
    kernels: Any = None,
    threads: int | None = None,
    block: int | None = None,
    advance: Advance = lambda nbytes: None,
    opened: Callable[[str], None] = lambda name: None,
) -> None:
    """Compute ``outputs`` (default: all) of ``plan`` into ``sink``; the first fault stops all workers and is raised.

    ``advance`` is told of the bytes of each finished range of the result, ``opened`` of each tensor that is begun;
    both by any thread. ``block`` overrides the elements per block.
    """
    if kernels is None:
        from mergekit.kernels import cpu as kernels
    with Inputs(plan.sources) as inputs:
        tensors = plan.outputs if outputs is None else outputs

        def make(output: OutputTensor) -> Work:
            opened(output.name)
            return make_work(output, plan, inputs, kernels, sink, block)

        run_works(map(make, tensors), threads=threads, advance=advance)


def run_works(works: Iterator[Work], *, threads: int | None = None, advance: Advance = lambda nbytes: None) -> None:
    """Do all ``works``, each opened when there is nothing else to do; the first fault stops all and is raised."""
    _Pool(lambda: next(works, None), advance).run(threads or default_threads())


class _Pool:
    """A queue of units and the workers that empty it."""

    def __init__(self, open_next: Callable[[], Work | None], advance: Advance) -> None:
        self._open_next, self._advance = open_next, advance
        self._condition = threading.Condition()
        self._ready: deque[tuple[Work, int, int]] = deque()
        self._left: dict[int, int] = {}
        self._running = 0
        self._exhausted = False
        self._fault: BaseException | None = None

    def run(self, count: int) -> None:
        workers = [threading.Thread(target=self._loop, name=f"merge-{i}", daemon=True) for i in range(count)]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.1)
        except BaseException as error:  # an interrupt: stop the workers before the files are closed
            with self._condition:
                self._fault = self._fault or error
                self._condition.notify_all()
            for worker in workers:
                worker.join()
            raise
        if self._fault is not None:
            raise self._fault

    def _loop(self) -> None:
        buffers = Buffers()
        try:
            while (unit := self._take()) is not None:
                work, phase, index = unit
                work.run(phase, index, buffers)
                if phase == work.phases - 1:
                    self._advance(work.ranges[index][1] * work.output.dtype.size)
                self._done(work, phase)
        except BaseException as error:  # raised again by run()
            with self._condition:
                self._fault = self._fault or error
                self._condition.notify_all()

    def _take(self) -> tuple[Work, int, int] | None:
        with self._condition:
            while True:
                if self._fault is not None:
                    return None
                if self._ready:
                    self._running += 1
                    return self._ready.popleft()
                if not self._exhausted:
                    work = self._open_next()
                    if work is None:
                        self._exhausted = True
                    else:
                        self._push(work, 0)
                    continue
                if self._running == 0:
                    self._condition.notify_all()
                    return None
                self._condition.wait()

    def _push(self, work: Work, phase: int) -> None:
        """Queue a phase of a tensor, ahead of everything else: what it reads is still in the page cache."""
        while not work.ranges:  # an empty tensor has nothing to wait for
            work.reduce(phase)
            phase += 1
            if phase == work.phases:
                return
        self._left[id(work)] = len(work.ranges)
        self._ready.extendleft((work, phase, index) for index in reversed(range(len(work.ranges))))
        self._condition.notify_all()

    def _done(self, work: Work, phase: int) -> None:
        with self._condition:
            self._left[id(work)] -= 1
            is_last = self._left[id(work)] == 0
        if is_last:
            work.reduce(phase)
        with self._condition:
            if is_last:
                del self._left[id(work)]
                if phase + 1 < work.phases:
                    self._push(work, phase + 1)
            self._running -= 1
            self._condition.notify_all()
