"""Hugging Face's layout to Chameleon's: what Chameleon's own inference code loads.

medley to-pth --trained_ckpt HF --original_ckpt CHAMELEON --new_ckpt DIR --verify
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import max_abs_diff, max_logit_diff, write_chameleon
from medley.errors import UserError
from medley.utils.cli_options import resolved
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class ToPthOptions:
    """Converts a checkpoint to Chameleon's layout.

    Args:
        trained_ckpt: checkpoint in Hugging Face's layout
        original_ckpt: the checkpoint in Chameleon's layout (or tiny) that it was made from
        new_ckpt: folder of the new checkpoint
        shards: files that the weights are split over; as many as the model has unless given
        norms: equal refuses query and key norms that differ between the heads of a shard (after
            full training); mean takes their mean, which changes the model
        verify: read the new checkpoint back, compare every tensor, and logits
    """

    trained_ckpt: Path
    original_ckpt: str
    new_ckpt: Path
    shards: int | None = None
    norms: Literal["equal", "mean"] = "equal"
    verify: bool = False


def to_pth(options: ToPthOptions) -> None:
    trained, original = (
        open_checkpoint(options.trained_ckpt),
        open_checkpoint(options.original_ckpt),
    )
    if trained.layout != "huggingface":
        raise UserError(f"{options.trained_ckpt}: not in Hugging Face's layout (config.json)")
    if original.layout != "chameleon":
        raise UserError(f"{options.original_ckpt}: not in Chameleon's layout (models/, tokenizer/)")
    size = original.model_folder.name
    write_chameleon(options.new_ckpt, trained, size, original, options.shards, options.norms)
    inputs = [options.trained_ckpt / "config.json"]
    write_manifest(options.new_ckpt, resolved(options), inputs, trained.fingerprint())
    print(f"wrote {options.new_ckpt}")
    if options.verify:
        new = open_checkpoint(options.new_ckpt)
        difference = max_abs_diff(trained, new)
        print(f"largest tensor difference: {difference:.3g}")
        print(f"largest logit difference: {max_logit_diff(trained, new):.3g}")
        if difference and options.norms == "equal":
            raise UserError(f"{options.new_ckpt}: differs from {options.trained_ckpt}")
