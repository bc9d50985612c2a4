"""Chameleon's layout to Hugging Face's: what transformers, PEFT and DeepSpeed load.

medley to-hf --input_dir CHAMELEON --model_size 7b --output_dir HF --verify
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import max_abs_diff, max_logit_diff, write_hugging_face
from medley.errors import UserError
from medley.utils.cli_options import resolved
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class ToHfOptions:
    """Converts a checkpoint to Hugging Face's layout.

    Args:
        input_dir: checkpoint in Chameleon's layout, or tiny
        output_dir: folder of the new checkpoint
        model_size: folder below models/, where there are several
        verify: read the new checkpoint back, compare every tensor, and logits
    """

    input_dir: str
    output_dir: Path
    model_size: str | None = None
    verify: bool = False


def to_hf(options: ToHfOptions) -> None:
    source = open_checkpoint(options.input_dir, options.model_size)
    if source.layout != "chameleon":
        raise UserError(f"{options.input_dir}: not in Chameleon's layout (models/, tokenizer/)")
    write_hugging_face(options.output_dir, source)
    inputs = [source.model_folder / "params.json"]
    write_manifest(options.output_dir, resolved(options), inputs, source.fingerprint())
    print(f"wrote {options.output_dir}")
    if options.verify:
        new = open_checkpoint(options.output_dir)
        difference = max_abs_diff(source, new)
        print(f"largest tensor difference: {difference:.3g}")
        print(f"largest logit difference: {max_logit_diff(source, new):.3g}")
        if difference:
            raise UserError(f"{options.output_dir}: differs from {options.input_dir}")
