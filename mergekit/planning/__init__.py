"""Recipe, headers and layouts made into a plan: every output tensor's expression, file and offset.

Here: decisions about what will happen. Not here: reading weights, writing files. To add a kind of expression, add a
node to ``plan``, let ``express`` make it, and give ``execute`` a way to follow it.
"""

from mergekit.planning.build import PlanOptions, build_plan
from mergekit.planning.models import has_remote_models
from mergekit.planning.plan import Plan

__all__ = ["Plan", "PlanOptions", "build_plan", "has_remote_models"]
