"""YAML made into validated meaning; every fault carries file, line and column.

Here: words of the YAML language. Not here: files of models, tensors. To add a word, declare it in ``schema``.
"""

from mergekit.recipe.recipe import EMBED_SLERP, EMBEDDING_OPTIONS, Recipe, load_recipe
from mergekit.recipe.schema import MergeConfiguration

__all__ = ["EMBEDDING_OPTIONS", "EMBED_SLERP", "MergeConfiguration", "Recipe", "load_recipe"]
