"""Follow a plan: read blocks, run kernels, hand the bytes to a sink. Same plan, same bytes, on any number of threads.

Here: threads, devices, progress. Not here: decisions (``planning``), files of the output (``output``).
"""

from mergekit.execute.memory import buffer_bytes, forms
from mergekit.execute.norms import is_weighted, model_factors, with_weights
from mergekit.execute.threads import default_threads, run_threads, run_works
from mergekit.execute.whole_work import estimated_seconds
from mergekit.execute.work import Sink

__all__ = [
    "Sink",
    "buffer_bytes",
    "default_threads",
    "estimated_seconds",
    "forms",
    "is_weighted",
    "model_factors",
    "run_threads",
    "run_works",
    "with_weights",
]
