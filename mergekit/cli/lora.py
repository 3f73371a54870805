"""``mergekit lora``: work on LoRA adapters."""

from __future__ import annotations

import os
import re
from typing import Any

import click

from mergekit.cli.help import MergeCommand
from mergekit.cli.merge import merge_recipe
from mergekit.cli.run import events_option
from mergekit.errors import MergekitError
from mergekit.options import add_merge_options
from mergekit.refs import ModelPath, ModelReference

_PLACE = re.compile(r"^recipe\.[\w.]+: ")
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group("lora", context_settings=_SETTINGS)
def lora() -> None:
    """Work on LoRA adapters."""


@lora.command("bake", cls=MergeCommand, context_settings=_SETTINGS, short_help="Bake a LoRA adapter into a model.")
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.argument("out_path", type=click.Path())
@click.option(
    "--base-quantization",
    default="none",
    show_default=True,
    metavar="NAME",
    help="What the base was quantised to when the adapter was trained (QLoRA): none, nf4, nf4-double, fp4, auto.",
)
@click.option("--dtype", metavar="NAME", help="Element type of the result (default: the base's).")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop before anything is written.")
@events_option
@add_merge_options
def bake(
    base: str,
    adapter: str,
    out_path: str,
    base_quantization: str,
    dtype: str | None,
    dry_run: bool,
    merge_options: Any,
) -> None:
    """Bake the LoRA adapter ADAPTER into the model BASE, and write the result to the folder OUT_PATH.

    BASE and ADAPTER are folders or hub names. The same command continues a run that was interrupted.
    """
    reference = ModelReference(_path(base), _path(adapter))
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": reference.dump()}],
        **({"dtype": dtype} if dtype else {}),
        **({"base_quantization": base_quantization} if base_quantization != "none" else {}),
    }
    try:
        merge_recipe(recipe, out_path, dry_run, merge_options)
    except MergekitError as error:  # nobody wrote the recipe that a fault points into
        error.args = (_PLACE.sub("", str(error)),)
        raise


def _path(text: str) -> ModelPath:
    """A folder here may have any name; elsewhere an @ goes before a revision."""
    return ModelPath(text) if os.path.isdir(os.path.expanduser(text)) else ModelPath.parse(text)
