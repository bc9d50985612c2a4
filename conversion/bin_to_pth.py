"""Hugging Face's layout to Chameleon's: what Chameleon's own inference code loads.

python -m conversion.bin_to_pth --trained_ckpt HF --original_ckpt CHAMELEON --new_ckpt DIR --verify
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from medley.checkpoints import largest_difference, open_checkpoint, write_chameleon
from medley.errors import UserError
from medley.files import write_manifest
from medley.options import resolved, run_program


@dataclass(frozen=True)
class Options:
    """Converts a checkpoint to Chameleon's layout.

    Args:
        trained_ckpt: checkpoint in Hugging Face's layout
        original_ckpt: the checkpoint in Chameleon's layout (or tiny) that it was made from
        new_ckpt: folder of the new checkpoint
        verify: read the new checkpoint back and compare every tensor
    """

    trained_ckpt: Path
    original_ckpt: str
    new_ckpt: Path
    verify: bool = False


def work(options: Options) -> None:
    trained, original = (
        open_checkpoint(options.trained_ckpt),
        open_checkpoint(options.original_ckpt),
    )
    if trained.layout != "huggingface":
        raise UserError(f"{options.trained_ckpt}: not in Hugging Face's layout (config.json)")
    if original.layout != "chameleon":
        raise UserError(f"{options.original_ckpt}: not in Chameleon's layout (models/, tokenizer/)")
    write_chameleon(options.new_ckpt, trained, original.model_folder.name, original)
    inputs = [options.trained_ckpt / "config.json"]
    write_manifest(options.new_ckpt, resolved(options), inputs, trained.fingerprint())
    print(f"wrote {options.new_ckpt}")
    if options.verify:
        difference = largest_difference(trained, open_checkpoint(options.new_ckpt))
        print(f"largest tensor difference: {difference:.3g}")
        if difference:
            raise UserError(f"{options.new_ckpt}: differs from {options.trained_ckpt}")


def main(argv: list[str] | None = None) -> int:
    return run_program("conversion.bin_to_pth", Options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
