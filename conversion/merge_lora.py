"""Merges a LoRA adapter into its base: a checkpoint in Hugging Face's layout.

python -m conversion.merge_lora --ckpt_path RUN --base_path BASE --output_dir DIR --verify

The same as `medley merge`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("merge", argv, prog="conversion.merge_lora")


if __name__ == "__main__":
    sys.exit(main())
