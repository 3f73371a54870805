"""How long the methods of whole matrices take, and how much memory they need.

    python bench/spectral.py [--shapes 4096x14336,4096x4096,1024x2816] [--methods tsv_m,iso_c] [--models 3]

Prints a Markdown table: seconds for one matrix, the estimate that plans are given, and what was held at most beyond
the inputs and the result, in copies of the matrix. Each measurement has a process of its own. Run it alone: torch
waits in a loop for its threads, so that other work on the processors slows it down many times. Adam's steps are
timed over three of them and counted as 300.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

METHODS = ("arcee_fusion", "tsv_m", "iso_c", "iso_cts", "star", "wudi", "wudi closed", "svc")
STEPS = 3


def measure(name: str, rows: int, columns: int, models: int) -> str:
    """One row of the table."""
    import torch

    from mergekit.methods import Whole, get_method
    from mergekit.methods.svc import WORKSPACE, svc, svc_seconds

    torch.manual_seed(0)
    x = [1e-3 * torch.randn(rows, columns) for _ in range(2 if name == "arcee_fusion" else models)]
    word, _, solver = name.partition(" ")
    given = {} if word == "svc" else {p.argument: p.default for p in get_method(word).params}
    if word == "wudi":
        given.update(solver=solver or "adam", steps=STEPS)
    merged = sum(x[1:], x[0])
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))  # what is loaded once does not count

    def run(**more: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            if word == "svc":
                svc(merged, x, 1.0)
            else:
                get_method(word).function(x, **{**given, **more})
        return time.perf_counter() - start

    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, run()
    copies = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * rows * columns) - 1
    if name == "wudi":
        without = run(steps=0)
        seconds = without + (seconds - without) * 300 / STEPS
    shape = (rows, columns)
    if word == "svc":
        estimate, declared = svc_seconds(shape, len(x)), WORKSPACE
    else:
        form = get_method(word).form
        assert isinstance(form, Whole)
        estimate = (
            form.seconds(shape, len(x), **{**given, **({"steps": 300} if word == "wudi" else {})})
            if form.seconds
            else 0.0
        )
        declared = form.workspace
    return f"| {name} | {rows}x{columns} | {seconds:.1f} | {estimate:.1f} | {copies:.1f} | {declared:g} |"


def main() -> None:
    """Measure each method on each shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default="1024x2816,4096x4096,4096x14336")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(measure(given.one[0], int(given.one[1]), int(given.one[2]), given.models))
        return
    print("| method | matrix | seconds | estimated | copies held | declared |\n|---|---|---|---|---|---|", flush=True)
    for shape in given.shapes.split(","):
        for name in given.methods.split(","):
            command = [sys.executable, __file__, "--models", str(given.models), "--one", name, *shape.split("x")]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
