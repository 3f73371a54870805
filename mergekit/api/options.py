"""What changes a run, and never the meaning of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.errors import UsageError

__all__ = ["RunOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What changes a run, and never the meaning of a recipe.

    ``shard_size`` in bytes (0: one file); ``threads`` None means one for each processor, ``max_memory`` (in bytes) None
    as much as the machine has; ``device`` is ``cpu`` or a torch device; ``seed`` overrides the recipe's.
    ``statistics``: write merge_stats.json, ``report``: merge_report.html. ``method_files`` are Python files that define
    merge methods; they are run.
    """

    shard_size: int = 5_000_000_000
    threads: int | None = None
    max_memory: int | None = None
    device: str = "cpu"
    seed: int | None = None
    copy_tokenizer: bool = True
    write_model_card: bool = True
    overwrite: bool = False
    restart: bool = False
    allow_crimes: bool = False
    allow_nonfinite: bool = False
    statistics: bool = True
    report: bool = False
    method_files: tuple[Path, ...] = ()
    unsafe_truncate_embeddings: bool = False
    cache_dir: Path | None = None
    quiet: bool = True

    def lasting(self) -> dict[str, Any]:
        """The options that change what a recipe gives, and that the plan does not hold: to be kept beside the model."""
        names = ("shard_size", "copy_tokenizer", "allow_crimes", "allow_nonfinite", "unsafe_truncate_embeddings")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        """Refuse numbers that can't be meant."""
        for name, least in (("shard_size", 0), ("threads", 1), ("max_memory", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or not least <= value < 1 << 63):
                raise UsageError(f"{name}={value!r}: expected a whole number of at least {least}")
