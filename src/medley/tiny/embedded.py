"""The name and the folder of the embedded model."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

TINY = "tiny"


def tiny_folder() -> Path:
    """The folder of the embedded model in the installed package."""
    return Path(str(resources.files("medley") / "tiny"))


def checkpoint_folder(path: str | Path) -> Path:
    """The folder of the embedded model for `tiny`, unless a folder of that name exists.

    Every other path is returned unchanged.
    """
    return tiny_folder() if str(path) == TINY and not Path(path).is_dir() else Path(path)
