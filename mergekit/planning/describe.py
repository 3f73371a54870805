"""A plan in terms that people read: groups of like tensors, what they are made of, with which parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit.families.layout import numbers_out
from mergekit.html import html_table
from mergekit.methods import get_method
from mergekit.planning.expression import (
    Apply,
    Bake,
    Cast,
    Dequantize,
    Dequantize4,
    Expression,
    Identical,
    Leaf,
    Quantize4,
    Read,
    Rows,
    Split,
    leaves,
)
from mergekit.planning.plan import OutputTensor, Plan

__all__ = ["Group", "action_of", "describe", "groups", "kind_of_merge", "made_of", "plan_html"]


@dataclass(slots=True)
class Group:
    """Output tensors of one template, made in the same way.

    ``parameters`` maps each name to its values over the tensors, in order; ``sources`` are positions in the plan.
    """

    template: str
    action: str
    sources: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    tensors: list[str] = field(default_factory=list)
    bytes_read: int = 0
    bytes_written: int = 0
    parameters: dict[str, list[Any]] = field(default_factory=dict)


def groups(plan: Plan) -> list[Group]:
    """The plan's output tensors by template, in order of first appearance."""
    found: dict[Any, Group] = {}
    for output in plan.outputs:
        action, sources = _action(output.expression)
        key = (numbers_out(output.name), action, sources, output.shape, output.dtype)
        group = found.setdefault(key, Group(key[0], action, sources, output.shape, output.dtype.name))
        _add(group, output)
    return list(found.values())


def _add(group: Group, output: OutputTensor) -> None:
    group.tensors.append(output.name)
    group.bytes_written += output.nbytes
    group.bytes_read += sum(read.info.nbytes for read in leaves(output.expression))
    if isinstance(output.expression, Apply):
        for name, value in output.expression.settings.items():
            group.parameters.setdefault(name, []).append(value)


def action_of(expression: Expression) -> str:
    """What is done to make a tensor, in a word or two: a method's name, ``copy``, ``dequantize, cast``."""
    return _action(expression)[0]


def _action(expression: Expression) -> tuple[str, tuple[int, ...]]:
    sources = tuple(dict.fromkeys(read.source for read in leaves(expression)))
    if isinstance(expression, Apply):
        gathered = any(isinstance(leaf, Rows) for leaf in expression.inputs)
        action = f"gather rows, {expression.method}" if gathered else expression.method
        return action, tuple(next(leaves(leaf)).source for leaf in expression.inputs)
    if isinstance(expression, Identical):
        return "copy if identical", sources
    steps = list(dict.fromkeys(_steps(expression.input if isinstance(expression, Cast) else expression))) or ["copy"]
    return ", ".join([*steps, *(["cast"] if isinstance(expression, Cast) and steps[-1] == "copy" else [])]), sources


def _steps(leaf: Leaf) -> Iterator[str]:
    """What is done to a tensor, in the order in which it is done."""
    if isinstance(leaf, Read):
        return
    if isinstance(leaf, Rows):
        yield "gather rows"
        return
    yield from _steps(leaf.input)
    if isinstance(leaf, Quantize4):
        yield f"quantize to {leaf.scheme}"
    elif isinstance(leaf, Bake):
        yield "bake"
    elif isinstance(leaf, Dequantize | Dequantize4):
        yield "dequantize"
    elif isinstance(leaf, Split):
        yield "copy rows"


def span_text(values: Sequence[Any]) -> str:
    """One value, or the range of all, falling if they fall: ``0.5``, ``0 .. 1``, ``1 .. 0``; for each model in turn.

    >>> span_text([(0.1, 0.5), (0.9, 0.5)]), span_text([1.0, 0.5]), span_text([1.0, 0.5, 1.0])
    ('(0.1 .. 0.9, 0.5)', '1 .. 0.5', '0.5 .. 1')
    """
    first = values[0]
    if isinstance(first, tuple):
        return "(" + ", ".join(span_text([value[i] for value in values]) for i in range(len(first))) + ")"
    if all(value == first for value in values):
        return f"{first:g}" if isinstance(first, float) else str(first)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return " or ".join(dict.fromkeys(map(str, values)))
    low, high = min(values), max(values)
    return f"{high:g} .. {low:g}" if (first, values[-1]) == (high, low) else f"{low:g} .. {high:g}"


def kind_of_merge(plan: Plan) -> str:
    """The kind of merge in a few words: the method, or what the mixture is."""
    mixture = plan.mixture
    if mixture is None:
        return plan.method
    return (
        f"{mixture.family} of {len(mixture.experts)} experts, {mixture.per_token} for each token, "
        f"routers by {mixture.gate_mode}, shared weights from {mixture.shared}"
    )


def made_of(group: Group, plan: Plan) -> str:
    """``ties of [1] [2] onto [0]  density=(0.5, 0.5)``: what is done to which models, with which parameters."""
    models = [f"[{source}]" for source in group.sources]
    text = f"{group.action} {' '.join(models)}"
    if group.action == plan.method and get_method(plan.method).base == "required":
        text = f"{group.action} of {' '.join(models[1:])} onto {models[0]}"
    settings = ", ".join(f"{name}={span_text(values)}" for name, values in group.parameters.items())
    return f"{text}  {settings}" if settings else text


def plan_html(plan: Plan) -> str:
    """A plan for notebooks: a table of groups of like tensors, and the warnings."""
    models = ", ".join(f"[{number}] {source.reference}" for number, source in enumerate(plan.sources))
    rows = [
        [str(len(g.tensors)), g.template, " x ".join(map(str, g.shape)), g.dtype, made_of(g, plan)]
        for g in groups(plan)
    ]
    caption = f"{kind_of_merge(plan)} of {models}: {plan.parameters:,} parameters, {plan.bytes_written:,} bytes"
    notes = [*(f"warning: {text}" for text in plan.warnings), *plan.notes]
    return html_table(caption, ["tensors", "name", "shape", "type", "made of"], rows, notes)


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain data for machines (JSON)."""
    return {
        "mergekit": plan.version,
        "method": plan.method,
        "mixture": None if plan.mixture is None else dataclasses.asdict(plan.mixture),
        "seed": plan.seed,
        "digest": plan.digest(),
        "device": plan.device,
        "base": None if plan.base is None else plan.sources[plan.base].reference,
        "models": [source.reference for source in plan.sources],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "parameters": plan.parameters,
        "shards": [{"file": shard.name, "bytes": shard.size} for shard in plan.shards],
        "files": [{"from": plan.sources[source].reference, "name": name} for source, name in plan.files],
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
        "rounding": plan.rounding,
        "left_out": [
            {"model": plan.sources[source].reference, "tensor": name, "reason": reason}
            for source, name, reason in plan.left_out
        ],
        "tensors": [
            {
                "name": output.name,
                "shape": list(output.shape),
                "dtype": output.dtype.name,
                "file": output.file,
                "offset": output.offset,
                "bytes": output.nbytes,
                "action": _action(output.expression)[0],
                "inputs": [
                    {"model": plan.sources[read.source].reference, "tensor": read.info.name, "file": read.info.file}
                    for read in leaves(output.expression)
                ],
                "parameters": output.expression.settings if isinstance(output.expression, Apply) else {},
            }
            for output in plan.outputs
        ],
    }
