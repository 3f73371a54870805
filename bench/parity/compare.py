"""Compare what both tools made of one recipe."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rules
import torch
from recipes import Case
from rules import TOLERANCE, Tensor
from tensors import load_stored

import mergekit
from mergekit.api.options import RunOptions
from mergekit.kernels.philox import GROUP, fill_random
from mergekit.planning.expression import Apply, Read
from mergekit.seeds import stream_key

ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""What one step of a type is at most, as a share of the number: both tools round, each its own float32 result."""


@dataclass
class Finding:
    """What came out for one recipe. ``rules`` counts what each rule explains (tensors, or 1 for the whole recipe)."""

    case: Case
    ours: str | None
    theirs: str | None
    tensors: int = 0
    largest: float = 0.0
    rules: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)

    @property
    def is_one_sided(self) -> bool:
        """Whether one tool refuses what the other merges."""
        return (self.ours is None) != (self.theirs is None)


def draws(c: Case, options: RunOptions) -> dict[str, np.ndarray]:
    """The random words that our masks are made from, as ``<output tensor>|<place of the fine-tune>``."""
    plan = mergekit.plan(c.recipe, options)
    found = {}
    for output in plan.outputs:
        apply = output.expression
        if not isinstance(apply, Apply):
            continue
        size = int(np.prod(output.shape))
        for place, position in enumerate(apply.models[1:]):
            words = np.zeros(-(-size // GROUP) * GROUP, np.uint32)
            key = stream_key(plan.seed, output.name, position)
            for start in range(0, len(words), GROUP):
                fill_random(start, *key, words[start : start + GROUP])
            found[f"{output.name}|{place}"] = words[:size]
    return found


def compare(c: Case, error: str | None, theirs: dict[str, dict[str, Any]], work: Path) -> Finding:
    """Everything about one recipe."""
    told = theirs[f"{c.number}-plain"]
    finding = Finding(c, error, told["error"])
    if finding.ours or finding.theirs:
        if finding.is_one_sided:
            _explain(finding, rules.refusal(c, finding.ours, finding.theirs), f"one refuses: {error or told['error']}")
        return finding
    _compare_configs(finding, theirs[f"{c.number}-ours"]["config"], told["config"])
    mine, plain = load_stored(work / "ours" / str(c.number)), load_stored(work / "plain" / str(c.number))
    form = "exact" if f"{c.number}-exact" in theirs else "plain"
    if theirs[f"{c.number}-{form}"]["error"]:
        finding.unexplained.append(f"only with our masks or float32: {theirs[f'{c.number}-{form}']['error']}")
        return finding
    like = load_stored(work / form / str(c.number))
    if sorted(mine) != sorted(plain):
        finding.unexplained.append(f"other tensors: {sorted(set(mine) ^ set(plain))[:3]}")
    if theirs[f"{c.number}-{form}"]["shared"]:
        finding.rules["T2"] += 1
    contexts = _contexts(c)
    for name in sorted(set(mine) & set(plain)):
        _compare_tensor(finding, name, mine[name], plain[name], like[name], contexts.get(name))
    return finding


def _explain(finding: Finding, rule: str | None, fact: str) -> None:
    """Count a fact for its rule, or as unexplained."""
    if rule:
        finding.rules[rule] += 1
        finding.notes.append(f"{rule}: {fact}")
    else:
        finding.unexplained.append(fact)


def _compare_configs(finding: Finding, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    ignored = ("transformers_version", "_name_or_path")
    for key in sorted({*ours, *theirs} - {*ignored}):
        a, b = ours.get(key), theirs.get(key)
        if a != b:
            _explain(finding, rules.config(finding.case, key, a, b), f"config.json: {key} is {a!r} here, {b!r} there")


def _contexts(c: Case) -> dict[str, Tensor]:
    """What is merged into each tensor, read from the plan."""
    plan = mergekit.plan(c.recipe, RunOptions(copy_tokenizer=False, write_model_card=False))
    stored: dict[str, dict[str, torch.Tensor]] = {}
    found = {}
    for output in plan.outputs:
        apply = output.expression
        if not isinstance(apply, Apply) or not all(isinstance(leaf, Read) for leaf in apply.inputs):
            continue
        inputs = []
        for leaf in apply.inputs:
            assert isinstance(leaf, Read)
            folder = plan.sources[leaf.source].folder
            if folder not in stored:
                stored[folder] = load_stored(Path(folder))
            inputs.append(stored[folder][leaf.info.name].float().numpy())
        found[output.name] = Tensor(c, output.name, dict(apply.parameters), apply.has_base, inputs)
    return found


def _compare_tensor(
    finding: Finding, name: str, mine: torch.Tensor, plain: torch.Tensor, like: torch.Tensor, context: Tensor | None
) -> None:
    """``plain`` is the other's result, ``like`` its result from our masks and in float32."""
    finding.tensors += 1
    if mine.dtype != plain.dtype:
        rule = rules.element_type(finding.case, mine.dtype, plain.dtype)
        _explain(finding, rule, f"{name}: {mine.dtype} here, {plain.dtype} there")
    if mine.shape != like.shape:
        finding.unexplained.append(f"{name}: {list(mine.shape)} here, {list(like.shape)} there")
        return
    a, b = mine.float().numpy().astype(np.float64), like.float().numpy().astype(np.float64)
    if np.array_equal(a, b, equal_nan=True):
        _note_precision(finding, name, b, plain, like, context)
        return
    scale = np.maximum(np.nan_to_num(np.abs(b), posinf=0), context.largest_term() if context else 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        far = ~(np.abs(a - b) <= TOLERANCE * scale + ULP[mine.dtype] * np.abs(b))
        apart = np.where(a == b, 0, np.abs(a - b) / scale)
    unexplained, covered = far.copy(), np.zeros(far.shape, bool)
    if context:
        for rule, where in rules.numbers(context, a, b):
            covered |= where
            if (unexplained & where).any():
                finding.rules[rule] += 1
                finding.notes.append(f"{rule}: {name}: {int((unexplained & where).sum())} of {a.size} elements")
            unexplained &= ~where
    if unexplained.any():
        worst = np.unravel_index(np.where(unexplained, np.nan_to_num(apart, nan=np.inf), -1).argmax(), a.shape)
        finding.unexplained.append(
            f"{name}: {int(unexplained.sum())} of {a.size} elements, up to {apart[worst]:.1e} of the scale: "
            f"{a[worst]:.8g} here, {b[worst]:.8g} there" + (f"; {context.parameters}" if context else "")
        )
    if mine.dtype == torch.float32 and not (far | covered).all():
        finding.largest = max(finding.largest, float(apart[~(far | covered)].max()))
    _note_precision(finding, name, b, plain, like, context)


def _note_precision(
    finding: Finding, name: str, b: np.ndarray, plain: torch.Tensor, like: torch.Tensor, context: Tensor | None
) -> None:
    """Where the other's arithmetic in its own type gives something else than its arithmetic in a better one."""
    if plain is like or finding.case.random or plain.shape != like.shape:
        return
    other = plain.float().numpy()
    scale = max(np.abs(b).max(initial=0), context.largest_term().max(initial=0) if context else 0) or 1.0
    apart = float(np.nan_to_num(np.abs(other - b), nan=np.inf).max(initial=0)) / scale
    if apart > TOLERANCE:
        half = torch.float32 not in (plain.dtype, like.dtype)
        rule = "P1" if half else rules.DOUBLE.get(finding.case.method, "P1")
        finding.rules[rule] += 1
        finding.notes.append(f"{rule}: {name}: off by {apart:.1e} of the scale")
