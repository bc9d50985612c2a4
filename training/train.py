"""Training: token sequences -> a LoRA adapter, a trained image head, or a fully trained decoder.

In: one or more tokens files (from `tokenizer.tokenize_jsonl`), optionally one for validation, and
a base checkpoint in Chameleon's or Hugging Face's layout, or `tiny`.
Out, in --output_dir: an adapter in PEFT's layout (adapter_config.json, adapter_model.safetensors),
or with `--trainable full` a checkpoint in Hugging Face's layout in model/. Beside it
checkpoint-N folders for --resume, log.csv, loss.png, trainer_state.json and manifest.json.

    torchrun --nproc-per-node=2 -m training.train --train_data train.tokens.jsonl \
        --val_data val.tokens.jsonl --ckpt BASE --ds zero2 --output_dir run --lora --bf16

    torchrun --nproc-per-node=2 -m training.train --config medmax_lora \
        --train_data train.tokens.jsonl --ckpt BASE --output_dir run

Recipes (`--config NAME`) are in training/recipes/, DeepSpeed configurations (`--ds NAME`) in
training/deepspeed/. `medley train` is the same command. The next stage is conversion.merge_lora.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("train", argv, prog="training.train")


if __name__ == "__main__":
    sys.exit(main())
