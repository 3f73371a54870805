"""The folder of a finished merge, as notebooks show it."""

from __future__ import annotations

from pathlib import Path

from mergekit.errors import MergekitError
from mergekit.html import html_table

__all__ = ["MergedModel"]


_FIGURES = {
    "sign_conflict": "where two models or more changed a weight, they disagree on the sign in {:.1%} of the places",
    "survival": "after rounding, {:.1%} of the change is left",
}
"""What of the summary in merge_stats.json is told, and how."""


class MergedModel(type(Path())):  # type: ignore[misc]  # Path itself can't be subclassed before Python 3.12
    """The path of a merged model; a notebook shows what its manifest and statistics say."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        """A table of the inputs and the files, and what the statistics say of the change."""
        from mergekit.checkpoint import read_json
        from mergekit.families.config import loading
        from mergekit.output.manifest import read_manifest
        from mergekit.output.stats import read_summary

        try:
            manifest = read_manifest(self)
            summary = read_summary(self)
            config = read_json(self / "config.json") if (self / "config.json").is_file() else None
        except MergekitError as error:
            return html_table(str(self), ["file", "bytes"], _files(self), [str(error)], numbers=1)
        notes = [] if config is None else [f"load it: {loading(config, repr(str(self)))}"]
        if manifest is not None:
            notes.insert(0, f"made of {', '.join(str(entry.get('model')) for entry in manifest.inputs)}")
        notes += [text.format(summary[k]) for k, text in _FIGURES.items() if isinstance(summary.get(k), float)]
        return html_table(f"{self.name}: merged model", ["file", "bytes"], _files(self), notes, numbers=1)


def _files(folder: Path) -> list[list[str]]:
    return [[path.name, f"{path.stat().st_size:,}"] for path in sorted(folder.iterdir()) if path.is_file()]
