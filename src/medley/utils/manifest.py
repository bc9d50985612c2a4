"""Manifests: what made a file or folder, from which inputs, for which token space."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medley.errors import UserError
from medley.utils.files import partial_hash, read_json, write_json
from medley.version import __version__


def manifest_path(path: Path) -> Path:
    """`manifest.json` in a folder, `NAME.manifest.json` beside a single file."""
    return path / "manifest.json" if path.is_dir() else path.with_name(f"{path.name}.manifest.json")


def write_manifest(
    path: Path,
    options: dict[str, Any],
    inputs: Sequence[Path],
    fingerprint: str | None,
    **more: Any,
) -> None:
    write_json(
        manifest_path(path),
        {
            "medley": __version__,
            "git_commit": _git_commit(),
            "options": options,
            "inputs": {str(p): partial_hash(p) for p in inputs if p.is_file()},
            "token_space": fingerprint,
            **more,
        },
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a file or folder, or an empty one where there is none."""
    place = manifest_path(path)
    manifest: dict[str, Any] = read_json(place) if place.exists() else {}
    return manifest


def check_fingerprint(path: Path, expected: str, whose: str, fit: str | None = None) -> None:
    """Refuses a file of another token space; warns where a file does not say which it is, and
    where its pictures were fitted into squares in another way than `fit`.
    """
    manifest = read_manifest(path)
    found = manifest.get("token_space")
    if fit is not None and manifest.get("fit") not in (None, fit):
        warnings.warn(
            f"{path}: its pictures were made square by --fit {manifest['fit']}, {whose} has {fit}: "
            "the model will see other pictures in use than in training",
            stacklevel=2,
        )
    if found is None:
        warnings.warn(
            f"{path} carries no token-space fingerprint: make sure that its image codes come "
            f"from the VQGAN of {whose}",
            stacklevel=2,
        )
    elif found != expected:
        raise UserError(
            f"{path}: its image codes come from another VQGAN (token space {found[:12]}, "
            f"{whose} has {expected[:12]}; see {manifest_path(path)}): tokenize the pictures "
            "again with this checkpoint"
        )


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    if not (here.parents[2] / ".git").exists():
        return None  # an installed wheel: no commit to name
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:
        return None  # no git on this machine
    return done.stdout.strip() or None
