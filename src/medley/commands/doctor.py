"""`medley doctor`: versions, devices, and a golden self-test."""

from __future__ import annotations

from dataclasses import dataclass

from medley.doctor import examine


@dataclass(frozen=True)
class DoctorOptions:
    """Checks versions, devices and the embedded model."""


def doctor(_: DoctorOptions) -> None:
    examine()
