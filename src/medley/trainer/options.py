"""The flags and recipes of `training.train`, and what transformers' Trainer makes of them."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from medley.checkpoints.adapter import PROJECTIONS
from medley.data.packing import TrainOn
from medley.errors import UserError
from medley.modeling.attention import Attention
from medley.modeling.quantization import Quantize
from medley.utils.distributed import world_size
from medley.utils.files import read_json

# Fields of TrainingArguments that a flag sets, or that our rows and saves depend on.
_OURS = {
    "output_dir": "--output_dir", "per_device_train_batch_size": "--bs",
    "per_device_eval_batch_size": "--bs", "gradient_accumulation_steps": "--grad_acc",
    "num_train_epochs": "--epoch", "max_steps": "--steps", "learning_rate": "--lr",
    "lr_scheduler_type": "--lr_scheduler", "bf16": "--bf16", "fp16": "--fp16",
    "save_strategy": "--save_strategy", "save_steps": "--save_steps",
    "logging_steps": "--logging_steps", "eval_steps": "--eval_steps", "deepspeed": "--ds",
    "run_name": "--name", "gradient_checkpointing": "--gradient_checkpointing",
    "dataloader_num_workers": "--num_workers", "seed": "--seed", "data_seed": "--seed",
    "warmup_ratio": "--warmup_ratio", "train_sampling_strategy": "--group_by_length",
    "remove_unused_columns": "nothing: the columns are all used",
    "prediction_loss_only": "nothing: only losses are validated",
}  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    """Trains the decoder.

    Args:
        train_data: tokens files to learn from; FILE:2 takes a file twice, FILE:0.5 half of it
        ckpt: base checkpoint in any layout, or tiny
        output_dir: folder of the adapter (or model) and its checkpoints
        val_data: tokens file to validate on; losses are told by modality and task
        max_samples: documents to learn from at most, drawn by the seed
        ds: DeepSpeed configuration
        epoch: passes over the data
        steps: optimizer steps, in place of epochs
        bs: rows of one device's batch
        grad_acc: batches that one optimizer step adds up
        global_bs: rows of one optimizer step over all devices, from which grad_acc follows
        lr: peak learning rate
        warmup_ratio: share of the steps in which the learning rate rises
        lr_scheduler: course of the learning rate
        bf16: train in bfloat16
        fp16: train in float16, with loss scaling
        resume: go on from the last complete checkpoint in output_dir
        trainable: what learns
        adapter: adapter to go on learning (of a first stage), in place of a fresh one
        lora: the same as --trainable lora
        lora_r: rank of the adapter
        lora_alpha: scale of the adapter, alpha / r
        lora_rslora: scale it by alpha / sqrt(r) instead
        lora_dropout: dropout before the adapter
        lora_target: modules that get an adapter
        quantize: keep the base's matrices in 4 or 8 bits under the adapter (QLoRA; bitsandbytes)
        tie_head_norms: in full training, let the norms of a shard's heads learn as one, so that
            the result can be written to Chameleon's layout
        save_strategy: when checkpoints are saved
        save_steps: steps between two of them
        logging_steps: steps between two lines of the log
        eval_steps: steps between two validations
        sample_prompts: JSONL of prompts that are answered at each validation
        wandb: report to Weights & Biases
        wandb_entity: its entity
        name: name of the run
        pack: pack documents into rows of max_length
        group_by_length: put rows of like lengths into one batch, where nothing is packed
        learn: what has labels; answers, everything, or pictures only
        compat: medmax masks prompts by the rule of each batch's first row, as MedMax does
        max_length: longest row; the model's context unless given
        attention: kernel of the attention inside of documents
        gradient_checkpointing: compute activations again instead of keeping them
        image_loss_weight: weight of image tokens in the loss
        z_loss: weight of the squared log-partition in the loss
        num_workers: processes that read data
        preflight: refuse a run that cannot fit, by estimate
        seed: seed of order, dropout and fresh weights
        trainer: any other field of transformers' TrainingArguments (save_total_limit,
            weight_decay, max_grad_norm, optim, tf32, report_to ...)
    """

    train_data: list[str]
    ckpt: str
    output_dir: Path
    val_data: Path | None = None
    max_samples: int | None = None
    ds: Path | None = None
    epoch: float = 1.0
    steps: int | None = None
    bs: int = 1
    grad_acc: int = 1
    global_bs: int | None = None
    lr: float = 1e-4
    warmup_ratio: float = 0.1
    lr_scheduler: str = "cosine"
    bf16: bool = False
    fp16: bool = False
    resume: bool = False
    trainable: Literal["lora", "full", "image_head", "lora+image_head"] = "lora"
    adapter: Path | None = None
    lora: bool = False
    lora_r: int = 16
    lora_alpha: int = 16
    lora_rslora: bool = False
    lora_dropout: float = 0.05
    lora_target: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    quantize: Quantize | None = None
    tie_head_norms: bool = False
    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    save_steps: float = 500
    logging_steps: float = 10
    eval_steps: float = 500
    sample_prompts: Path | None = None
    wandb: bool = False
    wandb_entity: str | None = None
    name: str | None = None
    pack: bool = False
    group_by_length: bool = False
    learn: TrainOn = "answers"
    compat: Literal["medmax"] | None = None
    max_length: int | None = None
    attention: Attention = "auto"
    gradient_checkpointing: bool = False
    image_loss_weight: float = 1.0
    z_loss: float = 0.0
    num_workers: int = 0
    preflight: bool = True
    seed: int = 42
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refusals = {
            f"--lora and --trainable {self.trainable} contradict each other": (
                self.lora and "lora" not in self.trainable
            ),
            "--compat medmax has its own labels: leave --pack and --learn out": (
                self.compat == "medmax" and (self.pack or self.learn != "answers")
            ),
            "--bf16 and --fp16 exclude each other": self.bf16 and self.fp16,
            "--bs, --grad_acc, --max_samples and --steps are numbers from 1 on": (
                min(self.bs, self.grad_acc, self.max_samples or 1) < 1
                or (self.steps is not None and self.steps < 1)
                or (self.max_samples is not None and self.max_samples < 1)
            ),
            "--group_by_length and --pack exclude each other: packed rows are all full": (
                self.group_by_length and self.pack
            ),
            f"--quantize and --trainable {self.trainable} exclude each other: weights of "
            "4 or 8 bits do not learn": self.quantize is not None and self.trainable == "full",
            "--quantize and --ds zero3 exclude each other: ZeRO-3 takes whole numbers apart; use "
            "training/deepspeed/zero2.json": (self.quantize is not None and self.zero_stage == 3),
            "--adapter goes on with an adapter, --trainable full has none": (
                self.adapter is not None and self.trainable == "full"
            ),
            "--tie_head_norms is for --trainable full: an adapter leaves the norms alone": (
                self.tie_head_norms and self.trainable != "full"
            ),
            "--sample_prompts are answered at validations: name --val_data as well": (
                self.sample_prompts is not None and self.val_data is None
            ),
            "--sample_prompts and ZeRO-3 exclude each other: no rank has the whole model": (
                self.sample_prompts is not None and self.zero_stage == 3
            ),
        }
        for message, applies in refusals.items():
            if applies:
                raise UserError(message)
        self.accumulation()
        self._check_trainer()

    def _check_trainer(self) -> None:
        known = {f.name for f in dataclasses.fields(TrainingArguments)}
        for name in self.trainer:
            if name.startswith("fsdp"):
                raise UserError(
                    f"trainer: {name}: FSDP is not supported; ZeRO-3 shards weights, gradients and "
                    "optimizer alike: --ds training/deepspeed/zero3.json"
                )
            if name in _OURS:
                raise UserError(f"trainer: {name} is set by {_OURS[name]}")
            if name not in known:
                raise UserError(f"trainer: {name}: TrainingArguments has no such field")

    @property
    def zero_stage(self) -> int:
        if self.ds is None:
            return 0
        return int(read_json(self.ds).get("zero_optimization", {}).get("stage", 0))

    @property
    def offloads(self) -> bool:
        """Whether DeepSpeed keeps weights and optimizer on the CPU."""
        stage = {} if self.ds is None else read_json(self.ds).get("zero_optimization", {})
        return stage.get("offload_param", {}).get("device") == "cpu"

    def accumulation(self) -> int:
        """Batches of one optimizer step. Raises UserError where --global_bs cannot be had."""
        if self.global_bs is None:
            return self.grad_acc
        rows = self.bs * world_size()
        if self.global_bs % rows or self.global_bs < 1:
            raise UserError(
                f"--global_bs is {self.global_bs}, not a multiple of --bs {self.bs} times "
                f"{world_size()} ranks; change --bs"
            )
        return self.global_bs // rows

    @property
    def rows_a_step(self) -> int:
        return self.bs * world_size() * self.accumulation()

    @property
    def dtype(self) -> torch.dtype:
        """What the base is loaded in. Weights that learn without DeepSpeed's master copies
        stay in float32: in half precision small updates would be rounded away."""
        if self.trainable == "full" and self.ds is None:
            return torch.float32
        return self.compute_dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    def arguments(self, load_universal: bool) -> TrainingArguments:
        """transformers' TrainingArguments. Raises UserError where options do not go together.

        `load_universal` has DeepSpeed read a state that was converted for any number of ranks.
        """
        report_to = "wandb" if self.wandb else self.trainer.get("report_to", "none")
        if report_to in ("wandb", "tensorboard") and importlib.util.find_spec(report_to) is None:
            raise UserError(f"{report_to} is not installed: pip install 'medley-mm[train]'")
        deepspeed = None if self.ds is None else read_json(self.ds)
        if deepspeed is not None and load_universal:
            deepspeed["checkpoint"] = {"load_universal": True}
        fields = {
            "output_dir": str(self.output_dir),
            "per_device_train_batch_size": self.bs,
            "per_device_eval_batch_size": self.bs,
            "gradient_accumulation_steps": self.accumulation(),
            "num_train_epochs": self.epoch,
            "max_steps": self.steps or -1,
            "learning_rate": self.lr,
            "warmup_steps": self.warmup_ratio,  # below 1 it is a share of all steps
            "lr_scheduler_type": self.lr_scheduler,
            "bf16": self.bf16,
            "fp16": self.fp16,
            "save_strategy": self.save_strategy,
            "save_steps": self.save_steps,
            "logging_steps": self.logging_steps,
            "logging_nan_inf_filter": False,
            "eval_strategy": "steps" if self.val_data else "no",
            "eval_steps": self.eval_steps,
            "deepspeed": deepspeed,
            "report_to": report_to,
            "run_name": self.name,
            "gradient_checkpointing": self.gradient_checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "dataloader_num_workers": self.num_workers,
            "use_cpu": not torch.cuda.is_available(),
            "remove_unused_columns": False,
            "prediction_loss_only": True,
            "seed": self.seed,
        }
        own = {n: v for n, v in self.trainer.items() if n not in ("report_to", "save_total_limit")}
        try:
            return TrainingArguments(**{**fields, **own})
        except (ValueError, ImportError, TypeError) as error:
            raise UserError(f"these options do not go together: {error}") from error
