"""How much memory merging one large tensor takes under ``--max-memory``.

    python bench/reliability/max_memory.py            # two models of one tensor of 1 GB each, 300 MB allowed

Runs the real command and reads its peak from the system: interpreter and libraries included, kernels compiled before.
Then it looks for the smallest limit that is accepted. Writes bench/results/max_memory.md; fails if a peak is above.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

from mergekit.checkpoint.header import build_header
from mergekit.dtypes import BF16
from mergekit.options import parse_kmb

RESULTS = Path(__file__).parents[1] / "results" / "max_memory.md"
METHODS = {"linear": {}, "slerp": {"t": 0.4}, "ties": {"density": 0.5}, "dare_ties": {"density": 0.5}, "sce": {}}

COMMAND = """
import atexit
atexit.register(lambda: print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))))
from mergekit.cli.main import main
main()
"""
"""The program itself, which says at its end how much memory it had at most. (Its parent would be told a figure that
starts with the parent's own.)"""


def write_model(folder: Path, columns: int, seed: int) -> None:
    """A model of one tensor, [32768, columns] in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(build_header([("model.embed_tokens.weight", BF16, (32768, columns))])[0])
        for _ in range(32):
            values = random.standard_normal((1024, columns), dtype=np.float32)
            stream.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')


def run(recipe: Path, out: Path, limit: str) -> tuple[int, str, int]:
    """Exit code, what was said, and peak bytes of one merge."""
    command = [sys.executable, "-c", COMMAND, "merge", str(recipe), str(out), "--max-memory", limit, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(out, ignore_errors=True)
    return done.returncode, done.stderr, int(done.stdout) * 1024


def main() -> None:
    """Merge by a few methods, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--columns", type=int, default=16384, help="16384: a tensor of 1.07 GB")
    parser.add_argument("--limit", default="300MB")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mergekit-memory")
    args = parser.parse_args()
    subprocess.run([sys.executable, "-m", "mergekit", "warmup"], check=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    args.folder = Path(tempfile.mkdtemp(dir=args.folder))
    folders = [args.folder / name for name in ("base", "one", "two")]
    for seed, folder in enumerate(folders):
        write_model(folder, args.columns, seed)
    size = 32768 * args.columns * 2
    lines = [
        "# Memory under a limit",
        "",
        f"One tensor of {size / 1e9:.2f} GB in each model, --max-memory {args.limit}; the peak is that of the process.",
        "",
        "| method | peak MB | smallest limit that is accepted |",
        "|---|---|---|",
    ]
    limit = parse_kmb(args.limit)
    worst = 0
    for method, parameters in METHODS.items():
        recipe = args.folder / f"{method}.yml"
        base = {} if method == "linear" else {"base_model": str(folders[0])}
        models = [{"model": str(folder)} for folder in (folders[1:2] if method == "slerp" else folders[1:])]
        values = {"weight": 0.5} | parameters if method not in ("slerp", "sce") else parameters
        recipe.write_text(
            yaml.safe_dump(
                {"merge_method": method, **base, "models": models, "parameters": values, "dtype": "bfloat16"}
            )
        )
        code, said, peak = run(recipe, args.folder / "out", args.limit)
        if code:
            raise SystemExit(f"{method}: {said}")
        refused, said, _ = run(recipe, args.folder / "out", "1MB")
        needed = re.search(r"needs (\d+)MB", said)
        assert refused == 2
        assert needed
        code, said, small = run(recipe, args.folder / "out", f"{needed[1]}MB")
        if code or small > int(needed[1]) * 1_000_000:
            raise SystemExit(f"{method}: {needed[1]}MB was said to be enough: {said or small}")
        lines.append(f"| {method} | {peak / 1e6:.0f} | {needed[1]} MB (peak {small / 1e6:.0f}) |")
        worst = max(worst, peak)
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.write_text(text)
    shutil.rmtree(args.folder)
    if worst > limit:
        raise SystemExit(f"the limit of {args.limit} was exceeded: {worst:,} bytes")


if __name__ == "__main__":
    main()
