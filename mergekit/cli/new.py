"""``mergekit new``: a recipe to start from, by questions or by flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit.cli.boundary import can_ask, plain, say
from mergekit.errors import MergekitError, UsageError

if TYPE_CHECKING:
    from mergekit.api.comparison import Comparison
    from mergekit.api.draft import Draft


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
    if asks:
        base, models = _ask_models(base, cache_dir)
        look = look and click.confirm("Read their weights to see how they differ?", default=True, err=True)
    else:
        output = output or Path("recipe.yml")
    if output is not None and output.exists() and not overwrite:
        raise UsageError(f"{output} is there already; choose another name, or pass --overwrite")
    others = api.to_merge(models, base)
    comparison = _look(base, others, cache_dir) if look else None
    made = api.new_recipe(models, base=base, method=method, comparison=comparison, cache_dir=cache_dir)
    if asks:
        _show(made, comparison)
        made = _ask_method(made, lambda name: api.new_recipe(
            models, base=base, method=name, comparison=comparison, cache_dir=cache_dir))  # fmt: skip
        output = output or Path(click.prompt("Write the recipe to", default="recipe.yml", err=True))
    assert output is not None
    api.write_recipe(made, output, overwrite=overwrite)
    if not asks:
        _show(made, comparison)
    click.echo(plain(made.text), nl=False)
    say(f"wrote {output}; next: mergekit plan {output}, then mergekit merge {output} out")


def _ask_models(base: str | None, cache_dir: Path | None) -> tuple[str | None, tuple[str, ...]]:
    """The base, if there is one, and the models to merge, each looked at as soon as it is named."""
    say("Models are folders here, or names on the hub such as org/model. Leave a line empty to go on.")
    if base is None:
        base = _ask_model("Model that the others were made from (empty if there is none or you don't know)", cache_dir)
    models: list[str] = []
    while (model := _ask_model(f"Model {len(models) + 1} to merge", cache_dir)) is not None:
        models.append(model)
    return base, tuple(models)


def _ask_model(question: str, cache_dir: Path | None) -> str | None:
    from mergekit import api

    while True:
        model = click.prompt(question, default="", show_default=False, err=True).strip()
        if not model:
            return None
        try:
            say(f"  {api.inspect_model(model, cache_dir=cache_dir).headline}")
            return str(model)
        except MergekitError as error:
            say(f"  {error}")


def _look(base: str | None, models: Sequence[str], cache_dir: Path | None) -> Comparison:
    """How the models differ from the base, else from the first of them, with progress on the screen."""
    from mergekit import api
    from mergekit.cli.progress import downloads, progress

    with downloads(shown=True) as told:
        pairing = api.pair(*([base] if base else []), *models, cache_dir=cache_dir, told=told)
    with progress(pairing.nbytes, shown=True, what="reading") as meter:
        return api.compare_pairing(pairing, common_base=bool(base), on_compile=meter.compiling, advance=meter)


def _show(made: Draft, comparison: Comparison | None) -> None:
    """What was found about the models, and why the method."""
    from mergekit import api

    if comparison is not None:
        say("\n".join(f"* {text}" for text in api.reading(comparison)))
    say("\n".join([f"suggested: {made.method}", *(f"* {reason}" for reason in made.reasons)]))


def _ask_method(made: Draft, again: Callable[[str], Draft]) -> Draft:
    """The draft with the method that is chosen; asked again where a method can't take the models."""
    while True:
        method = click.prompt("Method", default=made.method, err=True).strip()
        if method == made.method:
            return made
        try:
            return again(method)
        except MergekitError as error:
            say(f"  {error}")
