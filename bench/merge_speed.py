"""Time whole merges against the floor: moving the same bytes. Page cache warm, everything in one run.

    python bench/merge_speed.py                      # 1.1B parameters, base and two fine-tunes, bfloat16
    python bench/merge_speed.py --rounds 5 --methods linear ties
    python bench/merge_speed.py --statistics         # what gathering statistics costs
    python bench/merge_speed.py --other 'other-tool {recipe} {out}'   # another tool on the same files

Each round runs the floor and every method once, in turn, so that a change of the machine's speed meets them all. The
table gives the median of each figure, and the median of the ratios to the floor of the same round with the same inputs.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from checkpoints import build, llama_shapes
from mergekit.methods import Whole, get_method, method_names

HERE = Path(__file__).parent
METHODS = tuple(name for name in method_names() if not isinstance(get_method(name).form, Whole))
"""Methods that stream; those of whole tensors take hours at this size (bench/spectral.py times one matrix)."""
GOAL = {
    "linear": 1.5, "passthrough": 1.5, "slerp": 2, "nuslerp": 2, "multislerp": 2, "karcher": 2.5, "model_stock": 2.5,
    "task_arithmetic": 1.5, "ties": 3, "dare_ties": 2.5, "breadcrumbs": 3.5, "breadcrumbs_ties": 3.5, "della": 6,
    "della_linear": 6, "nearswap": 3, "sce": 3, "ram": 3, "ramplus_tl": 3,
}  # fmt: skip


VALUES = {"weight": 0.5, "density": 0.5, "t": 0.4, "select_topk": 0.5}
"""Parameters of the benchmark, for the methods that have them; the others keep their defaults."""


PLAIN = "--no-stats"


@dataclass(frozen=True)
class Run:
    """One finished process: seconds of wall and processor time, peak resident bytes."""

    wall: float
    cpu: float
    peak: int


def measure(command: list[str]) -> Run:
    """Run ``command`` to its end and account for it."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{shlex.join(command)} failed:\n{text.decode()}")
    factor = 1 if sys.platform == "darwin" else 1024
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * factor)


def recipe(name: str, folder: Path) -> tuple[dict[str, object], list[str]]:
    """A recipe for method ``name`` over the benchmark's models, and the names of the models it reads."""
    method = get_method(name)
    inputs = ["one", "two"]
    if method.base == "required" or name == "karcher":
        inputs = ["base", *inputs]
    inputs = inputs[: method.most]
    given = {key: value for key, value in VALUES.items() if method.parameter(key)}
    models = [{"model": str(folder / model)} for model in inputs]
    wanted: dict[str, object] = {"merge_method": name, "models": models, "parameters": given}
    if method.base == "required":
        wanted["base_model"] = str(folder / "base")
    return wanted, inputs


def main() -> None:
    """Build the models, run the rounds, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mergekit-bench")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--key-value", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--statistics", action="store_true", help=f"run each method with {PLAIN} too")
    parser.add_argument("--other", help="another tool's command with {recipe} and {out}, run once per method")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()

    shapes = llama_shapes(args.layers, args.hidden, args.ffn, args.vocabulary, args.key_value)
    print("building checkpoints ...", file=sys.stderr)
    build(args.folder, shapes, layers=args.layers)
    subprocess.run([sys.executable, "-m", "mergekit", "warmup"], check=True)
    weights = {name: args.folder / name / "model.safetensors" for name in ("base", "one", "two")}
    for path in weights.values():  # warm the page cache
        with path.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    size = weights["base"].stat().st_size
    out = args.folder / "out"
    runs: dict[str, list[Run]] = {}
    ratios: dict[str, list[float]] = {}
    for number in range(args.rounds):
        floors: dict[tuple[str, ...], float] = {}
        for method in args.methods:
            content, names = recipe(method, args.folder)
            path = args.folder / f"{method}.yml"
            path.write_text(yaml.safe_dump(content, sort_keys=False))
            key = tuple(names)
            if key not in floors:
                target = args.folder / "floor.bin"
                command = [
                    sys.executable,
                    str(HERE / "floor.py"),
                    str(target),
                    str(size),
                    *(str(weights[n]) for n in names),
                ]
                run = measure(command)
                runs.setdefault(f"floor, {len(names)} in", []).append(run)
                floors[key] = run.wall
                target.unlink()
            variants = [method, f"{method} {PLAIN}"] if args.statistics else [method]
            for name in variants if number % 2 else reversed(variants):
                command = [sys.executable, "-m", "mergekit", "merge", str(path), str(out), "-j", str(args.threads)]
                run = measure([*command, "--quiet", *([PLAIN] if name != method else [])])
                runs.setdefault(name, []).append(run)
                ratios.setdefault(name, []).append(run.wall / floors[key])
                shutil.rmtree(out)
                print(f"round {number + 1} {name}: {run.wall:.2f} s, {ratios[name][-1]:.2f} x floor", file=sys.stderr)
    if args.other:
        for method in args.methods:
            command = shlex.split(args.other.format(recipe=args.folder / f"{method}.yml", out=out))
            runs[f"other: {method}"] = [measure(command)]
            shutil.rmtree(out, ignore_errors=True)
    table = render(runs, ratios, sum(_size(s) for _, s in shapes), size)
    print(table)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "merge_speed.md").write_text(table)


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def render(runs: dict[str, list[Run]], ratios: dict[str, list[float]], parameters: int, size: int) -> str:
    """The table as Markdown."""
    lines = [
        "# Merge speed",
        "",
        f"{parameters / 1e9:.2f}B parameters, bfloat16, {size / 1e9:.2f} GB a model, page cache warm, "
        f"{os.cpu_count()} processors ({platform.machine()}), Python {platform.python_version()}; medians of "
        f"{len(next(iter(ratios.values())))} rounds. The floor imports what a merge imports and moves the same bytes.",
        "",
        "| | wall s | cpu s | peak MB | x floor | goal |",
        "|---|---|---|---|---|---|",
    ]
    for name, done in runs.items():
        wall, cpu = (statistics.median(getattr(r, field) for r in done) for field in ("wall", "cpu"))
        peak = max(r.peak for r in done) / 1e6
        ratio = f"{statistics.median(ratios[name]):.2f}" if name in ratios else ""
        lines.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {peak:.0f} | {ratio} | {GOAL.get(name, '')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
