"""Tensors on disk: headers checked in full, reads by position, quantised files recognised.

Here: file formats. Not here: what tensors mean, or merging. To add a format, give ``open_checkpoint`` a way to find
its files and tensors, and the executor a reader for them.
"""

from mergekit.checkpoint.checkpoint import Checkpoint, FileIdentity, open_checkpoint
from mergekit.checkpoint.header import TensorInfo, build_header
from mergekit.checkpoint.index import is_weight_file, read_json

__all__ = [
    "Checkpoint",
    "FileIdentity",
    "TensorInfo",
    "build_header",
    "is_weight_file",
    "open_checkpoint",
    "read_json",
]
