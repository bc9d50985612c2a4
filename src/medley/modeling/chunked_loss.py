"""The output head and its cross entropy in pieces, without the logits of all places at once.

The gradient of a chunk is taken right after its loss, while its logits are there: they are made
once, and never kept. Shapes: N labelled places, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LOSS_CHUNK = 256  # labelled places whose logits are held at once


class ChunkedCrossEntropy(torch.autograd.Function):
    """States (N, D), weight (V, D), targets int64 (N,), token weights float32 (N,), z_loss ->
    the sum of weighted losses, and each token's cross entropy, float32 (N,).

    A token's loss is its cross entropy plus z_loss times the squared log-partition.
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
        wants_states, wants_weight = ctx.needs_input_grad[:2]
        dtype = _compute_dtype(states)
        head = weight.to(dtype)
        grad_states = torch.empty_like(states) if wants_states else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for start in range(0, len(targets), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            chunk = states[part].to(dtype)
            logits = (chunk @ head.t()).float()
            normaliser = logits.logsumexp(-1)
            at = targets[part, None]
            losses[part] = normaliser - logits.gather(1, at).squeeze(1)
            share = token_weights[part]
            total += (share * (losses[part] + z_loss * normaliser**2)).sum()
            if not (wants_states or wants_weight):
                continue
            # Softmax minus one-hot, scaled; the log-partition's own gradient is the softmax.
            slope = logits.sub_(normaliser[:, None]).exp_()
            slope *= (share * (1 + 2 * z_loss * normaliser))[:, None]
            slope.scatter_add_(1, at, -share[:, None])
            slope = slope.to(dtype)
            if grad_states is not None:
                grad_states[part] = slope @ head
            if grad_weight is not None:
                grad_weight += slope.t() @ chunk
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        of_total = gradients[0]
        of_states, of_weight = ctx.saved_tensors
        if of_states is not None:
            of_states = of_states * of_total.to(of_states.dtype)
        if of_weight is not None:
            of_weight = (of_weight * of_total).to(ctx.weight_dtype)
        return of_states, of_weight, None, None, None


def _compute_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


class LMHead(nn.Linear):
    """The output head: states -> logits, or with targets what `ChunkedCrossEntropy` gives.

    One call in either case, so that whatever gathers its weight (ZeRO-3) does so once, on every
    rank as often as on the others.
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
