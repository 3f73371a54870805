"""``mergekit new``: a recipe to start from, by questions or by flags."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit.cli.boundary import can_ask, plain, say
from mergekit.cli.show import folded, listed
from mergekit.errors import IncompatibleError, MergekitError, UsageError

if TYPE_CHECKING:
    from mergekit.api.comparison import Comparison
    from mergekit.api.draft import Draft

_OPTION = re.compile(r"; [^;]*--[a-z][^;]*")
"""The part of a message that advises to give an option."""


@click.command("new", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("models", type=click.Path(), nargs=-1, metavar="[MODEL]...")
@click.option("--base", metavar="MODEL", help="The model that the others were made from.")
@click.option("--method", metavar="NAME", help="The merge method (default: what suits the models).")
@click.option("-o", "--output", type=Path, metavar="FILE", help="Where to write the recipe (default: recipe.yml).")
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
@click.option("--look/--no-look", default=True, show_default=True, help="Read the weights to see how they differ.")
@click.option("--cache-dir", type=Path, metavar="PATH", help="Where files of hub models are kept.")
def new(models: tuple[str, ...], base: str | None, method: str | None, output: Path | None, overwrite: bool, look: bool,
        cache_dir: Path | None) -> None:  # fmt: skip
    """Write a commented recipe that merges MODELs: folders or hub names.

    Asks for what is not given if a terminal is there to answer.
    """
    from mergekit import api

    asks = can_ask() and not models
    if not asks:
        output = output or Path("recipe.yml")
    if output is not None and output.exists() and not overwrite:
        raise UsageError(f"{output} is there already; choose another name, or pass --overwrite")
    if asks:
        base, models = _ask_models(base, cache_dir)
        look = look and click.confirm("Read their weights to see how they differ?", default=True, err=True)
    others = api.to_merge(models, base)
    comparison = _look(base, others, cache_dir) if look else None

    def make(name: str | None) -> Draft:
        return api.new_recipe(models, base=base, method=name, comparison=comparison, cache_dir=cache_dir)

    if asks:
        _show_models(comparison)
        made = _ask_method(make, method)
        output = _write_somewhere(made, output, overwrite)
    else:
        assert output is not None
        made = make(method)
        api.write_recipe(made, output, overwrite=overwrite)
        _show_models(comparison)
        _show_method(made, "suggested" if method is None else "method")
    click.echo(plain(made.text), nl=False)
    file = shlex.quote(str(output))
    say(f"wrote {output}; next: mergekit plan {file}, then mergekit merge {file} out")


def _ask_models(base: str | None, cache_dir: Path | None) -> tuple[str | None, tuple[str, ...]]:
    """The base, if there is one, and models enough to merge, each looked at as soon as it is named."""
    from mergekit import api

    say("Models are folders here, or names on the hub such as org/model. Leave a line empty to go on.")
    if base is None:
        base = _ask_model(
            "Model that the others were made from (empty if there is none or you don't know)", cache_dir, ()
        )
    models: list[str] = []
    while True:
        named = [*([base] if base else []), *models]
        model = _ask_model(f"Model {len(models) + 1} to merge", cache_dir, named)
        if model is not None:
            models.append(model)
            continue
        try:
            api.to_merge(models, base)
        except UsageError as error:
            _answer(error)
        else:
            return base, tuple(models)


def _ask_model(question: str, cache_dir: Path | None, named: Sequence[str]) -> str | None:
    """A model that is there and is none of those ``named``; None for an empty line."""
    from mergekit import api

    while True:
        model = click.prompt(question, default="", show_default=False, err=True).strip()
        if not model:
            return None
        if any(_is_same(model, other) for other in named):
            say(f"  {model} is named already; name another, or leave the line empty")
            continue
        try:
            say(f"  {api.inspect_model(model, cache_dir=cache_dir).headline}")
            return str(model)
        except MergekitError as error:
            _answer(error)


def _is_same(first: str, second: str) -> bool:
    """Whether two references are one text or one folder."""
    a, b = os.path.expanduser(first), os.path.expanduser(second)
    return first == second or (os.path.isdir(a) and os.path.isdir(b) and os.path.samefile(a, b))


def _answer(error: MergekitError) -> None:
    """Say what is wrong with an answer. The question comes again, so advice to give an option is left out."""
    say("\n".join(folded(_OPTION.sub("", str(error)), "  ", "  ")))


def _look(base: str | None, models: Sequence[str], cache_dir: Path | None) -> Comparison:
    """How the models differ from the base, else from the first of them, with progress on the screen."""
    from mergekit import api
    from mergekit.cli.progress import downloads, progress

    with downloads(shown=True) as told:
        pairing = api.pair(*([base] if base else []), *models, cache_dir=cache_dir, told=told)
    with progress(pairing.nbytes, shown=True, what="reading") as meter:
        return api.compare_pairing(pairing, common_base=bool(base), on_compile=meter.compiling, advance=meter)


def _show_models(comparison: Comparison | None) -> None:
    """What was found about the models."""
    from mergekit import api

    if comparison is not None:
        say("\n".join(listed(api.reading(comparison))))


def _show_method(made: Draft, how: str) -> None:
    """The method, ``how`` it came there, and why."""
    say("\n".join([f"{how}: {made.method}", *listed(made.reasons)]))


def _ask_method(make: Callable[[str | None], Draft], method: str | None) -> Draft:
    """The draft with ``method``, or with the one that is chosen; asked again where a method can't take the models."""
    suggested: Draft | None = None
    while True:
        try:
            made = make(method)
        except UsageError as error:
            if method is None and isinstance(error, IncompatibleError):  # nor will another method help
                raise
            _answer(error)
        else:
            _show_method(made, "suggested" if method is None else "method")
            if method is not None:
                return made
            suggested = made
        method = click.prompt("Method", default=suggested.method if suggested else None, err=True).strip()
        if suggested is not None and method == suggested.method:
            return suggested


def _write_somewhere(made: Draft, output: Path | None, overwrite: bool) -> Path:
    """Write the recipe to ``output`` or to the file that is named, which is asked for until one can be written."""
    from mergekit import api

    while True:
        if output is None:
            names = chain(["recipe.yml"], (f"recipe-{number}.yml" for number in count(2)))
            free = next(name for name in names if overwrite or not os.path.lexists(name))
            output = Path(click.prompt("Write the recipe to", default=free, err=True).strip()).expanduser()
        try:
            api.write_recipe(made, output, overwrite=overwrite)
        except UsageError as error:
            _answer(error)
            output = None
        else:
            return output
