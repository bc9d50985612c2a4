"""Chameleon's layout to Hugging Face's: what transformers, PEFT and DeepSpeed load.

python -m conversion.pth_to_bin --input_dir CHAMELEON --model_size 7b --output_dir HF --verify
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from medley.checkpoints.checkpoint import (
    largest_difference,
    largest_logit_difference,
    open_checkpoint,
    write_hugging_face,
)
from medley.errors import UserError
from medley.utils.cli_options import resolved, run_program
from medley.utils.files import write_manifest


@dataclass(frozen=True)
class Options:
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


def work(options: Options) -> None:
    source = open_checkpoint(options.input_dir, options.model_size)
    if source.layout != "chameleon":
        raise UserError(f"{options.input_dir}: not in Chameleon's layout (models/, tokenizer/)")
    write_hugging_face(options.output_dir, source)
    inputs = [source.model_folder / "params.json"]
    write_manifest(options.output_dir, resolved(options), inputs, source.fingerprint())
    print(f"wrote {options.output_dir}")
    if options.verify:
        new = open_checkpoint(options.output_dir)
        difference = largest_difference(source, new)
        print(f"largest tensor difference: {difference:.3g}")
        print(f"largest logit difference: {largest_logit_difference(source, new):.3g}")
        if difference:
            raise UserError(f"{options.output_dir}: differs from {options.input_dir}")


def main(argv: list[str] | None = None) -> int:
    return run_program("conversion.pth_to_bin", Options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
