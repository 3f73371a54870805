"""What merges do to the skills of the bundled tiny models: perplexity and exact answers per domain.

python bench/quality.py            # prints the table and writes docs/quality.md
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import mergekit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models"))

from evaluate import DOMAINS, evaluate  # noqa: E402

EXPERTS = ("code", "prose", "calc")


def path(name: str) -> str:
    """The folder of a bundled model."""
    return str(ROOT / "models" / name)


def experts(**parameters: Any) -> list[dict[str, Any]]:
    """All three experts with the same parameters."""
    return [{"model": path(name), "parameters": parameters} for name in EXPERTS]


def with_base(method: str, **parameters: Any) -> dict[str, Any]:
    """A task-vector recipe over all three experts."""
    return {"merge_method": method, "base_model": path("base"), "models": experts(**parameters)}


def pair(one: str, other: str) -> dict[str, Any]:
    """SLERP half-way between two experts."""
    return {"merge_method": "slerp", "base_model": path(one), "models": [{"model": path(one)}, {"model": path(other)}],
            "parameters": {"t": 0.5}}  # fmt: skip


RECIPES: dict[str, dict[str, Any]] = {
    "linear, equal weights": {"merge_method": "linear", "models": experts(weight=1)},
    "slerp, code and prose": pair("code", "prose"),
    "slerp, code and calc": pair("code", "calc"),
    "slerp, prose and calc": pair("prose", "calc"),
    "task_arithmetic, weight 0.5": with_base("task_arithmetic", weight=0.5),
    "task_arithmetic, weight 1": with_base("task_arithmetic", weight=1),
    "ties, density 0.5": with_base("ties", weight=1, density=0.5),
    "ties, density 0.2": with_base("ties", weight=1, density=0.2),
    "dare_ties, density 0.5, weight 0.5": with_base("dare_ties", weight=0.5, density=0.5),
    "dare_linear, density 0.5, weight 0.5": with_base("dare_linear", weight=0.5, density=0.5),
}


def row(name: str, folder: Path) -> str:
    """One line of the table."""
    scores = evaluate(folder)
    cells = [f"{scores[d].perplexity:.2f}" for d in DOMAINS] + [f"{scores[d].exact_answers:.1f}" for d in DOMAINS]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Evaluate sources and merges."""
    lines = [
        "| | " + " | ".join(f"{d} ppl" for d in DOMAINS) + " | " + " | ".join(f"{d} %" for d in DOMAINS) + " |",
        "|---|" + "---|" * 6,
    ]
    for name in ("base", *EXPERTS):
        lines.append(row(f"*{name}*", Path(path(name))))
        print(lines[-1], flush=True)
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(name, mergekit.run_merge({**recipe, "dtype": "bfloat16"}, Path(folder) / "out")))
        print(lines[-1], flush=True)
    page = ROOT / "docs" / "quality.md"
    text = page.read_text()
    start, end = text.index("<!-- table -->"), text.index("<!-- /table -->")
    page.write_text(text[:start] + "<!-- table -->\n" + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
