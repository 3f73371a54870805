"""Look at the tokenizers of models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit.refs import ModelPath, ModelReference

if TYPE_CHECKING:
    from mergekit.vocab.difference import Difference

__all__ = ["tokenizer_difference"]


def tokenizer_difference(first: str, second: str, *, cache_dir: Path | None = None) -> Difference:
    """How the tokenizers of two models differ. Of models on the hub only small files are fetched."""
    from mergekit.planning.locate import small_folder
    from mergekit.vocab.difference import compare_tokenizers

    paths = [ModelPath(text) if Path(text).expanduser().is_dir() else ModelPath.parse(text) for text in (first, second)]
    a, b = ((small_folder(path, cache_dir), ModelReference(path).short) for path in paths)
    return compare_tokenizers(a, b)
