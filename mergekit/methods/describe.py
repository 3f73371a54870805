"""A method's declaration in words: for the command line, the documentation and messages."""

from __future__ import annotations

import inspect
from typing import Any

from mergekit.methods.spec import LAWS, REQUIRED, Elementwise, Method, Parameter, Span, Sparse

__all__ = ["default", "explanation", "form", "inputs", "owners", "parameters", "promises"]

_OWNERS = {"once": "one value", "each": "one for each model but the base", "input": "one for each model"}


def explanation(method: Method) -> str:
    """The docstring of the method's function up to its examples, with ``double quotes`` as 'single' ones."""
    text = inspect.cleandoc(method.function.__doc__ or "")
    return text.split("\n>>>")[0].rstrip().replace("``", "'")


def inputs(method: Method) -> str:
    """How many models the method takes, and what it needs of a base model: a sentence.

    >>> from mergekit.methods import get_method
    >>> inputs(get_method("slerp"))
    'Takes 2 models, one of them the base.'
    """
    least, most = method.least, method.most
    if most is None:
        count = "any number of models" if least <= 1 else f"{least} or more models"
    else:
        count = f"{least}{f' to {most}' if most > least else ''} model{'s' if most > 1 else ''}"
    base = {
        "required": ", one of them the base",
        "optional": ", and a base besides them or none",
        "ignored": "; a base model is one like the others" if most != 1 else "",
    }
    return f"Takes {count}{base[method.base]}."


def form(method: Method) -> str:
    """What the method computes from what, and so what it costs: a sentence."""
    kind = method.form
    what = "the differences from the base" if kind.space == "deltas" and method.base != "ignored" else "the models"
    if kind.space == "deltas" and method.base == "optional":
        what += " (without one, of the models)"
    if isinstance(kind, Span) and not kind.gram:
        return f"A weighted sum of {what}, with weights known beforehand; one pass over the data."
    if isinstance(kind, Span):
        return f"A weighted sum of {what}, with weights from their lengths and angles; two passes over the data."
    if isinstance(kind, Sparse):
        return f"A sum of selected entries of {what}; up to four passes over the data."
    if isinstance(kind, Elementwise):
        passes = 1 + bool(kind.measure) + 2 * bool(kind.key)
        return f"A function of the entries of {what} at each place; {_times(passes)} over the data."
    return f"A function of {what} as whole tensors, which are held in memory one tensor at a time."


def _times(count: int) -> str:
    return {1: "one pass", 2: "two passes"}.get(count, f"{count} passes")


def promises(method: Method) -> list[str]:
    """The laws that the method keeps, as the tests hold it to them."""
    return [f"{LAWS[law][0].upper()}{LAWS[law][1:]}." for law in method.laws]


def parameters(method: Method) -> list[Parameter]:
    """The parameters to be shown, without those that are only ours (their names begin with an underscore)."""
    return [p for p in method.params if not p.name.startswith("_")]


def owners(parameter: Parameter) -> str:
    """Who has a value: ``one for each model``."""
    return _OWNERS[parameter.scope]


def default(parameter: Parameter) -> str:
    """The default as it would be written in a recipe, or ``required``."""
    value: Any = parameter.default
    if value is REQUIRED:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return value if isinstance(value, str) else f"{value:g}"
