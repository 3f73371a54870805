"""Time ``mergekit diff`` of three models against the floor of a merge of three: moving the same bytes.

    python bench/diff_speed.py                       # 1.1B parameters, bfloat16
    python bench/diff_speed.py --rounds 5 --folder /tmp/models

Each round runs the floor and the comparison once, page cache warm. Also the start-up of commands, beside an empty
Python.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoints import build, llama_shapes
from merge_speed import HERE, Run, measure


def main() -> None:
    """Build the models, run the rounds, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mergekit-bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    build(args.folder, llama_shapes(22, 2048, 5632, 32000, 256), layers=22)
    program = [sys.executable, "-m", "mergekit"]
    subprocess.run([*program, "warmup"], check=True)
    models = [args.folder / name for name in ("base", "one", "two")]
    weights = [str(model / "model.safetensors") for model in models]
    for path in weights:  # warm the page cache
        with open(path, "rb") as stream:
            while stream.read(1 << 24):
                pass
    size, target = Path(weights[0]).stat().st_size, args.folder / "floor.bin"
    commands = {
        "floor, 3 in": [sys.executable, str(HERE / "floor.py"), str(target), str(size), *weights],
        "diff": [*program, "diff", *map(str, models), "--quiet"],
        "an empty Python": [sys.executable, "-c", "pass"],
        "mergekit --help": [*program, "--help"],
        "mergekit inspect": [*program, "inspect", str(models[0])],
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            runs[name].append(measure(command))
            target.unlink(missing_ok=True)
    ratio = statistics.median(a.wall / b.wall for a, b in zip(runs["diff"], runs["floor, 3 in"], strict=True))
    lines = ["# Comparing models", "", f"Three models of {size / 1e9:.1f} GB; medians of {args.rounds} rounds.", "",
             "| | wall s | cpu s | peak MB |", "|---|---|---|---|"]  # fmt: skip
    for name, done in runs.items():
        wall, cpu = (statistics.median(getattr(run, field) for run in done) for field in ("wall", "cpu"))
        lines.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {max(run.peak for run in done) / 1e6:.0f} |")
    lines += ["", f"`diff` takes {ratio:.2f} times the floor (median of the ratios of each round; goal 2)."]
    text = "\n".join(lines) + "\n"
    print(text)
    (args.results / "diff_speed.md").write_text(text)


if __name__ == "__main__":
    main()
