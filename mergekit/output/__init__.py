"""The output folder: staging, journal, atomic publishing, and the small files of a model.

Here: writing. Not here: computing, or deciding what to write (``planning`` does). To add a small file, add it to
``api.run_merge``'s documents.
"""

from mergekit.output.card import model_card
from mergekit.output.journal import was_publishing
from mergekit.output.staging import STAGING, Staging, holds_weights

__all__ = ["STAGING", "Staging", "holds_weights", "model_card", "was_publishing"]
