"""Merges a LoRA adapter into its base: a checkpoint in Hugging Face's layout.

medley merge --ckpt_path RUN --base_path BASE --output_dir DIR --verify
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medley.checkpoints.adapter import (
    find_adapter,
    merge_difference,
    merged_tensors,
    resolve_base,
    weights_file,
)
from medley.checkpoints.checkpoint import Checkpoint
from medley.checkpoints.conversion import write_hugging_face
from medley.errors import UserError
from medley.utils.cli_options import resolved
from medley.utils.manifest import check_fingerprint, write_manifest


@dataclass(frozen=True)
class MergeOptions:
    """Merges a LoRA adapter into its base.

    Args:
        ckpt_path: folder of the adapter, or of a training run with folders checkpoint-N
        output_dir: folder of the merged checkpoint
        base_path: the base checkpoint; the one that adapter_config.json names if not given
        verify: compare the logits of base and adapter with those of the merged checkpoint
    """

    ckpt_path: Path
    output_dir: Path
    base_path: str | None = None
    verify: bool = False


def merge(options: MergeOptions) -> None:
    if not options.ckpt_path.is_dir():
        raise UserError(f"{options.ckpt_path}: Folder not found.")
    adapter = find_adapter(options.ckpt_path)
    base = resolve_base(adapter, options.base_path)
    if (options.ckpt_path / "manifest.json").is_file():
        check_fingerprint(options.ckpt_path, base.fingerprint(), str(base.folder))

    def verify(merged: Checkpoint) -> None:
        difference = merge_difference(base, adapter, merged)
        print(f"largest logit difference: {difference.largest:.3g} (weights in {base.dtype()})")
        limit = difference.limit(base.dtype(), base.config().num_hidden_layers)
        if difference.largest > limit:
            raise UserError(
                f"{options.output_dir}: The logits differ from those of base and adapter by more "
                f"than rounding explains (got {difference.largest:.3g}, expected at most "
                f"{limit:.3g}). Nothing was written. Use the adapter without merging (--adapter)."
            )

    tensors = merged_tensors(base, adapter)
    write_hugging_face(options.output_dir, base, tensors, verify if options.verify else None)
    weights = [weights_file(adapter)]
    write_manifest(options.output_dir, resolved(options), weights, base.fingerprint())
    print(f"merged {adapter} into {base.folder}: {options.output_dir}")
