"""The kill matrix on one recipe: its own functions, three kills."""

from __future__ import annotations

import shutil
import sys
from itertools import cycle
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="signals and limits as on Unix")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench" / "reliability"))

from cases import FORMS, cases, write_inputs
from kill_matrix import Trial, report, run_trial, schedule, stamps
from trial import STAGES, STAGING, Expected, Kill, fingerprint, look, undisturbed


def test_three_kills_leave_no_half_model(tmp_path, monkeypatch):
    monkeypatch.setattr("trial.PACE", 0.012)
    inputs = write_inputs(tmp_path)
    case = next(c for c in cases(tmp_path, inputs) if c.name == "whole-ties")
    before = stamps(inputs)
    expected = undisturbed(case, tmp_path / "whole", ways=(True,))
    assert set(expected.stages) == set(STAGES) - {"start", "real command"}
    wanted = (("SIGKILL", "committing", 2, 0.02), ("SIGTERM", "writing", 1, 0.05), ("SIGKILL", "publishing", 1, 0.04))
    kills = cycle([Kill(*words) for words in wanted])
    monkeypatch.setattr("kill_matrix.draw", lambda *_: next(kills))
    trial = Trial(0, case, 3)
    run_trial(trial, tmp_path, 0, expected, None)
    assert trial.all_faults == []
    assert sum(not shot.ended for shot in trial.shots) >= 2  # on a busy machine a run may end before its signal
    assert trial.shots[-1].stage in ("publishing", "cleaning", "after")
    assert stamps(inputs) == before
    assert "Half-models: 0." in report([trial], 1, 0, 1.0, [])


def test_schedule_kills_as_often_as_asked_and_meets_every_case(tmp_path):
    made = cases(tmp_path, tmp_path)
    trials = schedule(made, 240, 0)
    assert sum(t.kills for t in trials if not t.faulty) == 240
    assert {t.case.name for t in trials} == {c.name for c in made if c.form}
    assert {t.case.form for t in trials if t.faulty} == set(FORMS)
    assert [t.case.name for t in schedule(made, 240, 0)] == [t.case.name for t in trials]


def test_half_models_are_seen(tmp_path):
    for name, text in (("old", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            (tmp_path / name / file).write_text(text)
    files, old = fingerprint(tmp_path / "new"), fingerprint(tmp_path / "old")
    expected = Expected(files, {}, old, 1, 1, {}, 1, 1, 1, "")
    out = tmp_path / "out"
    assert look(out, expected) == "none"
    for name in ("old", "new"):
        shutil.copytree(tmp_path / name, out)
        (out / STAGING).mkdir()
        assert look(out, expected) == name
        (out / "tokenizer.json").write_text("other")
        assert look(out, expected) == "half"
        (out / "tokenizer.json").unlink()
        assert look(out, expected) == "half"
        (out / "config.json").unlink()
        assert look(out, expected) == "none"
        shutil.rmtree(out)
