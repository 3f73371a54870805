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


def few(method: str, **parameters: Any) -> dict[str, Any]:
    """A recipe over all three experts without a base."""
    return {"merge_method": method, "models": experts(**parameters)}


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
    "breadcrumbs, density 0.9, weight 0.5": with_base("breadcrumbs", weight=0.5, density=0.9),
    "breadcrumbs_ties, density 0.9, weight 0.5": with_base("breadcrumbs_ties", weight=0.5, density=0.9),
    "della, density 0.6, weight 0.5": with_base("della", weight=0.5, density=0.6),
    "della_linear, density 0.6, weight 0.5": with_base("della_linear", weight=0.5, density=0.6),
    "cabs, weight 1": with_base("cabs", weight=1),
    "multislerp, equal weights": few("multislerp", weight=1),
    "multislerp with the base, equal weights": with_base("multislerp", weight=1),
    "nuslerp, code and calc": {**few("nuslerp", weight=1), "models": [experts(weight=1)[i] for i in (0, 2)]},
    "karcher": few("karcher"),
    "model_stock": with_base("model_stock"),
    "model_stock, filter_wise": {**with_base("model_stock"), "parameters": {"filter_wise": True}},
    "nearswap, base towards calc, t 0.001": {
        **with_base("nearswap"),
        "models": experts()[2:],
        "parameters": {"t": 0.001},
    },
    "sce": with_base("sce"),
    "sce, select_topk 0.2": {**with_base("sce"), "parameters": {"select_topk": 0.2}},
    "ram": with_base("ram"),
    "ramplus_tl": with_base("ramplus_tl"),
    "arcee_fusion, base and calc": {**with_base("arcee_fusion"), "models": experts()[2:]},
    "tsv_m": with_base("tsv_m"),
    "iso_c": with_base("iso_c"),
    "iso_cts": with_base("iso_cts"),
    "star": with_base("star"),
    "wudi": with_base("wudi"),
    "wudi, solver closed": with_base("wudi") | {"parameters": {"solver": "closed"}},
    "task_arithmetic, weight 0.5, svc": with_base("task_arithmetic", weight=0.5) | {"parameters": {"svc": 1}},
    "task_arithmetic, weight 0.5, LiNeS 0.5 + 1": with_base("task_arithmetic", weight=0.5)
    | {"parameters": {"lines_alpha": 0.5, "lines_beta": 1.0}},
    "task_arithmetic, metagpt": with_base("task_arithmetic", weight=1) | {"parameters": {"weighting": "metagpt"}},
    "task_arithmetic, nan": with_base("task_arithmetic", weight=1) | {"parameters": {"weighting": "nan"}},
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
