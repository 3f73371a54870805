"""mergekit: a merge is a recipe turned into a plan, executed tensor by tensor, written straight to its place.

    import mergekit
    mergekit.run_merge("recipe.yml", "out")     # merge
    print(mergekit.plan("recipe.yml").warnings) # look first

Names are imported when they are first used, so ``import mergekit`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergekit.version import __version__

if TYPE_CHECKING:
    from mergekit.api import RunOptions as RunOptions
    from mergekit.api import diff as diff
    from mergekit.api import plan as plan
    from mergekit.api import run_merge as run_merge
    from mergekit.api import run_moe as run_moe
    from mergekit.api.in_memory import merge_state_dicts as merge_state_dicts
    from mergekit.api.in_memory import merge_tensors as merge_tensors
    from mergekit.errors import MergekitError as MergekitError
    from mergekit.recipe import MergeConfiguration as MergeConfiguration

__all__ = [
    "MergeConfiguration",
    "MergekitError",
    "RunOptions",
    "__version__",
    "diff",
    "merge_state_dicts",
    "merge_tensors",
    "plan",
    "run_merge",
    "run_moe",
]

_HOMES = {
    "MergeConfiguration": "mergekit.recipe",
    "MergekitError": "mergekit.errors",
    "RunOptions": "mergekit.api",
    "diff": "mergekit.api",
    "merge_state_dicts": "mergekit.api.in_memory",
    "merge_tensors": "mergekit.api.in_memory",
    "plan": "mergekit.api",
    "run_merge": "mergekit.api",
    "run_moe": "mergekit.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mergekit' has no attribute '{name}'")
