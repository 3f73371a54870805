"""``mergekit methods``: the merge methods and their parameters, from their declarations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import click

from mergekit.cli.boundary import plain, say

if TYPE_CHECKING:
    from mergekit.methods import Method
    from mergekit.methods.spec import Parameter

_WIDTH = 100


def _names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The methods that begin so, for a shell to complete."""
    from mergekit.methods import method_names

    return [name for name in method_names() if name.startswith(incomplete)]


@click.command("methods", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False, shell_complete=_names)
@click.option(
    "--method-file",
    "method_files",
    multiple=True,
    type=Path,
    metavar="NAME",
    help="Python file that defines merge methods; it is run.",
)
def methods(name: str | None, method_files: tuple[Path, ...]) -> None:
    """List the merge methods, or explain the method NAME."""
    from mergekit.methods import get_method, load_method_file, method_names

    for path in method_files:
        load_method_file(path)
    if name is None:
        found = [get_method(known) for known in method_names()]
        width = max(len(method.name) for method in found)
        for method in found:
            click.echo(plain(f"{method.name:{width}}  {method.summary.replace('``', chr(39))}"))
        say("mergekit methods NAME explains one of them")
        return
    click.echo("\n".join(plain(line) for line in reference(get_method(name))))


def reference(method: Method) -> list[str]:
    """Everything that is declared about a method, as lines of text."""
    from mergekit.methods.describe import explanation, form, inputs, parameters, promises

    lines = [f"{method.name}: {method.title}"]
    lines += [text for text in (method.paper, method.url) if text]
    lines += ["", *explanation(method).splitlines(), "", inputs(method), form(method)]
    lines += _section("Promises", [f"  {text}" for text in promises(method)])
    used = [p for p in parameters(method) if p.used]
    lines += _section("Parameters", _described(used))
    lines += _section("Options of all methods that work on task vectors", _described(method.options))
    unused = [f"  {p.name}  {p.help}" for p in parameters(method) if not p.used]
    return lines + _section("Accepted for the sake of old recipes, without effect", unused)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"{title}:", *lines] if lines else []


def _described(parameters: Sequence[Parameter]) -> list[str]:
    """Two lines or more for each parameter: its values, who has one, its default; and what it does."""
    from mergekit.methods.describe import default, owners

    lines = []
    for p in parameters:
        value = default(p)
        lines.append(f"  {p.name}  {p.kind}; {owners(p)}; {'' if value == 'required' else 'default '}{value}")
        text = p.help.replace("``", "'")
        lines += wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")
    return lines
