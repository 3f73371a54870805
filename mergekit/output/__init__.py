"""The output folder: staging, journal, atomic publishing, and the small files of a model.

Here: writing. Not here: computing, or deciding what to write (``planning`` does). To add a small file, add it to
``api.run_merge``'s documents.
"""

from mergekit.output.card import model_card
from mergekit.output.check import vocabulary_faults
from mergekit.output.journal import was_publishing
from mergekit.output.staging import STAGING, Staging, holds_weights
from mergekit.output.stats import STATS, lost_to_rounding, stats_text

__all__ = [
    "STAGING",
    "STATS",
    "Staging",
    "holds_weights",
    "lost_to_rounding",
    "model_card",
    "stats_text",
    "vocabulary_faults",
    "was_publishing",
]
