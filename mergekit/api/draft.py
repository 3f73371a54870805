"""A recipe to start from: a method and weights that fit the models, each line with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from mergekit.api.advice import advise, percent
from mergekit.errors import UsageError, nearest

if TYPE_CHECKING:
    from mergekit.api.comparison import Comparison
    from mergekit.methods import Method
    from mergekit.methods.spec import Parameter

__all__ = ["Draft", "draft", "to_merge"]

_STARTS: dict[str, Any] = {"weight": 1.0, "density": 0.5, "t": 0.5}
"""Where to start with parameters whose default changes nothing, or that have none."""
_WORDS = ("normalize", "lambda", "rescale")
"""Options that people turn most: written as comments, with their defaults."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A recipe's text, the method in it, and why that."""

    text: str
    method: str
    reasons: tuple[str, ...]


def draft(
    models: Sequence[str],
    *,
    base: str | None = None,
    method: str | None = None,
    comparison: Comparison | None = None,
    dtype: str | None = "bfloat16",
    tokenizer: str | None = None,
) -> Draft:
    """A commented recipe that merges ``models`` (references), with ``base`` as their common ancestor if there is one.

    ``comparison``, of the base (else the first model) and the others, chooses ``method`` where none is given, and the
    weights. ``tokenizer`` becomes ``tokenizer_source``. UsageError if the method can't take these models, or if nothing
    that combines weights fits them.
    """
    from mergekit.methods import get_method, method_names

    others = to_merge(models, base)
    reasons: list[str] = []
    weight = 1 / math.sqrt(len(others))  # of changes that have nothing to do with each other
    if comparison is not None:
        others, reasons = _without_equals(others, comparison)
        found = advise(replace(comparison, common_base=base is not None))
        if found.method is None and method is None:
            raise UsageError(f"no method is suggested: {'; '.join(found.reasons)}; choose one with --method to try it")
        weight = max(found.weights, default=weight)
        reasons += found.reasons if method in (None, found.method) else []
        method = method or found.method
    method = method or _plain(len(others), base)
    if method not in method_names():
        raise UsageError(f"no merge method is called '{method}'. {nearest(method, method_names())}")
    spec = get_method(method)
    base = _base(spec, base, others)
    count = len(dict.fromkeys([*([base] if base and spec.base != "optional" else []), *others]))
    if not spec.takes(count):
        from mergekit.methods.describe import inputs

        raise UsageError(f"'{method}' does not fit {count} models: {inputs(spec)[0].lower()}{inputs(spec)[1:]}")
    lines = _head(spec, reasons, others, comparison)
    lines += [f"merge_method: {method}  # {spec.summary.replace('``', '')}"]
    lines += [f"base_model: {_text(base)}"] if base else []
    lines += ["models:"]
    weight = 1.0 if _is_normalized(spec) else round(weight, 2)
    for number, model in enumerate(others):
        lines += [f"  - model: {_text(model)}", *_own(spec, weight, is_base=model == base, explained=not number)]
    lines += _shared(spec)
    if tokenizer:
        lines.append(f"tokenizer_source: {tokenizer}  # the models' vocabularies differ")
    if dtype:
        lines.append(f"dtype: {dtype}  # of the result; arithmetic is float32")
    return Draft("\n".join(lines) + "\n", method, tuple(reasons))


def to_merge(models: Sequence[str], base: str | None) -> list[str]:
    """``models`` without the base; UsageError if there is nothing to merge."""
    others = [model for model in models if model != base]
    if len(others) < (1 if base else 2):
        raise UsageError("give two models or more, or a base and one model that was made from it")
    return others


def _without_equals(models: list[str], comparison: Comparison) -> tuple[list[str], list[str]]:
    """``models`` without those that have the weights of the first that was compared, and why, if others are left."""
    first = len(comparison.models) - len(models)
    equal = [m for m in comparison.others if not comparison.total.changed(m) and comparison.total.is_finite(m)]
    kept = [model for number, model in enumerate(models, start=first) if number not in equal]
    if comparison.remarks or not equal or len(kept) < 2 - first:
        return models, []
    return kept, [f"{comparison.models[m]} has the weights of {comparison.models[0]} and is left out" for m in equal]


def _plain(count: int, base: str | None) -> str:
    """A method for models of which nothing is known."""
    return "task_arithmetic" if base and count > 1 else "slerp" if count <= 2 else "linear"


def _base(spec: Method, base: str | None, others: Sequence[str]) -> str | None:
    """The base that the recipe names: of methods between two models, one of the two."""
    if spec.base == "ignored":
        return None
    if base is None and spec.base == "required":
        if spec.most == 2:
            return others[0]
        raise UsageError(
            f"'{spec.name}' needs the model that the others were made from; name it with --base, or choose 'linear'"
        )
    return base


def _head(spec: Method, reasons: Sequence[str], others: Sequence[str], comparison: Comparison | None) -> list[str]:
    """Comments on what is known about the models, and why this method."""
    lines = []
    if comparison is not None:
        figures, first = comparison.matrices, comparison.models[0]
        for m in comparison.others:
            lines.append(f"{comparison.models[m]} differs by {percent(figures.moved(m))} from {first}.")
    if reasons:
        lines += [f"{spec.title}: {reasons[0]}.", *(f"{reason[0].upper()}{reason[1:]}." for reason in reasons[1:])]
    lines = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines]
    return [folded for line in lines for folded in wrap(line, 110, initial_indent="# ", subsequent_indent="#   ")]


def _is_normalized(spec: Method) -> bool:
    """Whether only the proportions of weights count."""
    return (
        any(p.name.startswith("normalize") and p.default is True for p in spec.params) or spec.form.space == "weights"
    )


def _own(spec: Method, weight: float, *, is_base: bool, explained: bool) -> list[str]:
    """The parameters of one model; ``explained`` once, where they are the same for all."""
    own = [p for p in spec.params if p.used and p.scope != "once" and p.name in _STARTS]
    own = [] if is_base and all(p.scope == "each" for p in own) else own
    if not own:
        return []
    values = {p.name: weight if p.name == "weight" else _STARTS[p.name] for p in own}
    told = {p.name: f"  # {_help(p)}" if explained else "" for p in own}
    return ["    parameters:", *(f"      {p.name}: {values[p.name]:g}{told[p.name]}" for p in own)]


def _shared(spec: Method) -> list[str]:
    """The parameters of the whole merge: those without a default, and as comments those that people turn."""
    from mergekit.methods.describe import default
    from mergekit.methods.spec import REQUIRED

    once = [p for p in spec.params if p.used and p.scope == "once" and not p.name.startswith("_")]
    needed = [f"  {p.name}: {_STARTS[p.name]:g}  # {_help(p)}" for p in once if p.default is REQUIRED]
    words = [p for p in once if p.name in _WORDS and p.default is not REQUIRED]
    optional = [f"#   {p.name}: {default(p)}  # {_help(p)}" for p in words]
    head = "parameters:" if needed else "# parameters:"
    return [head, *needed, *optional] if needed or optional else []


def _help(parameter: Parameter) -> str:
    return parameter.help.replace("``", "").replace("\n", " ")


def _text(reference: str) -> str:
    """A reference as YAML writes it; what can't be printed is written with escapes."""
    import yaml

    is_plain = reference.isprintable()
    try:
        reference.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{reference!r} is no text in UTF-8, as a recipe has to be; rename the folder") from None
    text = yaml.safe_dump(reference, default_flow_style=True, width=10_000, allow_unicode=is_plain,
                          default_style=None if is_plain else '"')  # fmt: skip
    return text.removesuffix("\n...\n").strip()
