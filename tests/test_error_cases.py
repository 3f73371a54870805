"""Every error of the catalogue is met: exit code and message are the catalogue's, and the page shows them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mergekit
from command import warm_up
from error_cases import CASES, GROUPS, meet, page, told

ROOT = Path(mergekit.__file__).parent.parent


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_program_says_what_the_catalogue_says(case, tmp_path):
    warm_up()
    result = meet(case, tmp_path)
    assert told(result, tmp_path) == f"error: {case.message}"
    assert (result.code, result.out) == (case.code, "")
    assert "Traceback" not in result.err
    assert "bug in mergekit" not in result.err


def test_a_message_is_one_line_unless_it_lists_models():
    for case in CASES:
        first, *more = case.message.splitlines()
        assert bool(more) == case.is_table, case.title
        assert [line for line in more if line.startswith("  ")] == more[:2], case.title
        assert max(map(len, [first, *more])) <= 400, case.title
        assert not re.search(r"/tmp|/home|/work|/private", case.message), case.title


def test_titles_are_all_different():
    titles = [item.title.lower() for item in (*GROUPS, *CASES)]
    assert len(titles) == len(set(titles))


def test_the_page_shows_the_catalogue():
    assert (ROOT / "docs" / "errors.md").read_text() == page(), "run `make docs`"
