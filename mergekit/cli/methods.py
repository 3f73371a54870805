"""``mergekit methods``: the merge methods and their parameters, from their declarations."""

from __future__ import annotations

import inspect

import click

from mergekit.cli.boundary import say


@click.command("methods", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the merge methods, or explain the method NAME."""
    from mergekit.methods import get_method, method_names

    if name is None:
        width = max(map(len, method_names()))
        for each in map(get_method, method_names()):
            click.echo(f"{each.name:{width}}  {each.summary}")
        say("`mergekit methods NAME` explains one")
        return
    method = get_method(name)
    most = "any number of" if method.most is None else f"up to {method.most}"
    if method.most == method.least:
        most = f"exactly {method.least}"
    base = "needs a base model" if method.base == "required" else "a base model is an input like any other"
    click.echo(f"{method.name}: {method.title}\n{method.paper}\n{method.url}\n")
    click.echo(inspect.cleandoc(method.function.__doc__ or "").split("\n>>>")[0].rstrip())
    click.echo(f"\nTakes {most} model(s); {base}.\n\nParameters:")
    for parameter in method.params:
        scope = {"once": "one value", "each": "one per model but the base", "input": "one per model"}[parameter.scope]
        default = "required" if repr(parameter.default) == "required" else f"default {parameter.default}"
        click.echo(f"  {parameter.name}: {parameter.help} ({parameter.kind}; {scope}; {default})")
