"""Look at the tokenizers of models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit.vocab.difference import Difference

__all__ = ["tokenizer_difference"]


def tokenizer_difference(first: str, second: str, *, cache_dir: Path | None = None) -> Difference:
    """How the tokenizers of two models differ. Of models on the hub only small files are fetched."""
    from mergekit.planning.locate import reference_of, small_folder
    from mergekit.vocab.difference import compare_tokenizers

    references = [reference_of(first), reference_of(second)]
    is_one_name = references[0].short == references[1].short
    a, b = ((small_folder(r.model, cache_dir), str(r) if is_one_name else r.short) for r in references)
    return compare_tokenizers(a, b)
