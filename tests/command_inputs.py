"""Inputs of command tests: scans and JSON Lines files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medley.phantoms import Phantom


def write_scans(folder: Path) -> Path:
    """Writes four synthetic CT scans, 0.png to 3.png, and returns the folder."""
    for number, organ in enumerate(("head", "chest", "abdomen", "head")):
        Phantom("CT", organ).image(64).save(folder / f"{number}.png")
    return folder


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
