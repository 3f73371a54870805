"""The exceptions of mergekit. Each message says what, where, and what to do next.

    MergekitError               base of all; catch this in scripts        exit code 1
    |-- UsageError              options or folders that can't be used     exit code 2
    |   |-- RecipeError         the YAML says something we can't do       exit code 2
    |   |-- ModelNotFoundError  no such folder, file or hub repository    exit code 2
    |   |-- IncompatibleError   the models of a recipe don't fit together exit code 2
    |-- CheckpointError         an input file is damaged or hostile       exit code 1
    |   |-- QuantizedError      packed integers that must not be averaged exit code 1
    |-- HubError                the hub can't be reached or refuses       exit code 1
    |-- RunError                the merge itself can't go on              exit code 1
        |-- DiskSpaceError      the output would not fit                  exit code 1
        |-- NonFiniteError      a computed tensor holds NaN or infinity   exit code 1
        |-- InputChangedError   an input file changed during the merge    exit code 1
        |-- ResumeError         partial work of something else is there   exit code 1

Low levels raise facts (tensor, file); the command line prints ``str(error)`` and exits with ``exit_code``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = [
    "CONTROL",
    "CheckpointError",
    "DiskSpaceError",
    "HubError",
    "IncompatibleError",
    "InputChangedError",
    "MergekitError",
    "ModelNotFoundError",
    "NonFiniteError",
    "QuantizedError",
    "RecipeError",
    "ResumeError",
    "RunError",
    "UsageError",
    "nearest",
    "some_of",
]


CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f"  # of terminals
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # of the direction of text
    r"\u2028\u2029"  # ends of lines and paragraphs
    r"\ud800-\udfff]"  # halves of characters, which can't be written as UTF-8
)
"""Characters that steer what shows them, so that a text looks like another one; no name of a tensor holds them."""


class MergekitError(Exception):
    """Base of every fault that a user can mend; ``exit_code`` is what the program ends with."""

    exit_code = 1


class UsageError(MergekitError):
    """Options, arguments or folders that can't be used as given."""

    exit_code = 2


class RecipeError(UsageError):
    """A fault in a recipe. ``place`` is ``file:line:column`` where known.

    >>> str(RecipeError("no parameter 'densty'", place="r.yml:9:7"))
    "r.yml:9:7: no parameter 'densty'"
    """

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(f"{place}: {message}" if place else message)
        self.place = place


class ModelNotFoundError(UsageError):
    """A model, shard or config that a recipe names is not there."""


class IncompatibleError(UsageError):
    """The models of a recipe can't be merged with each other: shapes, layer counts, dtypes."""


class CheckpointError(MergekitError):
    """A checkpoint file is truncated, malformed or hostile."""


class QuantizedError(CheckpointError):
    """A checkpoint holds packed quantised weights, which can't be merged as numbers."""


class HubError(MergekitError):
    """The model hub can't be reached, or does not give what was asked."""


class RunError(MergekitError):
    """The merge can't go on."""


class DiskSpaceError(RunError):
    """The output would not fit on its disk."""


class NonFiniteError(RunError):
    """A computed tensor holds NaN or infinity."""


class InputChangedError(RunError):
    """An input file changed while it was being merged."""


class ResumeError(RunError):
    """The output folder holds partial work of a different merge."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint naming the valid name nearest to ``name``, or the whole list when none is near.

    >>> nearest("densty", ["weight", "density"])
    "Did you mean 'density'?"
    >>> nearest("qqq", ["weight", "density"])
    'Valid: density, weight.'
    """
    names = sorted(valid)
    match = get_close_matches(name, names, n=1, cutoff=0.6)
    if match:
        return f"Did you mean '{match[0]}'?"
    return f"Valid: {', '.join(names)}."


def some_of(names: Sequence[str], most: int = 3, what: str = "") -> str:
    """The first ``most`` names, and how many more there are (``what`` they are).

    >>> some_of(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(names) - most:,} more{what and ' '}{what}" if len(names) > most else ""
    return ", ".join(names[:most]) + more
