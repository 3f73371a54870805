"""``run_merge`` and ``MergeOptions`` under the module name and with the signature that notebooks use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit import api
from mergekit.options import MergeOptions
from mergekit.recipe import MergeConfiguration

__all__ = ["MergeOptions", "run_merge"]


def run_merge(
    merge_config: MergeConfiguration,
    out_path: str | Path,
    options: Any = None,
    config_source: str | None = None,
) -> None:
    """Merge ``merge_config`` into ``out_path``. ``config_source`` is accepted; the card shows the configuration."""
    api.run_merge(merge_config, out_path, (options or MergeOptions()).run_options())
