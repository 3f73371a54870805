"""Kill merges at random moments, run them again, and compare with undisturbed runs.

    python bench/reliability/kill_matrix.py --kills 240 [--seed S] [--folder F]
    python bench/reliability/kill_matrix.py --seed S --only 17      # one trial again, its folder is kept

Every merge method and every form of output: several shards, slices, a union of two vocabularies, mixtures of experts
in both forms, an older model overwritten. A trial starts the command, kills it (SIGKILL; a share SIGTERM and SIGINT)
once to three times in the same folder, looks at the folder each time, and lets the same command end. Most of the kills
aim at a stage, the others fall anywhere in the measured time of a run; a tenth meet the command as it is, the rest
``slow_run.py``, which slows it down and says where it is. In a sixth as many further trials the disk fills up
(ENOSPC, RLIMIT_FSIZE) or can't be read (EIO).

Held: after a kill a loader finds no model, or the complete old one, or the complete new one; a resumed run computes
exactly the tensors that the journal lacks; in the end all files are those of an undisturbed run, byte for byte, and no
staging folder is left; a fault of the disk is one line; inputs stay as they were. Exit code 1 if anything else is seen.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from cases import FORMS, SLOW, Case, cases, write_inputs  # noqa: E402
from trial import FAULTS, STAGES, STAGING, Expected, Kill, Shot, draw, fingerprint, resume, shoot, undisturbed  # noqa: E402

RESULTS = HERE.parent / "results" / "kill_matrix.md"
_SHARE = {FORMS[0]: 5, FORMS[1]: 2, FORMS[2]: 2, FORMS[3]: 2, FORMS[4]: 2, FORMS[5]: 3}
"""How many of the kills each form gets."""
_ATTEMPTS = 3
"""Runs of a trial that may end before their signal comes."""
WORKERS = 2


@dataclass
class Trial:
    """A case with how often it is to be killed, and what came of it."""

    number: int
    case: Case
    kills: int
    faulty: bool = False
    shots: list[Shot] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    kept: int = 0

    @property
    def all_faults(self) -> list[str]:
        """Everything wrong, in order."""
        return [f for shot in self.shots for f in shot.faults] + self.faults


def schedule(made: Sequence[Case], kills: int, seed: int) -> list[Trial]:
    """Trials that kill ``kills`` times in all, and a sixth as many with faults of the disk."""
    rng = random.Random(f"schedule {seed}")
    by_form = {form: [case for case in made if case.form == form] for form in FORMS}
    for form, group in by_form.items():
        slow = [case for case in group if case.name in SLOW]
        by_form[form] = [case for case in group if case not in slow] * (5 if slow else 1) + slow
        rng.shuffle(by_form[form])
    turns = {form: cycle(group) for form, group in by_form.items() if group}
    forms = [form for form in turns for _ in range(_SHARE[form])]
    trials: list[Trial] = []
    left = kills
    while left:
        rng.shuffle(forms)
        for form in forms[: max(1, left)]:
            if left:
                count = min(left, rng.choice((1, 1, 2, 3)))
                trials.append(Trial(len(trials), next(turns[form]), count))
                left -= count
    for form, _ in zip(cycle(turns), range(kills // 6), strict=False):
        trials.append(Trial(len(trials), next(turns[form]), 1, faulty=True))
    return trials


def run_trial(trial: Trial, folder: Path, seed: int, expected: Expected, old: Path | None) -> None:
    """Kill, look, resume, compare. What is left is removed if nothing was wrong."""
    rng = random.Random(f"{seed} {trial.number}")
    place = folder / f"trial-{trial.number}"
    out = place / "out"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if old:
        shutil.copytree(old, out)
    if trial.faulty and rng.random() < 0.5:  # the fault then meets a run that continues another
        _shoot(trial, out, Kill("SIGKILL", "committing", 2, 0.02), expected)
    for _ in range(trial.kills):
        kill = draw(rng, expected, trial.faulty)
        for _ in range(_ATTEMPTS):
            shot = _shoot(trial, out, kill, expected)
            if not shot.ended or trial.faulty or _is_over(shot, out, old):
                break
            kill = draw(rng, expected)
        if _is_over(trial.shots[-1], out, old):
            break
    last = trial.shots[-1]
    trial.faults, trial.kept = resume(trial.case, out, last, expected, alone=len(trial.shots) == 1)
    if not trial.all_faults:
        shutil.rmtree(place)


def _is_over(shot: Shot, out: Path, old: Path | None) -> bool:
    """Whether the same command has nothing left to do."""
    return shot.state == "new" and not old and not (out / STAGING).exists()


def _shoot(trial: Trial, out: Path, kill: Kill, expected: Expected) -> Shot:
    shot = shoot(trial.case, out, kill, expected)
    trial.shots.append(shot)
    return shot


def table(trials: Sequence[Trial], faulty: bool) -> list[str]:
    """Kills by form and stage, or faults by form and kind."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for trial in trials:
        for position, shot in enumerate(trial.shots):
            if bool(shot.kill.fault) != faulty or shot.ended:
                continue
            row = rows.setdefault((trial.case.form, shot.kill.name if faulty else shot.stage), Counter())
            row["kills"] += 1
            row["half"] += shot.state == "half"
            row["old"] += shot.state == "old"
            row["new"] += shot.state == "new"
            row["same"] += not trial.faults
            if position == len(trial.shots) - 1 and shot.kill.wrapped:
                row["kept"] += trial.kept
                row["recorded"] += len(shot.recorded)
    order = FAULTS if faulty else STAGES
    head = "fault | times" if faulty else "stage | kills"
    lines = [
        f"| output | {head} | half-models | old model | new model | same bytes | kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (form, stage), row in sorted(rows.items(), key=lambda r: (FORMS.index(r[0][0]), order.index(r[0][1]))):
        figures = [row[k] for k in ("kills", "half", "old", "new", "same")]
        lines.append(f"| {form} | {stage} | {' | '.join(map(str, figures))} | {row['kept']} of {row['recorded']} |")
    return lines


def report(trials: Sequence[Trial], methods: int, seed: int, seconds: float, changed: Sequence[str]) -> str:
    """The page of results."""
    shots = [shot for trial in trials for shot in trial.shots]
    landed = [shot for shot in shots if not shot.kill.fault and not shot.ended]
    by_name = Counter(shot.kill.name for shot in landed)
    failed = [trial for trial in trials if trial.all_faults]
    lines = [
        "# Kills and faults of the disk",
        "",
        f"Made by `python bench/reliability/kill_matrix.py --seed {seed}`, which says what is held: {len(landed)} "
        f"kills ({', '.join(f'{n} {by_name[n]}' for n in sorted(by_name))}) that found a running command, and "
        f"{sum(bool(s.kill.fault) and not s.ended for s in shots)} faults of the disk, in {len(trials)} trials of "
        f"{len({t.case.name for t in trials})} recipes and {methods} merge methods; {seconds / 60:.0f} minutes.",
        "",
        f"Half-models: {sum(s.state == 'half' for s in shots)}. Trials with anything wrong: {len(failed)}. "
        f"Changed inputs: {len(changed)}.",
        "",
        "*Same bytes*: the resumed run ended with every file as an undisturbed run writes it. *Kept*: tensors that the "
        "run which came to its end did not compute again, of those in the journal; shards that publishing had moved "
        "out of the staging folder are made anew.",
        "",
        *table(trials, faulty=False),
        "",
        *table(trials, faulty=True),
    ]
    if failed or changed:
        lines += ["", "## What was wrong", ""]
        lines += [f"* trial {t.number}, {t.case.name}: {fault}" for t in failed for fault in t.all_faults]
        lines += [f"* changed input: {name}" for name in changed]
    return "\n".join(lines) + "\n"


def prepare(folder: Path, made: Sequence[Case], workers: int = WORKERS) -> dict[str, Expected]:
    """The undisturbed run of every case, by name; old models first, for others are written over them."""
    found: dict[str, Expected] = {}
    with ThreadPoolExecutor(workers) as pool:
        for group in ([c for c in made if not c.form], [c for c in made if c.form]):
            runs = {
                c.name: pool.submit(undisturbed, c, folder / "whole" / c.name, model_before(folder, c)) for c in group
            }
            found.update({name: run.result() for name, run in runs.items()})
    return found


def model_before(folder: Path, case: Case) -> Path | None:
    """The model that stands in a case's output folder at first."""
    return folder / "whole" / case.old / "0" / "out" if case.old else None


def stamps(folder: Path) -> dict[str, tuple[str, int]]:
    """The bytes and the time of every file of the inputs."""
    return {name: (digest, (folder / name).stat().st_mtime_ns) for name, digest in fingerprint(folder).items()}


def run_all(trials: Sequence[Trial], folder: Path, seed: int, expected: Mapping[str, Expected], workers: int) -> None:
    """All trials, some at a time."""
    started = time.monotonic()

    def one(trial: Trial) -> None:
        run_trial(trial, folder, seed, expected[trial.case.name], model_before(folder, trial.case))
        stages = " ".join(f"{s.kill.name}@{s.stage}{'(ended)' if s.ended else ''}:{s.state}" for s in trial.shots)
        wrong = f" WRONG: {trial.all_faults}" if trial.all_faults else ""
        passed = time.monotonic() - started
        print(f"{passed:6.1f} s trial {trial.number} {trial.case.name} {stages}{wrong}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, trials))


def main() -> None:
    """Prepare, run the trials, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where models are made (default: a new temporary folder)")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of trials; no page is written")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    started = time.monotonic()
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="mergekit-kills-"))).resolve()
    inputs = write_inputs(folder)
    made = cases(folder, inputs)
    trials = [t for t in schedule(made, args.kills, args.seed) if args.only is None or t.number in args.only]
    wanted = {t.case.name for t in trials} | {t.case.old for t in trials}
    made = [case for case in made if case.name in wanted]
    print(f"undisturbed runs of {len(made)} recipes, below {folder} ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "mergekit", "warmup"], cwd=HERE.parents[1], check=True)
    before = stamps(inputs)
    expected = prepare(folder, made, args.workers)
    run_all(trials, folder, args.seed, expected, args.workers)
    after = stamps(inputs)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    methods = len({t.case.recipe.stem for t in trials if t.case.form == FORMS[0]})
    page = report(trials, methods, args.seed, time.monotonic() - started, changed)
    print(page)
    if args.only is None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(page)
    failed = [trial for trial in trials if trial.all_faults]
    for trial in failed:
        again = f"--kills {args.kills} --seed {args.seed} --only {trial.number}"
        print(f"trial {trial.number}, {trial.case.name}, left in {folder / f'trial-{trial.number}'}; again: {again}")
        for shot in trial.shots:
            print("  ", json.dumps({**asdict(shot), "recorded": len(shot.recorded)}))
        print("  ", "; ".join(trial.all_faults))
    if not failed and not changed and args.folder is None:
        shutil.rmtree(folder)
    sys.exit(bool(failed or changed))


if __name__ == "__main__":
    main()
