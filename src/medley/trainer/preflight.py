"""Estimates before the first step: memory, time and disk space of a run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from medley.errors import UserError
from medley.modeling.chunked_loss import HOST_CHUNK_BYTES, position_bytes
from medley.trainer.activations import FLOAT32, HALF, ActivationEstimate
from medley.utils.files import nearest_parent

ADAM_BYTES = 8  # two float32 moments of a parameter
MASTER_BYTES = 4  # float32 copy of a parameter that is kept in half precision
OVERHEAD = 600_000_000  # Python, torch and its workspaces


@dataclass(frozen=True)
class FlopCounter:
    """Counts the floating-point operations of training steps.

    With N weights, a token takes 2 N operations forward, 2 N for the gradients of the inputs, 2 N
    for the gradients of trained weights, and 2 N for recomputed activations (Kaplan et al. 2020,
    section 2.1).

    Attributes:
        layer_weights: weights of the layers
        head_weights: weights of the output head
        passes: passes of 2 N operations
        peak_flops: operations per second that the device reaches
    """

    layer_weights: int
    head_weights: int
    passes: int
    peak_flops: float

    def count(self, tokens: float, labeled_tokens: float) -> float:
        """Operations for `tokens` in the layers, `labeled_tokens` of them also in the head."""
        weights = self.layer_weights * tokens + self.head_weights * labeled_tokens
        return 2 * self.passes * weights


def make_flop_counter(
    model: Any, full: bool, gradient_checkpointing: bool, device: torch.device, dtype: torch.dtype
) -> FlopCounter:
    """The counter of a model; `full` if all its weights are trained.

    `dtype` is that of the matrix products, which that of the weights need not be.
    """
    decoder = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = sum(num_elements(p) for p in decoder.model.layers.parameters())
    return FlopCounter(
        layers,
        num_elements(decoder.lm_head.weight),
        2 + full + gradient_checkpointing,
        measure_peak_flops(device, dtype),
    )


def num_elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also if ZeRO-3 has partitioned it, or bitsandbytes packed it.

    bitsandbytes stores two numbers of 4 bits in a byte.
    """
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return int(packed.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def num_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a parameter, with the scales of a quantized one."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.nbytes + (0 if packed is None else int(packed.absmax.nbytes))


def measure_peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Operations per second of a matrix product on a device, measured for a tenth of a second."""
    size = size * 8 if device.type == "cuda" else size
    matrix = torch.randn(size, size, device=device).to(dtype)
    product = matrix @ matrix
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.1 or rounds < 3:
        torch.matmul(matrix, matrix, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - start)


@dataclass(frozen=True)
class TrainingMemoryEstimate:
    """The quantities that the memory of one device depends on.

    Attributes:
        trainable_params: trained parameters
        total_params: all parameters
        tokens_per_batch: tokens in the batch of one device
        labels_per_batch: labels in the batch of one device
        bytes_per_param: bytes of a trained parameter
        gradient_checkpointing: whether activations are recomputed
        zero_stage: DeepSpeed's ZeRO stage, 0 without DeepSpeed
        world_size: number of ranks
        activations: what a layer keeps for the backward pass
        weight_bytes: bytes of all weights, if not total_params times bytes_per_param
        offloaded: whether weights and optimizer states are in CPU memory
        chunk_bytes: bytes of a chunk of the loss, see `chunked_loss.chunk_bytes`
        bucket_numbers: numbers in the buffer that DeepSpeed collects gradients in
    """

    trainable_params: int
    total_params: int
    tokens_per_batch: int
    labels_per_batch: int
    bytes_per_param: int
    gradient_checkpointing: bool
    zero_stage: int
    world_size: int
    activations: ActivationEstimate
    weight_bytes: float = 0
    offloaded: bool = False
    chunk_bytes: float = HOST_CHUNK_BYTES
    bucket_numbers: int = 0

    def memory(self) -> dict[str, float]:
        """Bytes on one device, by purpose."""
        ranks = self.world_size
        # By how many ranks ZeRO divides weights, gradients and optimizer states.
        divisors = {0: (1, 1, 1), 1: (1, 1, ranks), 2: (1, ranks, ranks)}
        weight_ranks, gradient_ranks, state_ranks = divisors.get(self.zero_stage, (ranks,) * 3)
        has_master_copy = self.bytes_per_param < 4 and self.zero_stage > 0
        weights = self.weight_bytes or self.total_params * self.bytes_per_param
        on_device = 0 if self.offloaded else 1
        state_bytes = ADAM_BYTES + MASTER_BYTES * has_master_copy
        parts = {
            "weights": on_device * weights / weight_ranks,
            "gradients": self.trainable_params * self.bytes_per_param / gradient_ranks,
            "optimizer": on_device * self.trainable_params * state_bytes / state_ranks,
            "activations": self.activation_bytes(),
            "loss": self.loss_bytes(),
            "overhead": OVERHEAD,
        }
        if self.activations.full and self.activations.autocast:
            # Autocast's copies of all matrices, which the backward pass needs.
            parts["half precision copies"] = HALF * self.trainable_params
        if self.bucket_numbers:
            parts["gradient buffer"] = self.bucket_numbers * self.bytes_per_param
        return parts

    def activation_bytes(self) -> float:
        """Bytes that the layers keep, and those of the step that needs most beside them.

        That is the last norm, or the gradients within a layer.
        """
        layer, config = self.activations, self.activations.config
        layers = config.num_hidden_layers
        if self.gradient_checkpointing:
            kept = layers * layer.residual_bytes + layer.layer_bytes
        else:
            kept = layers * layer.layer_bytes
        norm = (FLOAT32 + 2 * layer.itemsize) * config.hidden_size  # of the last hidden states
        return self.tokens_per_batch * float(kept + max(layer.backward_bytes, norm))

    def loss_bytes(self) -> float:
        """Bytes of the labeled positions' hidden states and gradients, and of one chunk."""
        config, itemsize = self.activations.config, self.activations.itemsize
        position = position_bytes(config.vocab_size, itemsize)
        chunk = min(self.labels_per_batch * position, max(self.chunk_bytes, position))
        head = config.vocab_size * config.hidden_size
        head_gradient = FLOAT32 * head if self.activations.full else 0
        states = 2 * self.labels_per_batch * config.hidden_size * itemsize
        return float(chunk + states + head_gradient)

    def checkpoint_bytes(self) -> int:
        """Bytes of one saved checkpoint: trained parameters and optimizer states."""
        return self.trainable_params * (self.bytes_per_param + ADAM_BYTES + MASTER_BYTES)


def check_memory(
    estimate: TrainingMemoryEstimate,
    device: torch.device,
    local_ranks: int,
    loaded_bytes: float = 0,
) -> str:
    """One line about memory. Raises UserError with advice if the run does not fit.

    Args:
        estimate: quantities of the run
        device: device of this rank
        local_ranks: ranks on this machine, which share its CPU memory
        loaded_bytes: bytes of the weights that are in the device's memory already
    """
    parts = estimate.memory()
    needed = sum(parts.values())
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0]) + loaded_bytes
    else:
        free = psutil.virtual_memory().available / local_ranks + loaded_bytes
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    line = f"memory: about {needed / 1e9:.1f} GB per rank ({listed}); {free / 1e9:.1f} GB are free"
    if needed > free:
        raise UserError(
            f"{line}. The run does not fit. Try in this order: --gradient_checkpointing, a smaller "
            "--bs with a larger --grad_acc, a smaller --max_length, --bf16, --ds zero3 on several "
            "GPUs, --quantize 4bit. --no_preflight skips this check."
        )
    return line


def check_disk(estimate: TrainingMemoryEstimate, output_dir: Path, checkpoints: int) -> str:
    """One line about disk space. Raises UserError if the checkpoints do not fit on the disk."""
    needed = estimate.checkpoint_bytes() * checkpoints
    free = shutil.disk_usage(nearest_parent(output_dir)).free
    line = (
        f"disk: about {checkpoints} checkpoint{'s' * (checkpoints != 1)} of "
        f"{estimate.checkpoint_bytes() / 1e6:.0f} MB; {free / 1e9:.1f} GB are free"
    )
    if needed > free:
        raise UserError(
            f"{output_dir}: {line}. Keep fewer checkpoints (--trainer.save_total_limit 2), save "
            "less often (--save_steps), or name another --output_dir."
        )
    return line


def expected_checkpoints(
    strategy: str, steps: int, save_steps: float, epochs: float, limit: int | None
) -> int:
    """The largest number of checkpoints on the disk at once, one in writing included."""
    interval = save_steps * steps if save_steps < 1 else save_steps  # below 1: fraction of steps
    saves = int({"steps": steps / max(interval, 1), "epoch": epochs}.get(strategy, 0)) + 1
    return min(saves, limit + 1) if limit else saves


def format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count_trainable(parameters: Iterable[nn.Parameter]) -> int:
    """Number of trained elements."""
    return sum(num_elements(p) for p in parameters if p.requires_grad)
