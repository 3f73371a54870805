"""``mergekit methods``: the merge methods and their parameters, from their declarations."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import click

from mergekit.cli.boundary import say

if TYPE_CHECKING:
    from mergekit.methods.spec import Parameter


@click.command("methods", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the merge methods, or explain the method NAME."""
    from mergekit.methods import get_method, method_names

    if name is None:
        width = max(map(len, method_names()))
        for each in map(get_method, method_names()):
            click.echo(f"{each.name:{width}}  {_text(each.summary)}")
        say("mergekit methods NAME explains one of them")
        return
    method = get_method(name)
    count = "any number of models" if method.most is None else f"up to {method.most} models"
    if method.most == method.least:
        count = f"exactly {method.least} model{'s' if method.least > 1 else ''}"
    base = "one of them the base" if method.base == "required" else "the base, if there is one, is like the others"
    reference = f"\n{method.paper}\n{method.url}" if method.paper else ""
    click.echo(f"{method.name}: {method.title}{reference}\n")
    click.echo(_text(inspect.cleandoc(method.function.__doc__ or "").split("\n>>>")[0].rstrip()))
    click.echo(f"\nTakes {count}; {base}.\n\nParameters:")
    for parameter in method.params:
        click.echo(f"  {parameter.name}: {_text(parameter.help)}{_kind(parameter) if parameter.used else ''}")


def _text(text: str) -> str:
    """Docstring markup as plain text."""
    return text.replace("``", "'")


def _kind(parameter: Parameter) -> str:
    from mergekit.methods.spec import REQUIRED

    scope = {"once": "one value", "each": "one for each model but the base", "input": "one for each model"}
    default = "required" if parameter.default is REQUIRED else f"default {_default(parameter.default)}"
    return f" ({parameter.kind}; {scope[parameter.scope]}; {default})"


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}"
