"""The public functions, one screen each: plan and run merges and mixtures.

Here: the order of steps between recipe and published folder. Not here: decisions (planning, moe), numbers (execute),
files (output), or anything printed (cli).
"""

from mergekit.api.advice import Advice, advise, percent, reading
from mergekit.api.compare import compare_pairing, diff, pair
from mergekit.api.comparison import Comparison
from mergekit.api.draft import to_merge
from mergekit.api.limits import memory
from mergekit.api.merge import plan, run_merge
from mergekit.api.moe import MoeOptions, plan_moe, run_moe, run_moe_plan
from mergekit.api.new import new_recipe, write_recipe
from mergekit.api.options import RunOptions
from mergekit.api.run import Hooks, check_writable, run_plan, slow_part

__all__ = [
    "Advice",
    "Comparison",
    "Hooks",
    "MoeOptions",
    "RunOptions",
    "advise",
    "check_writable",
    "compare_pairing",
    "diff",
    "memory",
    "new_recipe",
    "pair",
    "percent",
    "plan",
    "plan_moe",
    "reading",
    "run_merge",
    "run_moe",
    "run_moe_plan",
    "run_plan",
    "slow_part",
    "to_merge",
    "write_recipe",
]
