"""Trains the decoder on token sequences: a LoRA adapter, its image head, or all weights.

Input: tokens files (`medley tokenize`) and a base checkpoint in any layout. Output in
--output_dir: an adapter in PEFT's layout, or for `--trainable full` a checkpoint in Hugging Face's
layout in `model/`; checkpoint-N folders, log.csv, loss.png, trainer_state.json, manifest.json.

    torchrun --nproc-per-node=2 -m medley train --config medmax_lora \
        --train_data train.tokens.jsonl --ckpt BASE --output_dir run
"""

from __future__ import annotations

from medley.checkpoints.checkpoint import open_checkpoint
from medley.trainer import deepspeed
from medley.trainer.options import TrainOptions
from medley.trainer.run import (
    find_resume_checkpoint,
    make_model,
    make_trainer,
    open_datasets,
    packing_config,
    prepare_environment,
    run_steps,
    save_result,
    validate_last_step,
)
from medley.trainer.summary import print_run_summary
from medley.utils.distributed import from_main_rank, world_size
from medley.utils.temporary_files import disk_errors

__all__ = ["TrainOptions", "train"]


def train(options: TrainOptions) -> None:
    prepare_environment(options)
    base = open_checkpoint(options.ckpt)
    text = base.text_tokenizer()
    packing = packing_config(options, base)
    train_set, val_sets = open_datasets(options, packing, base, text.vocabulary)
    checkpoint = find_resume_checkpoint(options, train_set, base)
    if checkpoint is not None and (options.output_dir / "manifest.json").exists():
        print(f"{options.output_dir}: this run is already finished.")
        return
    # Before the arguments: once they name ZeRO-3, transformers partitions every new model.
    model = make_model(options, base, text.vocabulary)
    universal = checkpoint is not None and deepspeed.needs_conversion(checkpoint, world_size())
    arguments = options.arguments(universal)
    if checkpoint is not None and universal:
        from_main_rank(lambda: deepspeed.to_universal_checkpoint(checkpoint))
    trainer = make_trainer(options, arguments, model, base, train_set, val_sets)
    print_run_summary(options, trainer, train_set, text)
    with disk_errors(options.output_dir):
        run_steps(trainer, checkpoint)
        save_result(options, trainer, base)
        validate_last_step(options, trainer)
