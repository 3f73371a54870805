"""One trial of the kill matrix: start a command, kill it or let its disk fail, look, run it again, compare."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cases import Case

__all__ = [
    "FAULTS", "STAGES", "STAGING", "Expected", "Kill", "Shot", "draw", "fingerprint", "look", "resume", "shoot",
    "undisturbed",
]  # fmt: skip

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAGING = ".mergekit-staging"
STAGES = (
    "start", "planning", "opening", "preparing", "writing", "committing", "finishing", "publishing", "cleaning",
    "after", "real command",
)  # fmt: skip
"""``start``: before mergekit is imported. ``real command``: without the wrapper, which alone knows stages."""
FAULTS = ("full", "document", "journal", "eio", "limit")
PACE = 0.02
_LONGEST = 180.0
_DRAWN = {"planning": 1, "opening": 1, "preparing": 1, "writing": 4, "committing": 4, "finishing": 3,
          "publishing": 7, "cleaning": 2, "after": 1}  # fmt: skip
"""Chances of the stages for kills that aim at one."""


@dataclass(frozen=True)
class Expected:
    """An undisturbed run: its files, and of a slow one the seconds of each stage and in all, and the bytes moved."""

    files: Mapping[str, str]
    shards: Mapping[str, str]
    old: Mapping[str, str]
    seconds: float
    real_seconds: float
    stages: Mapping[str, float]
    commits: int
    read: int
    written: int
    remarks: str


@dataclass(frozen=True)
class Kill:
    """What will be done to a run: a signal at ``seconds`` after its start (or after the ``stage`` begins for the
    ``times``-th time), or a ``fault`` of its disk."""

    name: str
    stage: str = ""
    times: int = 1
    seconds: float = 0.0
    fault: tuple[str, int] | None = None
    wrapped: bool = True


@dataclass
class Shot:
    """What came of it: where the run was, what the folder was then, and what was wrong.

    ``recorded`` are the tensors in the journal, ``moved`` whether shards may have left the staging folder since.
    """

    kill: Kill
    stage: str = ""
    ended: bool = False
    state: str = ""
    recorded: frozenset[str] = frozenset()
    moved: bool = False
    faults: list[str] = field(default_factory=list)


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with the digest of its bytes, the staging folder left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.parts[0] != STAGING and not path.is_dir():
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def command(case: Case, out: Path, wrapped: bool, pace: float = 0.0, fault: tuple[str, int] | None = None) -> list[str]:
    """The command of a case, or the wrapper that becomes it."""
    if not wrapped:
        return [sys.executable, "-m", "mergekit", *case.arguments(out)]
    settings = json.dumps({"log": str(out.parent / "log"), "pace": pace, "fault": fault})
    return [sys.executable, str(HERE / "slow_run.py"), settings, *case.arguments(out)]


def _start(words: Sequence[str], out: Path) -> subprocess.Popen[bytes]:
    (out.parent / "log").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with (out.parent / "stderr").open("wb") as stream:
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream
        )


def _run(words: Sequence[str], out: Path) -> int:
    process = _start(words, out)
    try:
        return process.wait(_LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return -1


def _log(out: Path) -> list[list[str]]:
    path = out.parent / "log"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line.split(" ") for line in lines]


def _stderr(out: Path) -> str:
    return (out.parent / "stderr").read_text(errors="replace")


def undisturbed(case: Case, folder: Path, old: Path | None = None, ways: Sequence[bool] = (False, True)) -> Expected:
    """Run a case by the real command, and once more slowly (``ways``: whether wrapped); both write the same."""
    made, seconds, remarks = [], [], ""
    for number, wrapped in enumerate(ways):
        out = folder / str(number) / "out"
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir(parents=True)
        if old:
            shutil.copytree(old, out)
        started = time.monotonic()
        code = _run(command(case, out, wrapped, PACE), out)
        seconds.append(time.monotonic() - started)
        if code:
            raise SystemExit(f"{case.name}: the undisturbed command ended with {code}:\n{_stderr(out)}")
        if not wrapped:
            remarks = _stderr(out)
        made.append(fingerprint(out))
    if made[0] != made[-1]:
        raise SystemExit(f"{case.name}: two undisturbed runs differ: {_differing(made[0], made[-1])}")
    log = _log(out)
    marks = [(line[1], float(line[2])) for line in log if line[0] == "stage"]
    stages: dict[str, float] = {}
    for (name, at), (_, until) in zip(marks, [*marks[1:], ("", marks[-1][1] + PACE * 8)], strict=True):
        stages[name] = stages.get(name, 0.0) + until - at
    read, written = map(int, log[-1][1:])
    commits = sum(name == "committing" for name, _ in marks)
    before = fingerprint(old) if old else {}
    shards = _tensors(folder / "0" / "out")
    return Expected(made[0], shards, before, seconds[-1], seconds[0], stages, commits, read, written, remarks)


def _tensors(folder: Path) -> dict[str, str]:
    """Every tensor with its file, by the files' own headers."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found.update({name: path.name for name in header if name != "__metadata__"})
    return found


def draw(rng: random.Random, expected: Expected, faulty: bool = False) -> Kill:
    """Choose how a run is disturbed: a fault of the disk, or a signal at a moment of its life."""
    if faulty:
        kind = rng.choice(FAULTS)
        if kind in ("full", "eio"):
            return Kill(kind, fault=(kind, rng.randrange(1, expected.written if kind == "full" else expected.read)))
        if kind == "limit":
            return Kill(kind, fault=(kind, rng.randrange(1 << 16, max(1 << 17, expected.written // 4))))
        return Kill(kind, fault=(kind, rng.randrange(0, 4)))
    name = rng.choices(("SIGKILL", "SIGTERM", "SIGINT"), (8, 1, 1))[0]
    way = rng.random()
    if way < 0.1:
        return Kill(name, seconds=rng.random() * expected.real_seconds, wrapped=False)
    if way < 0.4:
        return Kill(name, seconds=rng.random() * expected.seconds)
    known = [stage for stage in _DRAWN if stage in expected.stages]
    stage = rng.choices(known, [_DRAWN[s] for s in known])[0]
    times = rng.randint(1, max(1, expected.commits)) if stage == "committing" else 1
    length = expected.stages[stage] / (max(1, expected.commits) if stage == "committing" else 1)
    return Kill(name, stage, times, rng.random() * length)


def shoot(case: Case, out: Path, kill: Kill, expected: Expected) -> Shot:
    """Start the command, disturb it, and look at the folder."""
    shot = Shot(kill)
    process = _start(command(case, out, kill.wrapped, 0.0 if kill.fault else PACE, kill.fault), out)
    if not kill.fault:
        _wait_for(kill, process, out)
        if process.poll() is None:
            process.send_signal(getattr(signal, kill.name))
    try:
        code = process.wait(_LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
        shot.faults.append("it hung, or did not end when asked to")
    stages = [line[1] for line in _log(out) if line[0] == "stage"]
    shot.stage = (stages[-1] if stages else "start") if kill.wrapped else "real command"
    shot.ended = code == 0
    shot.state = look(out, expected)
    if shot.state == "half":
        shot.faults.append(f"a half-model: {_differing(expected.files, fingerprint(out))}")
    records = _journal(out)
    shot.recorded = frozenset(r["tensor"] for r in records if "tensor" in r)
    shot.moved = any("publishing" in r for r in records)
    shot.faults += _manners(shot, code, out, expected)
    return shot


def _wait_for(kill: Kill, process: subprocess.Popen[bytes], out: Path) -> None:
    started = time.monotonic()
    while kill.stage and process.poll() is None and time.monotonic() < started + _LONGEST:
        if sum(line[:2] == ["stage", kill.stage] for line in _log(out)) >= kill.times:
            break
        time.sleep(0.002)
    try:
        process.wait(kill.seconds)
    except subprocess.TimeoutExpired:
        pass


def _manners(shot: Shot, code: int, out: Path, expected: Expected) -> list[str]:
    """What is wrong with how a process ended that could still say something."""
    text = _stderr(out)
    lines = [line for line in text.splitlines() if line not in expected.remarks.splitlines()]
    found = []
    if "Traceback" in text and shot.stage not in ("start", "real command"):
        found.append(f"a traceback: {lines[-1]}")
    if "bug in mergekit" in text:
        found.append(f"a bug: {lines}")
    if shot.kill.fault and code:
        if code != 1 or len(lines) != 1 or not lines[0].startswith("error: "):
            found.append(f"code {code} and not one line: {lines}")
    elif shot.kill.name != "SIGKILL" and code and not shot.faults and shot.stage not in ("start", "real command"):
        wanted = {"SIGTERM": 143, "SIGINT": 130}[shot.kill.name]
        if code == -getattr(signal, shot.kill.name) and _log(out)[-1][0] == "moved":
            return found  # the command was over; an interpreter that shuts down has given its handlers back
        if code != wanted or "the same command continues" not in text:
            found.append(f"code {code} instead of {wanted}: {lines}")
    return found


def look(out: Path, expected: Expected) -> str:
    """``none``: a loader finds no model. ``old`` and ``new``: it finds a complete one. ``half``: it finds another."""
    found = fingerprint(out) if out.exists() else {}
    if expected.old and found == expected.old:
        return "old"
    if found == expected.files:
        return "new"
    return "half" if "config.json" in found else "none"


def _journal(out: Path) -> list[dict[str, Any]]:
    """The whole lines of the journal, read by code of our own."""
    path, found = out / STAGING / "journal", []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        code, _, text = line.partition(b" ")
        if len(code) != 8 or int(code, 16) != zlib.crc32(text):
            break
        found.append(json.loads(text))
    return found


def resume(case: Case, out: Path, shot: Shot, expected: Expected, alone: bool = True) -> tuple[list[str], int]:
    """Run the same command until it ends, and compare; returns what is wrong, and how many tensors were kept.

    All tensors of the journal have to be kept whose shard is in the staging folder. If publishing had moved shards
    away and another run (the shot was not ``alone``) had begun them anew, some of them may be unwritten.
    """
    staged = {p.name for p in (out / STAGING).glob("*.safetensors")}
    keepable = {name for name in shot.recorded if expected.shards[name] in staged}
    code = _run(command(case, out, shot.kill.wrapped), out)
    kept = {line[1] for line in _log(out) if line[0] == "kept"}
    computed = [line[1] for line in _log(out) if line[0] == "computed"]
    found = []
    over = code == 2 and shot.state == "new" and "already holds weights" in _stderr(out)
    if code and not over:
        found.append(f"the second run ended with {code}: {_stderr(out).strip()[-300:]}")
    if shot.kill.wrapped and not code:
        if not kept <= keepable or (kept != keepable and (alone or not shot.moved)):
            found.append(f"kept {len(kept)} tensors where {len(keepable)} were recorded and there")
        is_done = shot.state == "new" and not computed  # killed while it cleaned up: nothing was left to do
        if not is_done and sorted(computed) != sorted(expected.shards.keys() - kept):
            found.append(f"computed {len(computed)} tensors of {len(expected.shards)}, {len(kept)} being kept")
    if (out / STAGING).exists():
        found.append(f"a staging folder is left: {sorted(p.name for p in (out / STAGING).iterdir())}")
    if differing := _differing(expected.files, fingerprint(out)):
        found.append(f"not the undisturbed result: {differing}")
    return found, len(kept)


def _differing(wanted: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The files that are missing, too many, or of other bytes."""
    words = [f"-{name}" for name in wanted if name not in found] + [f"+{name}" for name in found if name not in wanted]
    return " ".join(words + [f"!{name}" for name in wanted if name in found and wanted[name] != found[name]])
