"""Manifests: the options, inputs and token space that a file or folder was made from."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medley.errors import UserError
from medley.utils.config_files import read_json_object, shown
from medley.utils.files import partial_hash, write_json
from medley.version import __version__

# The fields that are read, and their types.
_KINDS = {"token_space": str, "run": dict, "fit": str, "exif_orientation": bool}


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
    """Writes the manifest of a file or folder.

    Args:
        path: the output file or folder
        options: resolved options of the command
        inputs: input files, recorded with a hash each; folders are left out
        fingerprint: token space of the output, if it has one
        more: further fields
    """
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
    """The manifest of a file or folder; empty if it has none.

    Raises UserError for a file that is not a manifest.
    """
    file = manifest_path(path)
    if not file.exists():
        return {}
    manifest = read_json_object(file)
    for name, kind in _KINDS.items():
        if not isinstance(manifest.get(name), kind | None):
            raise UserError(
                f"{file}: Invalid {name} (got {shown(manifest[name])}). Copy the manifest again, "
                "or make its data again."
            )
    return manifest


def check_fingerprint(
    path: Path,
    expected: str,
    checkpoint: str,
    preprocessing: Mapping[str, str | bool] | None = None,
) -> None:
    """Compares the token space of a file or folder with that of a checkpoint.

    Raises UserError if the token spaces differ. Warns if the manifest has no token space, and if
    `preprocessing` is given and the images became squares in another way.

    Args:
        path: file or folder with image tokens
        expected: fingerprint of the checkpoint's token space
        checkpoint: name of the checkpoint, for messages
        preprocessing: how the checkpoint makes squares of images, by the manifest's names
    """
    manifest = read_manifest(path)
    found = manifest.get("token_space")
    recorded = read_preprocessing(manifest)
    for name, value in (preprocessing or {}).items():
        if recorded.get(name) not in (None, value):
            warnings.warn(
                f"{path}: The images were tokenized with --{name} {_flag(recorded[name])}, "
                f"{checkpoint} uses {_flag(value)}. In use the model will see images that are "
                "cropped, padded or rotated in another way than in training.",
                stacklevel=2,
            )
    if found is None:
        warnings.warn(
            f"{path}: the token space is unknown. Make sure that its image codes come from the "
            f"VQGAN of {checkpoint}.",
            stacklevel=2,
        )
    elif found != expected:
        raise UserError(
            f"{path}: its image codes come from another VQGAN (token space {found[:12]} in "
            f"{manifest_path(path)}, {checkpoint} has {expected[:12]}). Tokenize the images again "
            "with this checkpoint."
        )


def read_preprocessing(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How images became squares, by the manifest of their codes; None where it does not say."""
    run = manifest.get("run") or {}  # Medley 0.1 recorded `exif_orientation` there
    return {name: manifest.get(name, run.get(name)) for name in ("fit", "exif_orientation")}


def _flag(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    if not (here.parents[2] / ".git").exists():
        return None  # installed from a wheel
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:
        return None  # git is not installed
    return done.stdout.strip() or None
