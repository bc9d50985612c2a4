"""Merges a LoRA adapter into its base.

Input: an adapter in PEFT's layout (or a training run with folders checkpoint-N) and its base in
any layout. Output: a checkpoint in Hugging Face's layout, with the base's tokenizers and VQGAN.
With --verify, the logits of base and adapter are compared with those of the merged checkpoint.

    python -m conversion.merge_lora --ckpt_path RUN --base_path BASE --output_dir DIR --verify

Same as `medley merge`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("merge", argv, prog="conversion.merge_lora")


if __name__ == "__main__":
    sys.exit(main())
