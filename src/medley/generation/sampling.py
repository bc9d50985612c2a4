"""Logits -> tokens: guidance, repetition penalty, top-k and top-p, seeded sampling.

Shapes: B sequences, V vocabulary (or the part of it that may come next). A parameter is one number
for all sequences, or a tensor (B, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NUM_CANDIDATES = 1024  # top tokens that are tried first: sorting the entire vocabulary is slower
NONFINITE_LOGITS = (
    "The model's logits are NaN or infinite: its weights are damaged, or too large for float16. "
    "Use bfloat16 or float32."
)


def apply_cfg(
    full: Tensor,
    image_cond: Tensor,
    uncond: Tensor,
    scale_text: Tensor | float,
    scale_image: Tensor | float,
) -> Tensor:
    """Logits of the three contexts (B, V) -> guided logits (B, V).

    u + s_image (i - u) + s_text (f - i), with f for the full context, i for its images only, u
    for an empty context (Chameleon's classifier-free guidance over two conditions).
    """
    return uncond + scale_image * (image_cond - uncond) + scale_text * (full - image_cond)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Divides positive and multiplies negative logits of `seen` (B, V) by `penalty`."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def philox_uniforms(
    seeds: Sequence[int], indices: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """A number in [0, 1) for each (seed, sequence index, position), float64 (B,).

    Philox is counter-based: the result depends on these three numbers only, not on the other
    sequences of a batch or the order of requests.
    """
    bits = [
        np.random.Philox(key=seed, counter=[index, position, 0, 0]).random_raw() >> 11
        for seed, index, position in zip(seeds, indices, positions, strict=True)
    ]
    return torch.tensor([int(value) * 2.0**-53 for value in bits], dtype=torch.float64)


def top_k_top_p(
    logits: Tensor, top_k: Tensor | int, top_p: Tensor | float, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` most probable tokens: ids and probabilities (B, width), in descending order.

    Tokens outside of top-k and top-p get probability 0. The third result, bool (B,), is whether
    the `width` tokens include all tokens that top-k and top-p keep. Top-k is applied first (0
    keeps all), then the fewest of these tokens whose probabilities sum to `top_p`.
    """
    values, ids = logits.topk(width, dim=-1)
    ranks = torch.arange(width, device=logits.device)
    limit = torch.as_tensor(top_k, device=logits.device)
    in_top_k = (ranks < limit) | (limit == 0)
    top_k_sum = values.masked_fill(~in_top_k, float("-inf")).logsumexp(-1, keepdim=True)
    log_sum = torch.where(limit == 0, logits.logsumexp(-1, keepdim=True), top_k_sum)
    probabilities = (values - log_sum).exp() * in_top_k
    before = probabilities.cumsum(-1) - probabilities
    # top_p = 1 keeps every token; the cumulative sum may round to 1 early.
    keep = in_top_k & ((before < top_p) | (torch.as_tensor(top_p, device=logits.device) >= 1))
    complete = ~keep[:, -1] if width < logits.shape[-1] else torch.ones_like(keep[:, -1])
    return ids, probabilities * keep, complete


def sample(
    logits: Tensor, uniform: Tensor, top_k: Tensor | int = 0, top_p: Tensor | float = 1.0
) -> Tensor:
    """Logits (B, V), uniform float64 (B,) -> token ids int64 (B,).

    Samples from the tokens that top-k and top-p keep, in the order of the vocabulary.
    """
    if logits.device.type == "mps":  # MPS does not support float64
        logits = logits.cpu()
        top_k = top_k.cpu() if isinstance(top_k, Tensor) else top_k
        top_p = top_p.cpu() if isinstance(top_p, Tensor) else top_p
    ids, probabilities, complete = top_k_top_p(
        logits, top_k, top_p, min(NUM_CANDIDATES, logits.shape[-1])
    )
    if not bool(complete.all()):
        return sample_full_sort(logits, uniform, top_k, top_p)
    return _invert_cdf(ids, probabilities, uniform)


def sample_full_sort(
    logits: Tensor, uniform: Tensor, top_k: Tensor | int, top_p: Tensor | float
) -> Tensor:
    """`sample` over the fully sorted vocabulary, without a host synchronization."""
    ids, probabilities, _ = top_k_top_p(logits, top_k, top_p, logits.shape[-1])
    return _invert_cdf(ids, probabilities, uniform)


def _invert_cdf(ids: Tensor, probabilities: Tensor, uniform: Tensor) -> Tensor:
    ids, order = ids.sort(dim=-1)
    cumulative = probabilities.gather(-1, order).double().cumsum(-1)
    total = cumulative[:, -1:]
    # Scaled by the total, which may round to less than 1: every uniform number selects a token.
    index = torch.searchsorted(cumulative, uniform.to(ids.device)[:, None] * total, right=True)
    last = (cumulative < total).sum(-1, keepdim=True)  # index of the last possible token
    return ids.gather(-1, torch.minimum(index, last)).squeeze(1)
