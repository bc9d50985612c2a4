"""Merges a LoRA adapter into its base: a checkpoint in Hugging Face's layout.

medley merge --ckpt_path RUN --base_path BASE --output_dir DIR --verify
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medley.checkpoints.adapter import find_adapter, merged_tensors, resolve_base, verify_merge
from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_hugging_face
from medley.errors import UserError
from medley.utils.cli_options import resolved
from medley.utils.manifest import check_fingerprint, write_manifest

TOLERANCE = {"torch.float32": 1e-4, "torch.bfloat16": 0.3, "torch.float16": 0.05}


@dataclass(frozen=True)
class MergeOptions:
    """Merges an adapter into its base.

    Args:
        ckpt_path: the adapter's folder, or a training run with checkpoint-N folders
        output_dir: folder of the merged checkpoint
        base_path: the base checkpoint; what adapter_config.json names unless given
        verify: compare the logits of base and adapter with those of the merged checkpoint
    """

    ckpt_path: Path
    output_dir: Path
    base_path: str | None = None
    verify: bool = False


def merge(options: MergeOptions) -> None:
    if not options.ckpt_path.is_dir():
        raise UserError(f"{options.ckpt_path}: no such folder")
    adapter = find_adapter(options.ckpt_path)
    base = resolve_base(adapter, options.base_path)
    if (options.ckpt_path / "manifest.json").is_file():
        check_fingerprint(options.ckpt_path, base.fingerprint(), str(base.folder))
    write_hugging_face(options.output_dir, base, merged_tensors(base, adapter))
    weights = [adapter / "adapter_model.safetensors"]
    write_manifest(options.output_dir, resolved(options), weights, base.fingerprint())
    print(f"merged {adapter} into {base.folder}: {options.output_dir}")
    if options.verify:
        difference = verify_merge(base, adapter, open_checkpoint(options.output_dir))
        limit = TOLERANCE[str(base.dtype())]
        print(f"largest logit difference: {difference:.3g} (weights in {base.dtype()})")
        if difference > limit:
            raise UserError(
                f"{options.output_dir}: logits differ by {difference:.3g} from base and adapter, "
                f"more than rounding explains ({limit}); do not use this checkpoint"
            )
