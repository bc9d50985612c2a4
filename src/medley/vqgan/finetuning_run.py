"""What a fine-tuning run records, and what it compares and removes when it is resumed."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from medley.errors import UserError
from medley.utils.run_identity import check_same_run
from medley.vqgan.model import VQGAN

NEW_FIELDS = {"lr", "vqgan"}  # fields of the identity that Medley 0.1 did not record
RESULT_FILES = {"vqgan.yaml", "vqgan.ckpt", "text_tokenizer.json"}  # in tokenizer/
RECORDED_NAMES = {
    "pictures": "images", "names": "image_names_hash", "perceptual": "lpips_weights",  # alias
    "commitment": "commitment_weight", "val_share": "val_fraction",  # alias
}  # fmt: skip


def recorded_identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the run that a manifest describes; empty if it describes another thing."""
    run = manifest.get("run")
    fields: dict[str, Any] = run if isinstance(run, dict) else {}
    found = {RECORDED_NAMES.get(name, name): value for name, value in fields.items()}
    if "token_space_before" not in found:
        return {}
    return {"exif_orientation": False, **found}  # Medley 0.1 did not rotate


def weights_hash(vqgan: VQGAN) -> str:
    """A hash of all weights of a VQGAN; the token space covers only its encoder and codebook."""
    digest = hashlib.sha256()
    for name, tensor in vqgan.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_resumed(
    output: Path,
    recorded: dict[str, Any],
    identity: dict[str, Any],
    anyway: Collection[str],
) -> None:
    """Raises UserError if a resumed run differs from its beginning in fields not in `anyway`."""
    unknown = sorted({*anyway} - {*recorded, *identity})
    if unknown:
        raise UserError(
            f"--resume_anyway {' '.join(unknown)}: No such field (fields: "
            f"{', '.join(sorted(identity))})."
        )
    unrecorded = NEW_FIELDS - {*recorded}
    if unrecorded:
        warnings.warn(
            f"{output / 'manifest.json'}: Written by Medley 0.1, which did not record "
            f"{', '.join(sorted(unrecorded))}. They are not compared.",
            stacklevel=2,
        )
    advice = "name another --output, or name fields that may differ with --resume_anyway"
    check_same_run(recorded, identity, output, advice, ignored={*anyway, *unrecorded})


def remove_incomplete_result(folder: Path) -> None:
    """Removes what the last save of an interrupted run may have left, and nothing else."""
    if not folder.is_dir():
        return
    foreign = sorted({f.name for f in folder.iterdir() if f.name[0] != "."} - RESULT_FILES)
    if foreign:
        raise UserError(
            f"{folder}: Contains files that no fine-tuning run writes ({', '.join(foreign[:4])}). "
            "Move them away, or name another --output."
        )
    shutil.rmtree(folder)
