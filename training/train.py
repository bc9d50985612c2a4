"""Trains the decoder on token sequences: LoRA, its image head, or all of it.

In: a tokens file (tokenizer.tokenize_jsonl) and a base checkpoint in any layout. Out: an
adapter in PEFT's layout, or a whole checkpoint in Hugging Face's, with `trainer_state.json`.

    torchrun --nproc-per-node=2 -m training.train --train_data tokens.jsonl --ckpt BASE \
        --ds training/deepspeed/zero2.json --output_dir out --lora --bf16
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from medley.adapters import PROJECTIONS, read_adapter, trainable_model
from medley.checkpoints import TINY, Checkpoint, open_checkpoint, write_hugging_face
from medley.errors import UserError
from medley.files import check_fingerprint, read_json, write_manifest
from medley.model import LossOptions
from medley.options import resolved, run_program
from medley.packing import Learn
from medley.ranks import is_main_rank
from medley.token_shards import TokenShards
from medley.trainer import MixedModalTrainer, ProvenSaves, Rows, last_complete_checkpoint
from medley.vocabulary import Vocabulary


@dataclass(frozen=True)
class Options:
    """Trains the decoder.

    Args:
        train_data: tokens file to learn from
        ckpt: base checkpoint in any layout, or tiny
        output_dir: folder of the adapter (or model) and its checkpoints
        val_data: tokens file to validate on
        ds: DeepSpeed configuration
        epoch: passes over the data
        steps: optimizer steps, in place of epochs
        bs: rows of one device's batch
        grad_acc: batches that one optimizer step adds up
        lr: peak learning rate
        warmup_ratio: share of the steps in which the learning rate rises
        lr_scheduler: course of the learning rate
        bf16: train in bfloat16
        fp16: train in float16, with loss scaling
        resume: go on from the last complete checkpoint in output_dir
        trainable: what learns
        lora: the same as --trainable lora
        lora_r: rank of the adapter
        lora_alpha: scale of the adapter, alpha / r
        lora_dropout: dropout before the adapter
        lora_target: modules that get an adapter
        save_strategy: when checkpoints are saved
        save_steps: steps between two of them
        logging_steps: steps between two lines of the log
        eval_steps: steps between two validations
        wandb: report to Weights & Biases
        wandb_entity: its entity
        name: name of the run
        pack: pack documents into rows of max_length
        learn: what has labels; answers, everything, or pictures only
        compat: medmax masks prompts by the rule of each batch's first row, as MedMax does
        max_length: longest row; the model's context unless given
        gradient_checkpointing: compute activations again instead of keeping them
        image_loss_weight: weight of image tokens in the loss
        z_loss: weight of the squared log-partition in the loss
        num_workers: processes that read data
        seed: seed of order, dropout and fresh weights
    """

    train_data: Path
    ckpt: str
    output_dir: Path
    val_data: Path | None = None
    ds: Path | None = None
    epoch: float = 1.0
    steps: int | None = None
    bs: int = 1
    grad_acc: int = 1
    lr: float = 1e-4
    warmup_ratio: float = 0.1
    lr_scheduler: str = "cosine"
    bf16: bool = False
    fp16: bool = False
    resume: bool = False
    trainable: Literal["lora", "full", "image_head", "lora+image_head"] = "lora"
    lora: bool = False
    lora_r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: int = 500
    logging_steps: int = 10
    eval_steps: int = 500
    wandb: bool = False
    wandb_entity: str | None = None
    name: str | None = None
    pack: bool = False
    learn: Learn = "answers"
    compat: Literal["none", "medmax"] = "none"
    max_length: int | None = None
    gradient_checkpointing: bool = False
    image_loss_weight: float = 1.0
    z_loss: float = 0.0
    num_workers: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        if self.lora and "lora" not in self.trainable:
            raise UserError(f"--lora and --trainable {self.trainable} contradict each other")
        if self.compat == "medmax" and (self.pack or self.learn != "answers"):
            raise UserError("--compat medmax has its own labels: leave --pack and --learn out")
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 exclude each other")

    @property
    def dtype(self) -> torch.dtype:
        """What the base is loaded in. Weights that learn without DeepSpeed's master copies
        stay in float32: in half precision small updates would be rounded away."""
        if self.trainable == "full" and self.ds is None:
            return torch.float32
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32


def row_length(options: Options, vocabulary: Vocabulary, base: Checkpoint, context: int) -> int:
    length = options.max_length or context
    if length > context:
        raise UserError(f"--max_length is {length}, the model's context is {context}")
    least = base.vqgan()[0].config.codes_per_image + 4  # with its two marks, <s> and </s>
    if length < least:
        raise UserError(f"--max_length is {length}: one whole picture needs {least} at least")
    return length


def open_data(
    options: Options, path: Path, base: Checkpoint, vocabulary: Vocabulary, length: int
) -> Rows:
    check_fingerprint(path, base.fingerprint(), str(base.folder), base.vqgan()[1])
    shards = TokenShards(path)
    if not len(shards):
        raise UserError(f"{path}: no sequences in it")
    codes = base.vqgan()[0].config.codes_per_image
    for index in range(len(shards)):
        ids = shards[index]
        begins = (ids == vocabulary.begin_image).nonzero()[0]
        ends = (ids == vocabulary.end_image).nonzero()[0]
        if len(begins) != len(ends) or not bool(((ends - begins) == codes + 1).all()):
            raise UserError(
                f"{path}: sequence {index} has a picture that does not have {codes} codes, as "
                f"those of {base.folder} do"
            )
        largest = int(ids.max())
        if largest >= vocabulary.size:
            raise UserError(
                f"{path}: sequence {index} has the token id {largest}, the vocabulary of "
                f"{base.folder} ends at {vocabulary.size - 1}"
            )
    medmax = options.compat == "medmax"
    return Rows(shards, vocabulary, length, options.pack, options.learn, medmax)


def training_arguments(options: Options) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(options.output_dir),
        per_device_train_batch_size=options.bs,
        per_device_eval_batch_size=options.bs,
        gradient_accumulation_steps=options.grad_acc,
        num_train_epochs=options.epoch,
        max_steps=options.steps or -1,
        learning_rate=options.lr,
        warmup_steps=options.warmup_ratio,  # below 1 it is a share of all steps
        lr_scheduler_type=options.lr_scheduler,
        bf16=options.bf16,
        fp16=options.fp16,
        save_strategy=options.save_strategy,
        save_steps=options.save_steps,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if options.val_data else "no",
        eval_steps=options.eval_steps,
        deepspeed=str(options.ds) if options.ds else None,
        report_to="wandb" if options.wandb else "none",
        run_name=options.name,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=options.num_workers,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        prediction_loss_only=True,
        seed=options.seed,
    )


def prepare_environment(options: Options) -> None:
    """DeepSpeed reads these when it is imported."""
    # PEFT would ask a hub about the base model at every save.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs and one process: start it with torchrun "
            "--nproc-per-node, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if options.ds is not None:
        read_json(options.ds)
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(f"--ds {options.ds}: deepspeed is not installed; leave out --ds")
        # Its extensions are built by ninja, which a virtual environment keeps beside python.
        bin_folder = str(Path(sys.executable).parent)
        os.environ["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if options.wandb_entity:
        os.environ["WANDB_ENTITY"] = options.wandb_entity


def work(options: Options) -> None:
    prepare_environment(options)
    base = open_checkpoint(options.ckpt)
    vocabulary = base.text_tokenizer().vocabulary
    length = row_length(options, vocabulary, base, base.config().max_position_embeddings)
    train = open_data(options, options.train_data, base, vocabulary, length)
    val = None
    if options.val_data is not None:
        val = open_data(options, options.val_data, base, vocabulary, length)
    start = last_complete_checkpoint(options.output_dir) if options.resume else None
    if options.resume and start is None:
        raise UserError(
            f"{options.output_dir}: no complete checkpoint to go on from; leave out --resume"
        )
    if start is None and any(options.output_dir.glob("checkpoint-*")):
        raise UserError(
            f"{options.output_dir}: holds checkpoints of another run; go on with --resume, or name "
            "another --output_dir"
        )
    try:
        arguments = training_arguments(options)  # before the model: ZeRO-3 wants it so
    except (ValueError, ImportError) as error:
        raise UserError(f"these options do not go together: {error}") from error
    decoder = base.decoder(options.dtype)
    decoder.loss_options = LossOptions(options.image_loss_weight, options.z_loss)
    model = trainable_model(
        decoder, options.trainable, vocabulary, _base_name(options.ckpt),
        rank=options.lora_r, alpha=options.lora_alpha, dropout=options.lora_dropout,
        targets=options.lora_target,
    )  # fmt: skip
    trainer = MixedModalTrainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=val,
        data_collator=train.collate, callbacks=[ProvenSaves()],
    )  # fmt: skip
    if is_main_rank():
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{len(train.shards)} documents in {len(train)} rows; {learned:,} parameters learn")
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    if val is not None:
        trainer.evaluate()
    save(trainer, base, options)


def save(trainer: MixedModalTrainer, base: Checkpoint, options: Options) -> None:
    trainer.save_state()
    if options.trainable == "full":
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # ZeRO-3 gathers
        if is_main_rank():
            names = [name for name, _ in base.tensors()]
            dtype = base.dtype()
            tensors = ((name, state[name].detach().cpu().to(dtype)) for name in names)
            write_hugging_face(options.output_dir / "model", base, tensors)
            open_checkpoint(options.output_dir / "model").decoder()  # read back: names and shapes
    else:
        trainer.save_model(str(options.output_dir))
        if is_main_rank():
            read_adapter(options.output_dir)
    if is_main_rank():
        write_manifest(
            options.output_dir, resolved(options), [options.train_data], base.fingerprint()
        )
        where = options.output_dir / ("model" if options.trainable == "full" else "")
        print(f"saved and read back: {where}")


def _base_name(ckpt: str) -> str:
    """What adapter_config.json calls the base: a whole path, so that it is found again."""
    return ckpt if ckpt == TINY and not Path(ckpt).is_dir() else str(Path(ckpt).resolve())


def main(argv: list[str] | None = None) -> int:
    return run_program("training.train", Options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
