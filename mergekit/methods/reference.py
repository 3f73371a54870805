"""What a method's declaration says, in sentences: for the command line, the documentation and model cards."""

from __future__ import annotations

import inspect
from typing import Any

from mergekit.methods.spec import LAWS, REQUIRED, Elementwise, Method, Parameter, Span, Sparse

__all__ = ["base_text", "default_text", "description", "form_text", "law_texts", "models_text", "scope_text"]


def description(method: Method) -> str:
    """The text of the function's docstring, without its examples."""
    return inspect.cleandoc(method.function.__doc__ or "").split("\n>>>")[0].rstrip()


def models_text(method: Method) -> str:
    """How many models it takes: ``exactly 2 models``."""
    least, most = method.least, method.most
    if most is None:
        return "any number of models" if least == 1 else f"{least} models or more"
    many = "s" if most > 1 else ""
    return f"exactly {most} model{many}" if least == most else f"{least} to {most} model{many}"


def base_text(method: Method) -> str:
    """What a base model is to it."""
    return {
        "required": "one of them the base",
        "optional": "and perhaps a base besides them",
        "ignored": "a base, if there is one, is like the others",
    }[method.base]


def form_text(method: Method) -> str:
    """What it costs, in terms of its form."""
    form = method.form
    if isinstance(form, Span):
        how = "a weighted sum, its coefficients found in a first pass over the data" if form.gram else "a weighted sum"
        vectors = "; for the whole tensor, or each row or column" if form.vectors else ""
        return f"{how}{vectors}"
    if isinstance(form, Sparse):
        return "parts of each model's difference from the base, chosen and added up while streaming"
    if isinstance(form, Elementwise):
        first = ", after passes that look at the whole tensor" if form.measure or form.key else ""
        return f"element by element while streaming{first}"
    return "whole tensors in memory: slower, and needs room for a few copies of the largest tensor"


def scope_text(parameter: Parameter) -> str:
    """For what a parameter has a value."""
    return {"once": "one value", "each": "one for each model but the base", "input": "one for each model"}[
        parameter.scope
    ]


def default_text(parameter: Parameter) -> str:
    """The default as a recipe would say it."""
    value: Any = parameter.default
    if value is REQUIRED:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return value if isinstance(value, str) else f"{value:g}"


def law_texts(method: Method) -> list[str]:
    """What it promises."""
    return [LAWS[law] for law in method.laws]
