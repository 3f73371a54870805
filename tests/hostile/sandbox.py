"""Run the command line in a forked child with limits, and say which of our promises it broke.

The parent imports everything once (``preload``) and stays without threads, so that forking is cheap and safe.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "MEMORY",
    "SECONDS",
    "Outcome",
    "broken",
    "environment",
    "grown",
    "limit",
    "preload",
    "resident",
    "run",
    "run_together",
    "watch",
]

SECONDS = 30
"""A command may take that long."""
MEMORY = 500 << 20
"""A command may take that many bytes more than the process that it was forked from."""
_SPACE = 4 << 30
"""Bytes of address space beyond the parent's: a last resort that keeps this machine alive."""
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
_NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "socket.connect", "socket.getaddrinfo",
          "socket.sendto", "ftplib.connect", "urllib.Request", "webbrowser.open")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a command left behind. ``events``: what it should not have done; ``changed``: files outside of ``out``."""

    code: int
    out: str
    err: str
    seconds: float
    memory: int
    timed_out: bool = False
    events: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


Task = tuple[Callable[[], object], Sequence[str]]
"""A function that prepares a folder, and the command that is run there then."""


def environment(root: Path) -> dict[str, str]:
    """Variables for a process that runs commands: a home of its own, no network, kernels from the usual cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kernels = os.environ.get("MERGEKIT_KERNEL_CACHE") or str(home / "mergekit" / "kernels")
    for name in ("home", "tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
    return {
        "HOME": str(root / "home"), "TMPDIR": str(root / "tmp"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(root / "home" / "huggingface"), "MERGEKIT_KERNEL_CACHE": kernels, "COLUMNS": "80",
        "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    }  # fmt: skip


def preload(*, torch: bool = True, mixtures: bool = True) -> None:
    """Import what commands need, and compile the kernels. What is not imported makes forks cheaper.

    ``torch`` is for pickles, ``mixtures`` for running the models of a mixture.
    """
    import jinja2.sandbox  # noqa: F401
    import tokenizers  # noqa: F401

    import mergekit.checkpoint.pickles
    import mergekit.cli.lora
    import mergekit.cli.merge
    import mergekit.cli.moe
    import mergekit.cli.plan
    import mergekit.hub  # noqa: F401
    from command import warm_up
    from mergekit import api, execute, kernels, moe, output, planning, recipe, vocab  # noqa: F401

    if torch or mixtures:
        import torch as library

        library.set_num_threads(1)
    if mixtures:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
    warm_up()


def resident() -> int:
    """Bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def grown(before: int) -> int:
    """Bytes by which this process has at some time been larger than ``before``."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def limit(seconds: int = 2 * SECONDS) -> None:
    """Bound what this process can take, in case that nobody watches."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _SPACE, size + _SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def watch(root: Path, tell: Callable[[str], object]) -> None:
    """From now on ``tell`` of each attempt to run something, to reach the network, or to write outside of ``root``."""
    kernels = os.environ.get("MERGEKIT_KERNEL_CACHE") or "/nowhere"
    torch = f"{tempfile.gettempdir()}/torchinductor_"  # torch makes it when it is imported
    allowed = (f"{root}/", f"{kernels}/", torch, "/dev/null", "/dev/shm/", "/proc/self/")

    def outside(path: object) -> bool:
        if not isinstance(path, (str, bytes)):
            return False
        return not (os.path.abspath(os.fsdecode(path)) + "/").startswith(allowed)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(arguments[2], int) and arguments[2] & _WRITES and outside(arguments[0]):
                tell(f"opens {arguments[0]!r} for writing")
        elif event in _PATHS:
            if any(outside(argument) for argument in arguments[:2]):
                tell(f"{event} {arguments!r:.200}")
        elif event in _NEVER or (event == "subprocess.Popen" and "render.py" not in str(arguments[1])):
            tell(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)


def _state(root: Path) -> dict[str, tuple[int, ...]]:
    """Every file below ``root`` but the output and what we log: type, and of files size and time of change."""
    left_out = {str(root): "log", str(root / "work"): "out", str(root / "tmp"): "torchinductor_"}  # the last by torch
    found: dict[str, tuple[int, ...]] = {}
    for folder, names, files in os.walk(root):
        skipped = left_out.get(folder)
        names[:] = [
            name
            for name in names
            if skipped is None or not (name == skipped or (skipped[-1] == "_" and name.startswith(skipped)))
        ]
        for name in (*names, *files):
            status = os.lstat(os.path.join(folder, name))
            is_folder = stat.S_ISDIR(status.st_mode)
            state = () if is_folder else (status.st_size, status.st_mtime_ns)
            found[os.path.relpath(os.path.join(folder, name), root)] = (status.st_mode, *state)
    return found


def run(command: Sequence[str], root: Path, seconds: float = SECONDS) -> Outcome:
    """``mergekit COMMAND`` in the folder ``root/work``, as a user would run it there; the output goes to ``out``."""
    return run_together([(lambda: None, command)], root, seconds)[0]


def run_together(tasks: Sequence[Task], root: Path, seconds: float = SECONDS) -> list[Outcome]:
    """Several commands in one child, each after a function that prepares ``root/work`` for it.

    If the child dies or is late, the last outcome tells it, and the commands after that have none. Memory is that of
    all commands up to each.
    """
    log = root / "log"
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir()
    started = time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _child(tasks, root)
    watcher = select.poll()
    descriptor = os.pidfd_open(child)
    watcher.register(descriptor, select.POLLIN)
    timed_out = not watcher.poll(int(seconds * 1000))
    os.close(descriptor)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # the child if it is late, and whatever it left running
    if timed_out:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    lines = _text(log / "records").splitlines()
    memory = usage.ru_maxrss * 1024 - int(_text(log / "size") or 0)
    found = [Outcome(**json.loads(line)) for line in lines if line.endswith("}")][: len(tasks)]
    if len(found) < len(tasks):
        code, events = os.waitstatus_to_exitcode(status) or 97, _text(log / "events").splitlines()
        shown = _text(log / "out"), _text(log / "err")
        found.append(Outcome(code, *shown, time.monotonic() - started, memory, timed_out, events))
    return found


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else ""


def _child(tasks: Sequence[Task], root: Path) -> None:
    """Run the program on each task, and write down what came of it; never returns."""
    try:
        os.setsid()
        log, writable = root / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        (log / "size").write_text(str(size := resident()))
        files = [os.open(log / name, writable | os.O_APPEND) for name in ("out", "err", "events", "records")]
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (files[0], 1), (files[1], 2)):
            os.dup2(source, target)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False, encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", closefd=False, encoding="utf-8")
        os.fsync = lambda descriptor: None  # type: ignore[assignment]  # many tiny runs would wait for the disk
        limit()
        watch(root, lambda text: os.write(files[2], text.encode("utf-8", "backslashreplace") + b"\n"))
        for prepare, command in tasks:
            os.chdir(root)
            prepare()
            os.chdir(root / "work")
            for descriptor in files[:3]:
                os.ftruncate(descriptor, 0)
            before, started = _state(root), time.monotonic()
            code = _call(command)
            outcome = Outcome(
                code, _text(log / "out"), _text(log / "err"), time.monotonic() - started, grown(size), False,
                _text(log / "events").splitlines(), _changes(before, _state(root)),
            )  # fmt: skip
            os.write(files[3], json.dumps(outcome.record()).encode() + b"\n")
        os._exit(0)
    finally:
        os._exit(96)


def _call(command: Sequence[str]) -> int:
    """The exit code of the program."""
    from mergekit.cli.main import main

    sys.argv = ["mergekit", *command]
    code = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, resource.RLIM_INFINITY))  # not yet while tasks are prepared
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 98
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return code


def _changes(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> list[str]:
    changed = [f"new {path}" for path in after if path not in before]
    return changed + [
        f"{'changed' if path in after else 'gone'} {path}" for path in before if after.get(path) != before[path]
    ]


def broken(outcome: Outcome) -> list[str]:
    """Our promises that a run on hostile input broke, in words; an exit code of 0 breaks none."""
    shown = outcome.out + outcome.err
    told = [line for line in outcome.err.splitlines() if not line.startswith(("warning: ", "note: "))]
    faults = [f"did what it never may: {event}" for event in outcome.events]
    faults += [f"outside of the output: {change}" for change in outcome.changed]
    if outcome.timed_out:
        return [*faults, f"took more than {outcome.seconds:.0f} s"]
    if outcome.code not in (0, 1, 2):
        faults.append(f"ended with {outcome.code}: {outcome.err[-500:]}")
    if outcome.memory > MEMORY:
        faults.append(f"took {outcome.memory >> 20} MB more than a plain process")
    if found := _CONTROL.search(shown):
        faults.append(
            f"printed the control character {found[0]!r}: {shown[max(found.start() - 60, 0) : found.end() + 60]!r}"
        )
    for phrase in ("Traceback", "bug in mergekit", "out of memory", "MemoryError", "RuntimeWarning", ".py:"):
        if phrase in outcome.err:
            faults.append(f"said {phrase!r}: {outcome.err[-500:]}")
    if outcome.code in (1, 2):
        if not any(line.startswith("error: ") for line in told):
            faults.append(f"did not say what is wrong: {outcome.err[:500]!r}")
        if len(told) > 5 or max(map(len, told), default=0) > 1000:
            faults.append(f"said too much: {len(told)} lines, {len(outcome.err)} characters")
        if outcome.out:
            faults.append(f"printed results besides its refusal: {outcome.out[:200]!r}")
    return faults
