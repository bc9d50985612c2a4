"""Converts a checkpoint from Hugging Face's layout to Chameleon's, after training.

Input: the trained checkpoint in Hugging Face's layout, and the checkpoint in Chameleon's layout
that it was trained from. Output: a checkpoint in Chameleon's layout (models/<size>/*.pth and
tokenizer/), which Chameleon's inference code loads.

    python -m conversion.bin_to_pth \
        --trained_ckpt HF --original_ckpt CHAMELEON --new_ckpt DIR --verify

Same as `medley to-pth`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("to-pth", argv, prog="conversion.bin_to_pth")


if __name__ == "__main__":
    sys.exit(main())
