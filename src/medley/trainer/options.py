"""The options of `medley train`, and the TrainingArguments of transformers that they become."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments

from medley.data.packing import TrainOn
from medley.errors import UserError
from medley.modeling.attention import Attention
from medley.modeling.quantization import Quantize
from medley.trainer.deepspeed import find_config, read_config
from medley.trainer.parameters import PROJECTIONS, Trainable
from medley.utils.cli_options import Alias
from medley.utils.distributed import TIMEOUT, world_size

# Fields of TrainingArguments that a flag sets, or that our datasets and checkpoints depend on.
_RESERVED = {
    "output_dir": "--output_dir", "per_device_train_batch_size": "--bs",
    "per_device_eval_batch_size": "--bs", "gradient_accumulation_steps": "--grad_acc",
    "num_train_epochs": "--epoch", "max_steps": "--steps", "learning_rate": "--lr",
    "lr_scheduler_type": "--lr_scheduler", "bf16": "--bf16", "fp16": "--fp16",
    "save_strategy": "--save_strategy", "save_steps": "--save_steps",
    "logging_steps": "--logging_steps", "eval_steps": "--eval_steps", "deepspeed": "--ds",
    "run_name": "--name", "gradient_checkpointing": "--gradient_checkpointing",
    "dataloader_num_workers": "--num_workers", "seed": "--seed", "data_seed": "--seed",
    "warmup_ratio": "--warmup_ratio", "train_sampling_strategy": "--group_by_length",
    "remove_unused_columns": "Medley: all columns are used",
    "prediction_loss_only": "Medley: validation computes losses only",
    "label_names": "Medley: the labels are called labels",
}  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    """Trains the decoder: a LoRA adapter, the image rows of its head, or all weights.

    Args:
        train_data: tokens files; FILE:2 uses every document twice, FILE:0.5 half of the documents
        ckpt: base checkpoint in any layout, or tiny
        output_dir: folder for the adapter (or model) and its checkpoints
        val_data: tokens file for validation; its losses are reported by modality and task
        max_samples: largest number of training documents, sampled with the seed
        ds: DeepSpeed configuration, zero2, zero3, zero3_offload, or a JSON file
        epoch: passes over the data
        steps: optimizer steps, instead of epochs
        bs: sequences in the batch of one device
        grad_acc: batches whose gradients are accumulated for one optimizer step
        global_bs: sequences in one optimizer step over all devices; grad_acc follows from it
        lr: peak learning rate
        warmup_ratio: fraction of the steps during which the learning rate rises
        lr_scheduler: schedule of the learning rate
        bf16: train in bfloat16
        fp16: train in float16 with loss scaling
        resume: continue from the last complete checkpoint in output_dir
        resume_anyway: fields of run.json in which the resumed run may differ (or run.json, if it
            is missing)
        overwrite: delete the checkpoints and the result of the run in output_dir first
        trainable: weights that are trained
        adapter: adapter to continue training (that of a first stage), instead of a new one
        lora: the same as --trainable lora
        lora_r: rank of the adapter
        lora_alpha: scale of the adapter, which is alpha / r
        lora_rslora: scale the adapter by alpha / sqrt(r) instead
        lora_dropout: dropout before the adapter
        lora_target: modules that get an adapter
        quantize: keep the base's matrices in 4 or 8 bits (QLoRA; needs bitsandbytes)
        tie_head_norms: in full training, keep the norms of a shard's heads equal, so that the
            result can be written in Chameleon's layout
        save_strategy: when checkpoints are saved
        save_steps: steps between two checkpoints
        logging_steps: steps between two log entries
        eval_steps: steps between two validations
        sample_prompts: JSONL file of prompts to which responses are generated at each validation
        wandb: report to Weights & Biases
        wandb_entity: entity of Weights & Biases
        name: name of the run
        pack: pack documents into sequences of max_length
        group_by_length: form batches from sequences of similar length (without pack)
        train_on: tokens that have labels, which are those of the assistant, all, or images only
        compat: medmax masks prompts by the rule of each batch's first sequence, as MedMax does
        max_length: longest sequence; the model's context unless given
        attention: attention kernel
        gradient_checkpointing: recompute activations instead of storing them
        image_loss_weight: weight of image tokens in the loss
        z_loss: weight of the squared log-partition in the loss
        num_workers: processes that load data
        preflight: refuse to start a run that will not fit, by estimate
        seed: seed of order, dropout and initial weights
        trainer: any other field of transformers' TrainingArguments (save_total_limit,
            weight_decay, max_grad_norm, optim, tf32, report_to ...)
    """

    aliases: ClassVar = {
        "learn": Alias(
            "train_on",
            {"answers": "assistant", "everything": "all", "pictures": "images"},  # alias
        )
    }

    train_data: list[str]
    ckpt: str
    output_dir: Path
    val_data: Path | None = None
    max_samples: int | None = None
    ds: str | None = None
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
    resume_anyway: list[str] | None = None
    overwrite: bool = False
    trainable: Trainable = "lora"
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
    train_on: TrainOn = "assistant"
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
        if self.ds is not None:
            find_config(self.ds)
        errors = {
            f"--lora and --trainable {self.trainable} contradict each other.": (
                self.lora and "lora" not in self.trainable
            ),
            "--compat medmax has its own labels. Omit --pack and --train_on.": (
                self.compat == "medmax" and (self.pack or self.train_on != "assistant")
            ),
            "--bf16 and --fp16 cannot be combined.": self.bf16 and self.fp16,
            "--resume and --overwrite contradict each other.": self.resume and self.overwrite,
            "--resume_anyway names fields that a resumed run may change. Add --resume.": (
                bool(self.resume_anyway) and not self.resume
            ),
            "--warmup_ratio must be a fraction of the run, at least 0 and less than 1.": (
                not 0 <= self.warmup_ratio < 1
            ),
            "--bs, --grad_acc, --max_samples and --steps must be at least 1.": (
                min(self.bs, self.grad_acc) < 1
                or (self.steps is not None and self.steps < 1)
                or (self.max_samples is not None and self.max_samples < 1)
            ),
            "--group_by_length and --pack cannot be combined: packed sequences all have about "
            "the same length.": self.group_by_length and self.pack,
            f"--quantize and --trainable {self.trainable} cannot be combined: weights of 4 or 8 "
            "bits cannot be trained.": self.quantize is not None and self.trainable == "full",
            "--quantize and ZeRO-3 cannot be combined: ZeRO-3 cannot partition quantized weights. "
            "Use --ds zero2.": self.quantize is not None and self.zero_stage == 3,
            "--adapter continues training a LoRA adapter and cannot be combined with --trainable "
            "full.": self.adapter is not None and self.trainable == "full",
            "--tie_head_norms requires --trainable full: adapters do not change the norms.": (
                self.tie_head_norms and self.trainable != "full"
            ),
            "--sample_prompts are answered at each validation. Add --val_data.": (
                self.sample_prompts is not None and self.val_data is None
            ),
            "--sample_prompts and ZeRO-3 cannot be combined: no rank has all weights.": (
                self.sample_prompts is not None and self.zero_stage == 3
            ),
        }
        for message, applies in errors.items():
            if applies:
                raise UserError(message)
        self.accumulation_steps()  # raises for an impossible --global_bs
        self._check_trainer_fields()

    def _check_trainer_fields(self) -> None:
        known = {f.name for f in dataclasses.fields(TrainingArguments)}
        for name in self.trainer:
            if name.startswith("fsdp"):
                raise UserError(
                    f"trainer: {name}: FSDP is not supported. Use --ds zero3, which partitions "
                    "weights, gradients and optimizer states as well."
                )
            if name in _RESERVED:
                raise UserError(f"trainer: {name} is set by {_RESERVED[name]}.")
            if name not in known:
                raise UserError(f"trainer: {name}: TrainingArguments has no such field.")

    @property
    def report_to(self) -> str:
        """The experiment tracker: `wandb`, `tensorboard`, another name of transformers, `none`."""
        return "wandb" if self.wandb else str(self.trainer.get("report_to", "none"))

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
        return int(read_config(self.ds).get("zero_optimization", {}).get("stage", 0))

    @property
    def gradient_bucket(self) -> int:
        """Numbers in the buffer that DeepSpeed collects gradients in; 0 without DeepSpeed."""
        if not self.zero_stage:
            return 0
        size = read_config(self.ds)["zero_optimization"].get("reduce_bucket_size", 5e8)
        return 0 if size == "auto" else int(size)  # transformers makes it small

    @property
    def offloads(self) -> bool:
        """Whether DeepSpeed keeps weights and optimizer states in CPU memory."""
        stage = read_config(self.ds).get("zero_optimization", {})
        return bool(stage.get("offload_param", {}).get("device") == "cpu")

    def accumulation_steps(self) -> int:
        """Batches in one optimizer step. Raises UserError if --global_bs is not divisible."""
        if self.global_bs is None:
            return self.grad_acc
        sequences = self.bs * world_size()
        if self.global_bs % sequences or self.global_bs < 1:
            raise UserError(
                f"--global_bs is {self.global_bs}, not a multiple of --bs {self.bs} times "
                f"{world_size()} ranks. Change --bs."
            )
        return self.global_bs // sequences

    @property
    def global_batch_size(self) -> int:
        """Sequences in one optimizer step, over all devices and accumulated batches."""
        return self.bs * world_size() * self.accumulation_steps()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the base is loaded.

        Full training without DeepSpeed, which keeps float32 master copies, is done on float32
        weights: in half precision small updates would be lost to rounding.
        """
        if self.trainable == "full" and self.ds is None:
            return torch.float32
        return self.compute_dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    def arguments(self, load_universal: bool) -> TrainingArguments:
        """transformers' TrainingArguments. Raises UserError for options that conflict.

        `load_universal` makes DeepSpeed load a universal checkpoint.
        """
        deepspeed = None if self.ds is None else read_config(self.ds)
        if deepspeed is not None and load_universal:
            deepspeed["checkpoint"] = {"load_universal": True}
        fields = {
            "output_dir": str(self.output_dir),
            "per_device_train_batch_size": self.bs,
            "per_device_eval_batch_size": self.bs,
            "gradient_accumulation_steps": self.accumulation_steps(),
            "num_train_epochs": self.epoch,
            "max_steps": self.steps or -1,
            "learning_rate": self.lr,
            "warmup_steps": self.warmup_ratio,  # a value below 1 is a fraction of all steps
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
            "report_to": self.report_to,
            "run_name": self.name,
            "gradient_checkpointing": self.gradient_checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "dataloader_num_workers": self.num_workers,
            "use_cpu": not torch.cuda.is_available(),
            "remove_unused_columns": False,
            "prediction_loss_only": True,
            # By default every argument of `forward` with "label" in its name: validation would need
            # `shift_labels` as well, and without it report no losses.
            "label_names": ["labels"],
            "seed": self.seed,
            # Of NCCL and gloo, while rank 0 alone generates samples or writes a checkpoint.
            "ddp_timeout": int(TIMEOUT.total_seconds()),
        }
        # VerifiedCheckpointCallback applies save_total_limit.
        handled = ("report_to", "save_total_limit")
        own = {name: value for name, value in self.trainer.items() if name not in handled}
        try:
            return TrainingArguments(**{**fields, **own})
        except (ValueError, ImportError, TypeError) as error:
            raise UserError(f"These options cannot be combined: {error}") from error
