"""From logits to tokens: guidance, repetition penalty, top-k and top-p, seeded choice.

Shapes: B rows, V vocabulary (or the part of it that may come). A parameter of a row is a number for
all rows, or a tensor (B, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CANDIDATES = 1024  # likeliest tokens that are looked at first: sorting all of them takes longer


def apply_cfg(
    full: Tensor,
    images_only: Tensor,
    nothing: Tensor,
    scale_text: Tensor | float,
    scale_image: Tensor | float,
) -> Tensor:
    """Logits of three contexts (B, V) -> guided logits (B, V).

    u + s_image (i - u) + s_text (f - i), with f the full context, i its pictures only, u
    nothing (Chameleon's classifier-free guidance over two conditions).
    """
    return nothing + scale_image * (images_only - nothing) + scale_text * (full - images_only)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Divides positive and multiplies negative logits of `seen` (B, V) by `penalty`."""
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


def philox_uniforms(seeds: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> Tensor:
    """One number in [0, 1) for each (seed, row, position), float64 (B,), and nothing else.

    Philox counts rather than remembers, so neither the neighbours of a row nor the order of
    its requests can change what it draws.
    """
    drawn = [
        np.random.Philox(key=seed, counter=[row, position, 0, 0]).random_raw() >> 11
        for seed, row, position in zip(seeds, rows, positions, strict=True)
    ]
    return torch.tensor([int(value) * 2.0**-53 for value in drawn], dtype=torch.float64)


def top_k_top_p(
    logits: Tensor, top_k: Tensor | int, top_p: Tensor | float, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` likeliest tokens, ids and probabilities (B, width), likeliest first; what top-k
    and top-p leave out has probability 0. And whether that is all that they keep, bool (B,).

    First the `top_k` likeliest (0: all), then of those the fewest whose probabilities reach
    `top_p`.
    """
    values, ids = logits.topk(width, dim=-1)
    places = torch.arange(width, device=logits.device)
    limit = torch.as_tensor(top_k, device=logits.device)
    in_k = (places < limit) | (limit == 0)
    whole_of_k = values.masked_fill(~in_k, float("-inf")).logsumexp(-1, keepdim=True)
    whole = torch.where(limit == 0, logits.logsumexp(-1, keepdim=True), whole_of_k)
    probabilities = (values - whole).exp() * in_k
    before = probabilities.cumsum(-1) - probabilities
    # A share of 1 means every token, though the sum may reach 1 before by rounding.
    keep = in_k & ((before < top_p) | (torch.as_tensor(top_p, device=logits.device) >= 1))
    complete = ~keep[:, -1] if width < logits.shape[-1] else torch.ones_like(keep[:, -1])
    return ids, probabilities * keep, complete


def sample(
    logits: Tensor, uniform: Tensor, top_k: Tensor | int = 0, top_p: Tensor | float = 1.0
) -> Tensor:
    """Logits (B, V), uniform float64 (B,) -> tokens int64 (B,), sampled from what top-k and top-p
    keep, in the order of the vocabulary."""
    if logits.device.type == "mps":  # it has no float64
        logits = logits.cpu()
        top_k = top_k.cpu() if isinstance(top_k, Tensor) else top_k
        top_p = top_p.cpu() if isinstance(top_p, Tensor) else top_p
    ids, probabilities, complete = top_k_top_p(
        logits, top_k, top_p, min(CANDIDATES, logits.shape[-1])
    )
    if not bool(complete.all()):
        return sample_full_sort(logits, uniform, top_k, top_p)
    return _pick(ids, probabilities, uniform)


def sample_full_sort(
    logits: Tensor, uniform: Tensor, top_k: Tensor | int, top_p: Tensor | float
) -> Tensor:
    """The same, with all tokens sorted and nothing asked of the device."""
    ids, probabilities, _ = top_k_top_p(logits, top_k, top_p, logits.shape[-1])
    return _pick(ids, probabilities, uniform)


def _pick(ids: Tensor, probabilities: Tensor, uniform: Tensor) -> Tensor:
    ids, order = ids.sort(dim=-1)
    cumulative = probabilities.gather(-1, order).double().cumsum(-1)
    whole = cumulative[:, -1:]
    # Scaled, since the last sum may stay below 1 by rounding: every uniform finds its token.
    place = torch.searchsorted(cumulative, uniform.to(ids.device)[:, None] * whole, right=True)
    last = (cumulative < whole).sum(-1, keepdim=True)  # the last token that may come
    return ids.gather(-1, torch.minimum(place, last)).squeeze(1)
