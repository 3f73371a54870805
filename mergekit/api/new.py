"""Make a recipe for models that are there: look at them, choose, write it, and plan it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit.api.draft import Draft, draft, to_merge
from mergekit.api.merge import plan
from mergekit.api.options import RunOptions
from mergekit.api.pages import write_whole
from mergekit.errors import UsageError

if TYPE_CHECKING:
    from mergekit.api.comparison import Comparison

__all__ = ["new_recipe", "write_recipe"]


def new_recipe(
    models: Sequence[str],
    *,
    base: str | None = None,
    method: str | None = None,
    comparison: Comparison | None = None,
    cache_dir: Path | None = None,
) -> Draft:
    """A commented recipe for ``models``, planned to be sure that it can be run.

    ``comparison`` of the base, or the first model, with the others (``diff``) suggests what is not given. The element
    type is that of most weights; where vocabularies differ, the recipe unites them. Raises a MergekitError if the
    models can't be merged so.
    """
    first = base or to_merge(models, base)[0]
    made = draft(
        models,
        base=base,
        method=method,
        comparison=comparison,
        dtype=_dtype(first, cache_dir),
        tokenizer="union" if _vocabularies_differ([*([base] if base else []), *models], cache_dir) else None,
    )
    plan(_parsed(made.text), RunOptions(cache_dir=cache_dir))
    return made


def write_recipe(made: Draft, path: Path, *, overwrite: bool = False) -> None:
    """Write a recipe; UsageError if something is there already."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is there already; choose another name, or pass --overwrite")
    if path.exists() and (path.parent / "config.json").exists():
        raise UsageError(f"{path} lies in the folder of a model and stays as it is; choose another name")
    try:
        write_whole(path, made.text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def _parsed(text: str) -> dict[str, object]:
    import yaml

    parsed: dict[str, object] = yaml.safe_load(text)
    return parsed


def _dtype(model: str, cache_dir: Path | None) -> str:
    """The floating type that most numbers of a model have."""
    from mergekit.planning.locate import reference_of
    from mergekit.planning.models import open_models

    opened = open_models([reference_of(model)], cache_dir=cache_dir, fetch=False)
    sizes: Counter[str] = Counter()
    for info in opened[0].tensors.values():
        if info.dtype.is_float:
            sizes[info.dtype.name] += info.size
    return sizes.most_common(1)[0][0] if sizes else "bfloat16"


def _vocabularies_differ(models: Sequence[str], cache_dir: Path | None) -> bool:
    """Whether some model has other tokens, or other ids for them, than the first."""
    from mergekit.api.tokenizers import tokenizer_difference
    from mergekit.errors import MergekitError

    first, *others = dict.fromkeys(models)
    for other in others:
        try:
            found = tokenizer_difference(first, other, cache_dir=cache_dir)
        except MergekitError:  # one of them has no tokenizer that can be read: planning says what that means
            continue
        if found.only_first or found.only_second or found.moved:
            return True
    return False
