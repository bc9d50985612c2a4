"""Trains the decoder on token sequences: LoRA, its image head, or all of it.

In: tokens files (tokenizer.tokenize_jsonl) and a base checkpoint in any layout. Out: an adapter in
PEFT's layout, or a whole checkpoint in Hugging Face's, with log.csv, loss.png, trainer_state.json.

    torchrun --nproc-per-node=2 -m training.train --train_data tokens.jsonl --ckpt BASE \
        --ds training/deepspeed/zero2.json --output_dir out --lora --bf16

The same as `medley train`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("train", argv, prog="training.train")


if __name__ == "__main__":
    sys.exit(main())
