"""The public functions, one screen each: plan and run merges and mixtures.

Here: the order of steps between recipe and published folder. Not here: decisions (planning, moe), numbers (execute),
files (output), or anything printed (cli).

Names are imported when they are first used: a command pays for what it needs only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit.api.advice import Advice as Advice
    from mergekit.api.advice import advise as advise
    from mergekit.api.advice import percent as percent
    from mergekit.api.advice import reading as reading
    from mergekit.api.compare import compare_pairing as compare_pairing
    from mergekit.api.compare import diff as diff
    from mergekit.api.compare import pair as pair
    from mergekit.api.comparison import Comparison as Comparison
    from mergekit.api.comparison_page import write_comparison as write_comparison
    from mergekit.api.draft import to_merge as to_merge
    from mergekit.api.inspect import ModelSummary as ModelSummary
    from mergekit.api.inspect import inspect_model as inspect_model
    from mergekit.api.limits import memory as memory
    from mergekit.api.merge import plan as plan
    from mergekit.api.merge import run_merge as run_merge
    from mergekit.api.moe import MoeOptions as MoeOptions
    from mergekit.api.moe import plan_moe as plan_moe
    from mergekit.api.moe import run_moe as run_moe
    from mergekit.api.moe import run_moe_plan as run_moe_plan
    from mergekit.api.new import new_recipe as new_recipe
    from mergekit.api.new import write_recipe as write_recipe
    from mergekit.api.options import RunOptions as RunOptions
    from mergekit.api.pages import check_page as check_page
    from mergekit.api.report import report_model as report_model
    from mergekit.api.report import report_plan as report_plan
    from mergekit.api.run import Hooks as Hooks
    from mergekit.api.run import check_writable as check_writable
    from mergekit.api.run import run_plan as run_plan
    from mergekit.api.run import slow_part as slow_part
    from mergekit.output.report import check_drawable as check_drawable

__all__ = [
    "Advice",
    "Comparison",
    "Hooks",
    "ModelSummary",
    "MoeOptions",
    "RunOptions",
    "advise",
    "check_drawable",
    "check_page",
    "check_writable",
    "compare_pairing",
    "diff",
    "inspect_model",
    "memory",
    "new_recipe",
    "pair",
    "percent",
    "plan",
    "plan_moe",
    "reading",
    "report_model",
    "report_plan",
    "run_merge",
    "run_moe",
    "run_moe_plan",
    "run_plan",
    "slow_part",
    "to_merge",
    "write_comparison",
    "write_recipe",
]

_HOMES = {
    "Advice": "mergekit.api.advice",
    "Comparison": "mergekit.api.comparison",
    "Hooks": "mergekit.api.run",
    "ModelSummary": "mergekit.api.inspect",
    "MoeOptions": "mergekit.api.moe",
    "RunOptions": "mergekit.api.options",
    "advise": "mergekit.api.advice",
    "check_drawable": "mergekit.output.report",
    "check_page": "mergekit.api.pages",
    "check_writable": "mergekit.api.run",
    "compare_pairing": "mergekit.api.compare",
    "diff": "mergekit.api.compare",
    "inspect_model": "mergekit.api.inspect",
    "memory": "mergekit.api.limits",
    "new_recipe": "mergekit.api.new",
    "pair": "mergekit.api.compare",
    "percent": "mergekit.api.advice",
    "plan": "mergekit.api.merge",
    "plan_moe": "mergekit.api.moe",
    "reading": "mergekit.api.advice",
    "report_model": "mergekit.api.report",
    "report_plan": "mergekit.api.report",
    "run_merge": "mergekit.api.merge",
    "run_moe": "mergekit.api.moe",
    "run_moe_plan": "mergekit.api.moe",
    "run_plan": "mergekit.api.run",
    "slow_part": "mergekit.api.run",
    "to_merge": "mergekit.api.draft",
    "write_comparison": "mergekit.api.comparison_page",
    "write_recipe": "mergekit.api.new",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value
    raise AttributeError(f"module 'mergekit.api' has no attribute '{name}'")
