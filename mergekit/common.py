"""Small helpers under the module name that notebooks import them from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergekit.errors import RecipeError
from mergekit.options import parse_kmb
from mergekit.refs import ModelPath, ModelReference

if TYPE_CHECKING:
    import torch

__all__ = ["ModelPath", "ModelReference", "dtype_from_name", "get_config_value", "parse_kmb", "set_config_value"]


def dtype_from_name(name: str | None) -> torch.dtype | None:
    """The torch dtype that a recipe names; None for none. RecipeError for a name that is no dtype of recipes."""
    import torch

    from mergekit.dtypes import recipe_dtype

    if not name:
        return None
    dtype = recipe_dtype(name)
    if dtype is None:
        raise RecipeError(f"no dtype '{name}'. Valid: bfloat16, float16, float32, float64.")
    found: torch.dtype = getattr(torch, dtype.name)
    return found


def get_config_value(config: Any, key: str) -> Any:
    """The value at a dotted key of a config (an object or a mapping): ``text_config.vocab_size``."""
    for part in key.split("."):
        config = config[part] if isinstance(config, Mapping) else getattr(config, part)
    return config


def set_config_value(config: Any, key: str, value: Any) -> None:
    """Set the value at a dotted key of a config (an object or a dict)."""
    *path, last = key.split(".")
    target = get_config_value(config, ".".join(path)) if path else config
    if isinstance(target, dict):
        target[last] = value
    else:
        setattr(target, last, value)
