"""A real browser for tests of pages; they are skipped where there is none."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

__all__ = ["CHROMIUM", "in_browser", "screenshot"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason="needs playwright and Chromium"
)


def screenshot(page: Any, name: str) -> None:
    """Keep a picture of a page in MERGEKIT_SCREENSHOTS, or tests/artifacts."""
    folder = Path(os.environ.get("MERGEKIT_SCREENSHOTS") or Path(__file__).parent / "artifacts")
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
