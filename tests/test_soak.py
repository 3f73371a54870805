"""The soak test itself: a few of its iterations, and that it keeps and counts what fails."""

from __future__ import annotations

from functools import partial

import pytest

import soak
from command import warm_up


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    warm_up()
    monkeypatch.setattr(soak, "make_case", partial(soak.make_case, kind="plain"))


def test_some_iterations_find_nothing(tmp_path):
    loop = soak.Soak(0, tmp_path)
    for number in (4, 8, 23):
        loop.iterate(number)
    assert loop.failures == []
    assert "3 iterations, 0 failures" in loop.summary()
    assert loop.counts["checks"]["same bytes"]


def test_a_fault_is_kept_and_counted(tmp_path, monkeypatch, capsys):
    weights = soak.weights
    monkeypatch.setattr(soak, "weights", lambda folder: {**weights(folder), "config.json": str(folder).encode()})
    loop = soak.Soak(0, tmp_path)
    loop.iterate(0)
    assert any("same bytes" in failure for failure in loop.failures)
    assert "--seed 0 --only 0" in capsys.readouterr().out
    report = (tmp_path / "failures" / "0-same-bytes" / "report.txt").read_text()
    assert "config.json differs first at byte" in report
