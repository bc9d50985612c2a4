"""Converts a checkpoint from Chameleon's layout to Hugging Face's, before training.

Input: a checkpoint in Chameleon's layout (models/<size>/*.pth and tokenizer/). Output: a checkpoint
in Hugging Face's layout (safetensors), which transformers, PEFT and DeepSpeed load.

    python -m conversion.pth_to_bin --input_dir CHAMELEON --model_size 7b --output_dir HF --verify

Same as `medley to-hf`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("to-hf", argv, prog="conversion.pth_to_bin")


if __name__ == "__main__":
    sys.exit(main())
