from __future__ import annotations

import pytest

from medley import doctor
from medley.errors import UserError


def test_all_is_well_here(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.examine()
    said = capsys.readouterr().out
    assert "all is well" in said
    assert "transformers" in said


def test_a_failed_self_test_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    values = doctor.self_test_values()
    wrong = {**values, "codes": [0] * len(values["codes"])}  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "self_test_values", lambda: wrong)
    with pytest.raises(UserError, match="self-test failed"):
        doctor.examine()


def test_versions_outside_of_the_range_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.0.1")
    assert all("outside" in note for _, _, note in doctor.versions())
