"""What the losses of a run depend on. A resumed run must have the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medley.checkpoints.adapter import find_adapter
from medley.checkpoints.checkpoint import Checkpoint
from medley.trainer.checkpointing import TRAINER_PREFIX
from medley.trainer.data import PackedDataset
from medley.trainer.options import TrainOptions
from medley.utils.distributed import world_size
from medley.utils.files import partial_hash, sampled_hash

RESUME_INVARIANTS = (
    "seed", "trainable", "pack", "epoch", "steps", "lr", "lr_scheduler", "warmup_ratio", "train_on",
    "compat", "max_length", "image_loss_weight", "z_loss", "group_by_length", "bf16", "fp16",
    "quantize", "lora_r", "lora_alpha", "lora_rslora", "lora_dropout", "lora_target",
    "tie_head_norms",
)  # fmt: skip
# Fields of TrainingArguments that change no loss.
_NO_EFFECT = {
    "save_total_limit", "report_to", "disable_tqdm", "push_to_hub", "project", "log_level",
    "logging_dir", "logging_first_step", "save_safetensors", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataloader_persistent_workers", "skip_memory_metrics",
}  # fmt: skip
_BASE_SUFFIXES = {".pth", ".pt", ".bin", ".safetensors", ".json", ".yaml", ".ckpt"}
_NOT_WEIGHTS = {"manifest.json", "trainer_state.json", "run.json"}


def identify_run(options: TrainOptions, dataset: PackedDataset, base: Checkpoint) -> dict[str, Any]:
    """The options and inputs of a run that its results depend on."""
    folders = {base.folder, base.model_folder if base.layout == "chameleon" else base.folder}
    adapter = None if options.adapter is None else find_adapter(options.adapter)
    trainer = {n: v for n, v in options.trainer.items() if n not in _NO_EFFECT}
    return {
        "world_size": world_size(), "global_bs": options.global_batch_size,
        "sequences": len(dataset.sequences),
        "train_data": [partial_hash(source.path) for source in dataset.sources],
        "zero_stage": options.zero_stage,
        "base": weights_hash(folders),
        "adapter": None if adapter is None else weights_hash([adapter]),
        **{name: getattr(options, name) for name in RESUME_INVARIANTS},
        **{f"{TRAINER_PREFIX}{name}": value for name, value in trainer.items()},
    }  # fmt: skip


def weights_hash(folders: Iterable[Path]) -> str:
    """A hash of the weights and configurations in some folders, by samples of each file."""
    files = {p for f in folders for p in f.iterdir() if p.suffix in _BASE_SUFFIXES and p.is_file()}
    names = sorted((p.name, p) for p in files if p.name not in _NOT_WEIGHTS)
    listing = "".join(f"{name} {sampled_hash(path)}\n" for name, path in names)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
