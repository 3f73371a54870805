"""What tensors a model has and what they are, inferred from names and config; tables only correct the inference.

Here: names of tensors, keys of config.json. Not here: files, numbers. To support an architecture that inference gets
wrong, extend the patterns of ``layout`` or the key lists of ``config`` and ``stacking``, and add a tiny checkpoint to
the family tests.
"""

from mergekit.families.layout import Layout, infer_layout

__all__ = ["Layout", "infer_layout"]
