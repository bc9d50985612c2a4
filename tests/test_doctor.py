"""`medley doctor`: versions and self-test."""

from __future__ import annotations

from importlib import metadata

import pytest

from medley import doctor
from medley.cli import main


def test_doctor_passes_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "Self-test passed." in output
    assert "transformers" in output


def test_a_failed_self_test_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = doctor.self_test_values()
    wrong = {**values, "codes": [0] * len(values["codes"])}
    monkeypatch.setattr(doctor, "self_test_values", lambda: wrong)
    assert main(["doctor"]) == 2
    assert "The self-test failed" in capsys.readouterr().err


def test_versions_outside_the_tested_range_get_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1")
    assert all("outside" in note for _, _, note in doctor.versions())
