"""What the random masks of both tools keep: shares, and what rescaling makes good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from recipes import Case
from tensors import load

CASES = [
    ("dare_linear", {"density": 0.3, "rescale": False}),
    ("dare_linear", {"density": 0.7, "rescale": True}),
    ("dare_ties", {"density": 0.5, "rescale": True}),
    ("dare_ties", {"density": 0.9, "rescale": False}),
    ("della_linear", {"density": 0.5, "epsilon": 0.4, "rescale": False}),
    ("della_linear", {"density": 0.6, "epsilon": 0.3, "rescale": True}),
    ("della", {"density": 0.7, "epsilon": 0.2, "rescale": False}),
    ("della", {"density": 0.4, "epsilon": 0.1, "rescale": True}),
]
DEVIATIONS = 4.5
"""How many standard deviations a share may be off: once in 150,000 by chance."""


def mask_cases(models: Path, first: int) -> list[Case]:
    """One fine-tune of weight 1, so that the result shows the mask; numbered from ``first``."""
    found = []
    for number, (method, parameters) in enumerate(CASES, first):
        recipe = {
            "merge_method": method,
            "base_model": str(models / "base"),
            "models": [{"model": str(models / "dense"), "parameters": {"weight": 1.0}}],
            "parameters": {"normalize": False, **parameters},
        }
        found.append(Case(number, method, recipe, "", random=True))
    return found


def share_table(cases: list[Case], work: Path, theirs: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, bool]]:
    """Recipe, tool, what was measured, and whether that is as it should be."""
    rows = []
    for c in cases:
        told = " ".join(f"{k}={v}" for k, v in c.recipe["parameters"].items() if k != "normalize")
        for tool, folder in (("ours", "ours"), ("0.1.5", "plain")):
            if tool == "0.1.5" and theirs[f"{c.number}-plain"]["error"]:
                rows.append((f"{c.method} {told}", tool, theirs[f"{c.number}-plain"]["error"], False))
                continue
            rows.append((f"{c.method} {told}", tool, *_measure(c, work / folder / str(c.number))))
    return rows


def _measure(c: Case, folder: Path) -> tuple[str, bool]:
    parameters = c.recipe["parameters"]
    base, tuned, merged = (load(Path(p)) for p in (c.recipe["base_model"], c.recipe["models"][0]["model"], folder))
    kept, quarter, sums = [], [], []
    for name, x in merged.items():
        delta, result = tuned[name] - base[name], x - base[name]
        rows = np.abs(delta.reshape(len(delta), -1) if delta.ndim > 1 else delta[None])
        rank = rows.argsort(1).argsort(1) / (rows.shape[1] - 1)
        kept.append((result != 0).reshape(-1))
        quarter.append(np.minimum(rank * 4, 3).astype(int).reshape(-1))
        wanted = delta if parameters["rescale"] else np.where(result == 0, 0, delta)
        sums.append(np.abs(result).sum(dtype=np.float64) / np.abs(wanted).sum(dtype=np.float64))
    keep, rank4 = np.concatenate(kept), np.concatenate(quarter)
    lean = parameters.get("epsilon", 0.0) if c.method.startswith("della") else 0.0
    good, shares = True, []
    for q in range(4):
        expected = parameters["density"] + lean * (2 * q - 3) / 4
        share, size = float(keep[rank4 == q].mean()), int((rank4 == q).sum())
        # The quarters of short rows lie a little outwards of where an endless row's would.
        slack = DEVIATIONS * np.sqrt(0.25 / size) + lean * 0.12
        good &= abs(share - expected) < slack
        shares.append(f"{share:.3f} (expected {expected:.3f})")
    off = float(np.abs(np.array(sums) - 1).max())
    what = "L1 norm over the task vector's" if parameters["rescale"] else "L1 norm over that of what was kept"
    return f"kept by quarter of rank: {', '.join(shares)}; {what}: 1 within {off:.1e}", bool(good and off < 1e-4)
