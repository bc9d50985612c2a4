"""Logits -> tokens: guidance, repetition penalty, top-k and top-p, seeded sampling.

Shapes: B sequences, V vocabulary (or the part of it that may come next). A parameter is one number
for all sequences, or a tensor (B, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Words = NDArray[np.uint64]
NUM_CANDIDATES = 1024  # top tokens that are tried first: sorting the entire vocabulary is slower
AHEAD = 64  # random numbers of one sequence that are drawn at once
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
    if len(seeds) >= AHEAD:
        numbers = _uniforms(np.array(seeds), np.array(indices), np.array(positions))
        return torch.from_numpy(numbers)
    return torch.tensor(
        [
            _uniforms_ahead(seed, index, position // AHEAD)[position % AHEAD]
            for seed, index, position in zip(seeds, indices, positions, strict=True)
        ],
        dtype=torch.float64,
    )


@lru_cache(maxsize=1024)
def _uniforms_ahead(seed: int, index: int, block: int) -> list[float]:
    """The numbers of AHEAD consecutive positions: one call costs as much as for one of them."""
    positions = np.arange(block * AHEAD, (block + 1) * AHEAD)
    numbers: list[float] = _uniforms(
        np.full_like(positions, seed), np.full_like(positions, index), positions
    ).tolist()
    return numbers


def _uniforms(
    seeds: NDArray[np.int64], indices: NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.float64]:
    # numpy's generator increments the counter before it draws.
    first = indices.astype(np.uint64) + np.uint64(1)
    bits = _philox(seeds.astype(np.uint64), first, positions.astype(np.uint64)) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def _philox(key: _Words, first: _Words, second: _Words) -> _Words:
    """The first word of Philox4x64-10 (Salmon et al. 2011) for counters (first, second, 0, 0).

    numpy's own generator takes one counter at a time, which is slower by a factor of 100.
    """
    zero = np.zeros_like(first)
    words, keys = [first, second, zero, zero], [key, zero]
    for _ in range(10):
        high_0, low_0 = _multiply(words[0], 0xD2E7470EE14C6C93)
        high_1, low_1 = _multiply(words[2], 0xCA5A826395121157)
        words = [high_1 ^ words[1] ^ keys[0], low_1, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [keys[0] + np.uint64(0x9E3779B97F4A7C15), keys[1] + np.uint64(0xBB67AE8584CAA73B)]
    return words[0]


def _multiply(words: _Words, factor: int) -> tuple[_Words, _Words]:
    """High and low 64 bits of a product of 64-bit numbers."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    low_factor, high_factor = np.uint64(factor & 0xFFFFFFFF), np.uint64(factor >> 32)
    low, high = words & mask, words >> half
    middle = high * low_factor + ((low * low_factor) >> half)
    carried = low * high_factor + (middle & mask)
    return high * high_factor + (middle >> half) + (carried >> half), words * np.uint64(factor)


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
    ids, complete = sample_candidates(logits, uniform, top_k, top_p)
    return ids if bool(complete.all()) else sample_full_sort(logits, uniform, top_k, top_p)


def sample_candidates(
    logits: Tensor, uniform: Tensor, top_k: Tensor | int, top_p: Tensor | float
) -> tuple[Tensor, Tensor]:
    """`sample` among the most probable tokens, without a host synchronization.

    The second result, bool (B,), is whether they include all tokens that top-k and top-p keep; the
    ids of other rows are wrong.
    """
    width = min(NUM_CANDIDATES, logits.shape[-1])
    ids, probabilities, complete = top_k_top_p(logits, top_k, top_p, width)
    return _invert_cdf(ids, probabilities, uniform), complete


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
