"""The output head and its cross entropy, computed in chunks of positions.

The gradient of a chunk is computed right after its loss. Its logits are therefore computed only
once and are never stored. Shapes: N labeled positions, D model width, V vocabulary.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

DEVICE_FRACTION = 1 / 64  # of a GPU's memory that one chunk may take
HOST_CHUNK_BYTES = 128 << 20  # the same for other devices; larger chunks are not faster there


@lru_cache
def chunk_bytes(device: torch.device) -> int:
    """Bytes that one chunk may take on a device.

    They follow from the device's whole memory and not from its free memory, so that a resumed run
    has the same chunks and therefore the same rounding.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * DEVICE_FRACTION)
    return HOST_CHUNK_BYTES


def position_bytes(vocab_size: int, itemsize: int) -> int:
    """Bytes of one position in a chunk: logits and their gradient, as computed and in float32."""
    return 2 * vocab_size * (itemsize + 4)


def chunk_size(count: int, vocab_size: int, itemsize: int, device: torch.device) -> int:
    """Positions of a chunk if `count` positions are divided into equal chunks; at least 1."""
    largest = max(chunk_bytes(device) // position_bytes(vocab_size, itemsize), 1)
    number = max(-(-count // largest), 1)
    return max(-(-count // number), 1)


def chunks(states: Tensor, vocab_size: int) -> list[slice]:
    """States (N, D) -> slices of N whose logits fit into the memory of a chunk."""
    count = len(states)
    size = chunk_size(count, vocab_size, _compute_dtype(states).itemsize, states.device)
    return [slice(start, start + size) for start in range(0, count, size)]


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of weighted token losses, and the cross entropy of each token, float32 (N,).

    The loss of a token is its cross entropy plus `z_loss` times the squared log-partition.
    Inputs: states (N, D), weight (V, D), targets int64 (N,), token weights float32 (N,), z_loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        dtype = _compute_dtype(states)
        head = weight.to(dtype)
        grad_states = torch.empty_like(states) if needs_states else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for chunk in chunks(states, len(weight)):
            chunk_states = states[chunk].to(dtype)
            logits = (chunk_states @ head.t()).float()
            log_partition = logits.logsumexp(-1)
            labels = targets[chunk, None]
            losses[chunk] = log_partition - logits.gather(1, labels).squeeze(1)
            scale = token_weights[chunk]
            total += (scale * (losses[chunk] + z_loss * log_partition**2)).sum()
            if not (needs_states or needs_weight):
                continue
            # Softmax minus one-hot, scaled. The gradient of the log-partition is the softmax.
            gradient = logits.sub_(log_partition[:, None]).exp_()
            gradient *= (scale * (1 + 2 * z_loss * log_partition))[:, None]
            gradient.scatter_add_(1, labels, -scale[:, None])
            gradient = gradient.to(dtype)
            if grad_states is not None:
                grad_states[chunk] = gradient @ head
            if grad_weight is not None:
                grad_weight += gradient.t() @ chunk_states
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        grad_total = gradients[0]
        grad_states, grad_weight = ctx.saved_tensors
        if grad_states is not None:
            grad_states = grad_states * grad_total.to(grad_states.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_states, grad_weight, None, None, None


def _compute_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    # The meta device, on which tests run a step, has no autocast.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return states.dtype


class LMHead(nn.Linear):
    """The output head: states -> logits, or with targets the result of `ChunkedCrossEntropy`.

    Both take one call, so that ZeRO-3 gathers the weight once and equally often on every rank.
    """

    def forward(
        self,
        states: Tensor,
        targets: Tensor | None = None,
        token_weights: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Any:
        if targets is None:
            return super().forward(states)
        return ChunkedCrossEntropy.apply(states, self.weight, targets, token_weights, z_loss)  # type: ignore[no-untyped-call]
