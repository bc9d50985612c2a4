"""Converts Hugging Face's layout to Chameleon's, which Chameleon's inference code loads.

medley to-pth --trained_ckpt HF --original_ckpt CHAMELEON --new_ckpt DIR --verify
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medley.checkpoints.checkpoint import Checkpoint, open_checkpoint
from medley.checkpoints.conversion import max_abs_diff, write_chameleon
from medley.checkpoints.logits import logit_difference
from medley.errors import UserError
from medley.utils.cli_options import resolved
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class ToPthOptions:
    """Converts a checkpoint to Chameleon's layout.

    Args:
        trained_ckpt: checkpoint in Hugging Face's layout
        original_ckpt: checkpoint in Chameleon's layout (or tiny) that it was trained from
        new_ckpt: folder of the new checkpoint
        shards: number of weight files; that of the model if not given
        norms: for query and key norms that differ between the heads of a shard (after full
            training), equal is an error and mean writes their mean, which changes the model
        verify: read the new checkpoint and compare all tensors and the logits
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
        raise UserError(
            f"{options.trained_ckpt}: Wrong layout (expected Hugging Face's with config.json)."
        )
    if original.layout != "chameleon":
        raise UserError(
            f"{options.original_ckpt}: Wrong layout (expected Chameleon's with models/ and "
            "tokenizer/)."
        )
    size = original.model_folder.name

    def verify(new: Checkpoint) -> None:
        difference = max_abs_diff(trained, new)
        logits = logit_difference(trained, new)
        print(f"largest tensor difference: {difference:.3g}")
        print(f"largest logit difference: {logits.largest:.3g}")
        for what, value, limit in (
            ("tensors", difference, 0.0),
            ("logits", logits.largest, logits.limit()),
        ):
            if value > limit and options.norms == "equal":
                raise UserError(
                    f"{options.new_ckpt}: The {what} differ from those of {options.trained_ckpt} "
                    f"(got {value:.3g}, expected at most {limit:.3g}). Nothing was written."
                )

    write_chameleon(
        options.new_ckpt, trained, size, original, options.shards, options.norms,
        verify if options.verify else None,
    )  # fmt: skip
    inputs = [options.trained_ckpt / "config.json"]
    write_manifest(options.new_ckpt, resolved(options), inputs, trained.fingerprint())
    print(f"wrote {options.new_ckpt}")
