"""The output folder: staging, journal, atomic publishing, and the small files of a model.

Here: writing. Not here: computing, or deciding what to write (``planning`` does). To add a small file, add it to
``api.run_merge``'s documents.
"""

from mergekit.output.card import model_card
from mergekit.output.check import vocabulary_faults
from mergekit.output.journal import publishing
from mergekit.output.manifest import (
    MANIFEST,
    Manifest,
    inputs_of_plan,
    manifest_text,
    read_manifest,
    recipe_text,
    sha256,
)
from mergekit.output.staging import STAGING, Staging, holds_weights, is_model_file, refuse_replacing
from mergekit.output.stats import STATS, lost_to_rounding, read_summary, stats_text

__all__ = [
    "MANIFEST",
    "STAGING",
    "STATS",
    "Manifest",
    "Staging",
    "holds_weights",
    "inputs_of_plan",
    "is_model_file",
    "lost_to_rounding",
    "manifest_text",
    "model_card",
    "publishing",
    "read_manifest",
    "read_summary",
    "recipe_text",
    "refuse_replacing",
    "sha256",
    "stats_text",
    "vocabulary_faults",
]
