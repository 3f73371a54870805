"""What `make demo` runs: merge the bundled tiny models and show what became of their skills.

python examples/demo.py [RECIPE ...]        # default: linear and ties
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models"))
OUT = ROOT / "demo-out"
SOURCES = ("base", "code", "prose", "calc")


def main(recipes: list[str]) -> None:
    """Merge each recipe into ``demo-out/`` and print perplexity and exact answers of sources and merges."""
    import os

    from mergekit.cli.main import mergekit as program

    os.chdir(ROOT)  # recipes name the models relative to the repository
    results = []
    for recipe in recipes:
        name = Path(recipe).stem
        command = ["merge", recipe, str(OUT / name), "--overwrite"]
        print("$ mergekit", *command, flush=True)
        started = time.perf_counter()
        program.main(command, standalone_mode=False)
        print(f"  ({time.perf_counter() - started:.1f} s in all)", flush=True)
        results.append(name)

    from evaluate import DOMAINS, evaluate

    print("\nPerplexity per token on held-out text (lower is better), and exact answers:\n")
    print(f"{'':16}" + "".join(f"{d:>18}" for d in DOMAINS))
    for name in (*SOURCES, *results):
        folder = ROOT / "models" / name if name in SOURCES else OUT / name
        scores = evaluate(folder, quick=True)
        cells = "".join(f"{s.perplexity:>10.2f} {s.exact_answers:>5.0f} %" for s in (scores[d] for d in DOMAINS))
        print(f"{name:16}{cells}", flush=True)
    print(f"\nThe merged models are in {OUT.relative_to(ROOT)}/; next: .venv/bin/mergekit new")


if __name__ == "__main__":
    main(sys.argv[1:] or ["examples/linear.yml", "examples/ties.yml"])
