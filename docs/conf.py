"""Settings of the site: ``make site`` builds it from the pages as they are on the hub of the code."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from mergekit.version import __version__

project = "mergekit"
version = release = __version__
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
html_theme = "furo"
html_title = "mergekit"
html_show_sourcelink = False
html_show_copyright = False
html_copy_source = False
highlight_language = "text"
nitpicky = True
# Tables of the reference name parameters like `lambda`; nothing there is Python to be highlighted as such.
suppress_warnings = ["misc.highlighting_failure"]


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _strip)  # type: ignore[attr-defined]


def _strip(app: object, docname: str, source: list[str]) -> None:
    """Turn links out of the documentation (recipes, benchmarks, the changelog) into plain text."""
    pattern = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)]+)\)")
    root, here = Path(__file__).parent, (Path(__file__).parent / docname).parent

    def outside(match: "re.Match[str]") -> str:
        target = (here / match[2].partition("#")[0]).resolve()
        return match[0] if root in target.parents else match[1]

    source[0] = pattern.sub(outside, source[0])
