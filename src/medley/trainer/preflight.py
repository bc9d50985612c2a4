"""What a run will take, told before its first step: memory, time, disk. Estimates, said as such."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medley.errors import UserError
from medley.modeling.chunked_loss import LOSS_CHUNK

ADAM_BYTES = 8  # two moments in float32
MASTER_BYTES = 4  # a float32 copy of weights that are kept in half precision
OVERHEAD = 600_000_000  # of python, torch and its workspaces


@dataclass(frozen=True)
class FlopCounter:
    """Operations that a token takes. `peak` is what the device reaches, operations a second.

    Forward 2 N, gradients of the inputs 2 N, those of weights that learn 2 N, and 2 N again
    where activations are computed twice (N the weights; Kaplan et al. 2020, section 2.1).
    """

    layer_weights: int
    head_weights: int
    passes: int  # of 2 N each
    peak: float

    def operations(self, tokens: float, labelled: float) -> float:
        """`tokens` go through the layers, `labelled` of them through the head as well."""
        return 2 * self.passes * (self.layer_weights * tokens + self.head_weights * labelled)


def estimate_flops(
    model: Any, full: bool, checkpointing: bool, device: torch.device
) -> FlopCounter:
    decoder = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = sum(size_of(p) for p in decoder.model.layers.parameters())
    dtype = next(decoder.model.layers.parameters()).dtype
    return FlopCounter(
        layers,
        size_of(decoder.lm_head.weight),
        2 + full + checkpointing,
        measure_peak_flops(device, dtype),
    )


def size_of(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, also where ZeRO-3 has taken it apart."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def measure_peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Operations a second of a matrix product here, measured for a tenth of a second."""
    if not dtype.is_floating_point:
        dtype = torch.float32
    size = size * 8 if device.type == "cuda" else size
    one = torch.randn(size, size, device=device).to(dtype)
    product = one @ one
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.1 or rounds < 3:
        torch.matmul(one, one, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - start)


@dataclass(frozen=True)
class TrainingMemoryEstimate:
    """What the estimates are made from; sizes in tokens and bytes are of one device."""

    learned: int
    total: int
    tokens_a_batch: int
    labelled_a_batch: int
    bytes_a_number: int
    checkpointing: bool
    zero_stage: int
    ranks: int
    config: Any
    weight_bytes: float = 0  # where it is not total times bytes_a_number (quantised)
    offloaded: bool = False  # weights and optimizer stay on the CPU

    def memory(self) -> dict[str, float]:
        """Bytes by what holds them."""
        shards = {0: (1, 1, 1), 1: (1, 1, self.ranks), 2: (1, self.ranks, self.ranks)}
        of_weights, of_gradients, of_states = shards.get(self.zero_stage, (self.ranks,) * 3)
        half = self.bytes_a_number < 4 and self.zero_stage > 0
        wide, feed = self.config.hidden_size, self.config.intermediate_size
        # What one layer keeps for its gradient, with the inputs of adapters, in numbers a token.
        layer = 12 * wide + 5 * feed
        layers = self.config.num_hidden_layers
        kept = layers * wide + layer if self.checkpointing else layers * layer
        chunk = min(LOSS_CHUNK, self.labelled_a_batch)
        weights = self.weight_bytes or self.total * self.bytes_a_number
        away = 0 if self.offloaded else 1
        return {
            "weights": away * weights / of_weights,
            "gradients": self.learned * self.bytes_a_number / of_gradients,
            "optimizer": away * self.learned * (ADAM_BYTES + MASTER_BYTES * half) / of_states,
            "activations": kept * self.tokens_a_batch * self.bytes_a_number,
            "loss": 2 * 4 * chunk * self.config.vocab_size
            + self.labelled_a_batch * wide * self.bytes_a_number * 2,
            "overhead": OVERHEAD,
        }

    def checkpoint_bytes(self) -> int:
        """Bytes of one saved checkpoint: what is trained, and the optimizer's state."""
        return self.learned * (self.bytes_a_number + ADAM_BYTES + MASTER_BYTES)


def check_memory(
    plan: TrainingMemoryEstimate, device: torch.device, ranks_here: int, there: float = 0
) -> str:
    """One line about memory. Raises UserError with advice where it cannot fit.

    `there` are bytes of weights that are in the device's memory already.
    """
    parts = plan.memory()
    needed = sum(parts.values())
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0]) + there
    else:
        import psutil  # accelerate brings it

        free = psutil.virtual_memory().available / ranks_here + there
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    line = f"memory: about {needed / 1e9:.1f} GB a rank ({listed}); {free / 1e9:.1f} GB are free"
    if needed > free:
        raise UserError(
            f"{line}: it does not fit. In this order: --gradient_checkpointing, a smaller --bs "
            "with a larger --grad_acc, a shorter --max_length, --bf16, --ds "
            "training/deepspeed/zero3.json on several GPUs, --quantize 4bit; --no_preflight "
            "starts all the same"
        )
    return line


def check_disk(plan: TrainingMemoryEstimate, output_dir: Path, saves: int) -> str:
    """One line about disk. Raises UserError where the checkpoints to come find no room."""
    needed = plan.checkpoint_bytes() * saves
    free = shutil.disk_usage(nearest_parent(output_dir)).free
    line = (
        f"disk: about {saves} checkpoint{'s' * (saves != 1)} of "
        f"{plan.checkpoint_bytes() / 1e6:.0f} MB; {free / 1e9:.1f} GB are free"
    )
    if needed > free:
        raise UserError(
            f"{output_dir}: {line}: keep fewer (--trainer.save_total_limit 2), save "
            "less often (--save_steps), or name another --output_dir"
        )
    return line


def nearest_parent(folder: Path) -> Path:
    return next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())


def expected_checkpoints(
    strategy: str, steps: int, every: float, epochs: float, limit: int | None
) -> int:
    """How many checkpoints will lie on the disk at once, with one that is being written."""
    between = every * steps if every < 1 else every  # below 1 it is a share of all steps
    count = {"steps": steps / max(between, 1), "epoch": epochs}.get(strategy, 0)
    found = int(count) + 1
    return min(found, limit + 1) if limit else found


def format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count_trainable(parameters: Iterable[nn.Parameter]) -> int:
    return sum(size_of(p) for p in parameters if p.requires_grad)
