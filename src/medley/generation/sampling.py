"""From logits to tokens: guidance, repetition penalty, temperature, top-p, seeded choice.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def guide(
    full: Tensor, images_only: Tensor, nothing: Tensor, scale_text: Tensor, scale_image: Tensor
) -> Tensor:
    """Logits of three contexts (B, V), scales (B, 1) -> guided logits (B, V).

    u + s_image (i - u) + s_text (f - i), with f the full context, i its pictures only, u
    nothing (Chameleon's classifier-free guidance over two conditions).
    """
    return nothing + scale_image * (images_only - nothing) + scale_text * (full - images_only)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divides positive and multiplies negative logits of `seen` (B, V) by `penalty` (B, 1)."""
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """-inf for all but the fewest tokens whose probabilities reach `top_p` (B, 1)."""
    ordered, places = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    ordered = ordered.masked_fill(before >= top_p, float("-inf"))
    return torch.empty_like(logits).scatter_(1, places, ordered)


def uniforms(seeds: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> Tensor:
    """One number in [0, 1) for each (seed, row, position), float64 (B,), and nothing else.

    Philox counts rather than remembers, so neither the neighbours of a row nor the order of
    its requests can change what it draws.
    """
    drawn = [
        np.random.Philox(key=seed, counter=[row, position, 0, 0]).random_raw() >> 11
        for seed, row, position in zip(seeds, rows, positions, strict=True)
    ]
    return torch.tensor([int(value) * 2.0**-53 for value in drawn], dtype=torch.float64)


def choose(logits: Tensor, uniform: Tensor, greedy: Tensor) -> Tensor:
    """Logits (B, V), uniform (B,), greedy bool (B,) -> tokens int64 (B,)."""
    if logits.device.type == "mps":  # it has no float64
        logits, greedy = logits.cpu(), greedy.cpu()
    probabilities = logits.double().softmax(-1)
    cumulative = probabilities.cumsum(-1)
    # The last sum may stay below 1 by rounding; scaled, every uniform finds its token.
    targets = (uniform.to(logits.device) * cumulative[:, -1])[:, None]
    sampled = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    last = logits.shape[-1] - 1
    return torch.where(greedy, logits.argmax(-1), sampled.clamp(max=last))
