"""Random recipes through this package and through arcee mergekit 0.1.5, every result compared.

The other tool lives in an environment of its own, outside the repository, and is never imported here:

    python -m venv ../arcee
    ../arcee/bin/pip install mergekit==0.1.5 torch==2.13.0
    python bench/parity/run.py --other-python ../arcee/bin/python           # writes bench/results/parity.md
    python bench/parity/run.py --other-python ../arcee/bin/python --only 17  # one recipe, with all that is known of it

What is compared: whether the recipe is refused, names, shapes and element types of tensors, config.json as transformers
understands it, and every number. Numbers may differ by ``rules.TOLERANCE`` of the largest term of their sum (nothing
but float32's rounding); everything beyond that, and everything else, has to be explained by a rule of ``rules.py``, or
the exit status is 1.

Random methods draw other masks in each tool. So their numbers are compared with our random words in place of torch's;
what torch's own masks keep is compared by its share (``masks.py``). Recipes with 16-bit types are run a second time in
the other tool with arithmetic in float32, and those of ``rules.DOUBLE`` in float64, and compared with that: rules
P1, A1 and A2 are measurements, no pardons.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from compare import Finding, compare, draws
from masks import mask_cases, share_table
from recipes import METHODS, Case, case
from report import report
from rules import DOUBLE
from tiny_models import make

import mergekit
from mergekit.api.options import RunOptions
from mergekit.errors import MergekitError, UsageError
from mergekit.methods import get_method

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "parity.md"
OPTIONS = RunOptions(copy_tokenizer=False, write_model_card=False, statistics=False, threads=1)
HALF = ("bfloat16", "float16")


def main() -> int:
    """Run, compare, report."""
    options = arguments()
    logging.disable(logging.CRITICAL)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as kept:
        work = options.work or Path(kept)
        work.mkdir(parents=True, exist_ok=True)
        make(work / "models", options.seed)
        numbers = options.only or range(options.count)
        cases = [case(options.seed, n, work / "models") for n in numbers]
        missing = [m for m in METHODS if not exists(m)]
        for name in missing:
            print(f"skipped: '{name}' is not registered")
        cases = [c for c in cases if c.method not in missing and c.method in (options.method or METHODS)]
        errors = {c.number: ours(c, work) for c in cases}
        shares = [] if options.only else [c for c in mask_cases(work / "models", 100_000) if exists(c.method)]
        errors |= {c.number: ours(c, work) for c in shares}
        theirs = run_other(options.other_python, cases, shares, errors, work)
        findings = [compare(c, errors[c.number], theirs, work) for c in cases]
        kept_shares = share_table(shares, work, theirs)
        if options.only:
            for c, finding in zip(cases, findings, strict=True):
                show(c, finding)
        text, failed = report(findings, kept_shares, missing, options)
    if not options.only and not options.method:
        RESULTS.write_text(text)
    print(text)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return int(failed)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--other-python", type=Path, required=True, help="interpreter of the other tool's environment")
    parser.add_argument("--count", type=int, default=300, help="number of recipes")
    parser.add_argument("--seed", type=int, default=1, help="seed of models and recipes")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the recipes to run")
    parser.add_argument("--method", nargs="+", help="methods to run")
    parser.add_argument("--work", type=Path, help="an empty folder to keep models and results in")
    return parser.parse_args()


def exists(method: str) -> bool:
    """Whether this package has the method."""
    try:
        get_method(method)
    except UsageError:
        return False
    return True


def ours(c: Case, work: Path) -> str | None:
    """Run a recipe here; the message if it is refused."""
    try:
        mergekit.run_merge(c.recipe, work / "ours" / str(c.number), OPTIONS)
    except MergekitError as error:
        return " ".join(str(error).split())[:300]
    return None


def run_other(
    python: Path, cases: list[Case], shares: list[Case], errors: dict[int, str | None], work: Path
) -> dict[str, dict[str, Any]]:
    """Run all recipes there, in one process: as they are, and in the forms that numbers are compared with."""
    jobs: list[dict[str, Any]] = []
    for c in [*cases, *shares]:
        jobs.append({"id": f"{c.number}-plain", "recipe": c.recipe})
        jobs.append({"id": f"{c.number}-ours", "recipe": None})
        if errors[c.number] or not (c.random or has_half(c) or c.method in DOUBLE):
            continue
        words = None
        if c.random:
            words = work / f"{c.number}.npz"
            np.savez(words, **draws(c, OPTIONS))
        jobs.append({"id": f"{c.number}-exact", "recipe": exact(c, work), "draws": str(words) if words else None})
    for job in jobs:
        number, _, form = job["id"].partition("-")
        job["out"] = str(work / ("ours" if form == "ours" else form) / number)
        if form == "ours" and errors[int(number)]:
            job["out"] = ""
    (work / "jobs.json").write_text(json.dumps([job for job in jobs if job["out"]]))
    command = [python, HERE / "other.py", work / "jobs.json", work / "results.json"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    subprocess.run([str(word) for word in command], check=True, env=environment, cwd=work, stdout=subprocess.DEVNULL)
    return {told["id"]: told for told in json.loads((work / "results.json").read_text())}


def has_half(c: Case) -> bool:
    """Whether 16-bit types take part."""
    text = json.dumps(c.recipe)
    return "-bf16" in text or any(word in text for word in HALF)


def exact(c: Case, work: Path) -> dict[str, Any]:
    """The recipe with arithmetic in float32 (or better) and the result in the type that it has here."""
    if not has_half(c) and c.method not in DOUBLE:
        return c.recipe
    config = json.loads((work / "ours" / str(c.number) / "config.json").read_text())
    dtype = "float64" if c.method in DOUBLE else "float32"
    return {**c.recipe, "dtype": dtype, "out_dtype": config.get("torch_dtype") or config["dtype"]}


def show(c: Case, finding: Finding) -> None:
    """Print all that is known of one recipe."""
    print(f"--- recipe {c.number} ({c.oddity or 'plain'})", yaml.safe_dump(c.recipe, sort_keys=False), sep="\n")
    print(f"ours:   {finding.ours or 'merged'}\nothers: {finding.theirs or 'merged'}")
    for line in (*finding.notes, *finding.unexplained):
        print(" ", line)


if __name__ == "__main__":
    sys.exit(main())
