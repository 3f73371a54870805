"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # As many workers as processors: threads of torch beside them would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny("llama", seed=1, ...)``: the folder of a tiny random model (see ``tiny.save_tiny``), made once."""
    made: dict[str, Path] = {}

    def get(family: str, **arguments: Any) -> Path:
        from tiny import save_tiny  # loads torch and transformers: only for tests that ask for a model

        key = repr((family, sorted(arguments.items())))
        if key not in made:
            made[key] = save_tiny(family, tmp_path_factory.mktemp(family, numbered=True), **arguments)
        return made[key]

    return get


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    from browsing import CHROMIUM

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which blocks of the documentation were not run, and why."""
    done = [report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "when")]
    reasons = [
        text for report in done if report.when == "call" for key, text in report.user_properties if key == "not run"
    ]
    if reasons:
        terminalreporter.line(f"{len(reasons)} blocks of the documentation were not run:")
    for text in reasons:
        terminalreporter.line(f"  {text}")
