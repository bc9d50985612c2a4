"""Attention within packed documents, by one of several kernels.

`sdpa` runs torch's causal attention for each document, on any device. `flash` is torch's kernel for
sequences of varying length, `xformers` its block-diagonal kernel, and `flex` a compiled mask. These
three need CUDA. All compute the same: each token attends to itself and to the preceding tokens of
its own document.

Shapes: B batch, S sequence, H heads, K head width, N = B S tokens of a batch, concatenated.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from medley.errors import UserError

Attention = Literal["auto", "sdpa", "flash", "flex", "xformers"]
_HALF = (torch.float16, torch.bfloat16)
# On a CPU, torch's half precision kernel takes 2.5 times as long as float32 for documents shorter
# than this.
_SHORT = 512


def set_attention(decoder: PreTrainedModel, choice: Attention, dtype: torch.dtype) -> str:
    """Sets the attention kernel of a decoder for training. Returns the name of the kernel.

    `dtype` is the dtype of the computation. Raises UserError if this machine cannot run the kernel.
    """
    chosen = choice
    if choice == "auto":
        chosen = next(
            n for n in ("flash", "xformers", "sdpa") if unavailable_reason(n, dtype) is None
        )
    reason = unavailable_reason(chosen, dtype)
    if reason is not None:
        raise UserError(f"--attention {choice}: {reason} Use --attention auto.")
    decoder.set_attn_implementation("flex_attention" if chosen == "flex" else f"medley_{chosen}")
    return chosen


def unavailable_reason(choice: str, dtype: torch.dtype) -> str | None:
    """The reason why this machine cannot run a kernel; None if it can."""
    if choice == "sdpa":
        return None
    if not torch.cuda.is_available():
        return "The kernel needs CUDA, which this machine or this torch does not have."
    if choice == "flex":
        return None
    if dtype not in _HALF:
        return f"The kernel needs --bf16 or --fp16 (got {dtype})."
    module = {"flash": "torch.nn.attention.varlen", "xformers": "xformers"}[choice]
    try:
        is_installed = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        is_installed = False
    return None if is_installed else f"{module} is not installed."


def sequence_lengths(position_ids: Tensor) -> list[list[int]]:
    """Positions int64 (B, S) that restart at each document -> lengths of the documents."""
    lengths = []
    for positions in position_ids.cpu():
        restarts = (positions[1:] != positions[:-1] + 1).nonzero().squeeze(1) + 1
        starts = [0, *restarts.tolist(), len(positions)]
        lengths.append([end - start for start, end in pairwise(starts)])
    return lengths


Kernel = Callable[[Tensor, Tensor, Tensor, list[int], float | None], Tensor]


def _attention(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    """A kernel -> a function for transformers' attention interface."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        document_lengths: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Query (B, H, S, K), keys and values with H heads or fewer -> (B, S, H, K)."""
        if document_lengths is None:  # outside of training: a mask, or plain causal attention
            output, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
            return output, None
        batch, heads, length, width = query.shape
        # Under autocast, the norms of queries and keys return float32; values stay in half.
        query, key = query.to(value.dtype), key.to(value.dtype)

        def concatenate(states: Tensor) -> Tensor:
            repeated = repeat_kv(states, heads // states.shape[1]).transpose(1, 2)
            return repeated.reshape(1, batch * length, heads, width).transpose(1, 2)

        lengths = [n for sequence in document_lengths for n in sequence]
        states = (concatenate(query), concatenate(key), concatenate(value))
        output = kernel(*states, lengths, scaling)
        return output.transpose(1, 2).reshape(batch, length, heads, width), None

    return attend


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None
) -> Tensor:
    parts = zip(*(torch.split(t, lengths, dim=2) for t in (query, key, value)), strict=True)
    return torch.cat([_sdpa_document(q, k, v, scale) for q, k, v in parts], dim=2)


def _sdpa_document(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention (1, H, S, K); in float32 for short documents if that is faster."""
    if query.device.type != "cpu" or query.dtype not in _HALF or query.shape[2] >= _SHORT:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    with torch.autocast("cpu", enabled=False):
        output = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), is_causal=True, scale=scale
        )
    return output.to(value.dtype)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # the oldest supported torch lacks it

    starts = torch.tensor([0, *lengths], device=query.device).cumsum(0).int()
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))  # (N, H, K)
    longest = max(lengths)
    causal = (-1, 0)  # window: unlimited to the left, nothing to the right
    output = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=causal)
    assert isinstance(output, Tensor)
    return output.transpose(0, 1)[None]


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None
) -> Tensor:
    from xformers import ops

    mask = ops.fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (1, N, H, K)
    output: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)
    return output.transpose(1, 2)


_without_mask: ContextVar[bool] = ContextVar("without_mask", default=False)


@contextmanager
def without_mask() -> Iterator[None]:
    """In this block the kernels get the documents' lengths, and transformers makes no mask."""
    token = _without_mask.set(True)
    try:
        yield
    finally:
        _without_mask.reset(token)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask where the kernel gets the documents' lengths; elsewhere the mask of sdpa."""
    return None if _without_mask.get() else sdpa_mask(*args, **kwargs)


for _name, _kernel in (("sdpa", _sdpa), ("flash", _flash), ("xformers", _xformers)):
    AttentionInterface.register(f"medley_{_name}", _attention(_kernel))
    AttentionMaskInterface.register(f"medley_{_name}", _mask)
