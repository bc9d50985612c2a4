"""Attention inside packed documents, by whichever kernel the machine has, behind one name.

`sdpa` runs torch's causal attention document by document, on any device; `flash` torch's kernel for
sequences of varying length; `xformers` its block-diagonal kernel; `flex` a compiled mask. The last
three want CUDA. All of them compute the same: every token sees its own document, up to itself.

Shapes: B batch, S sequence, H heads, K head width, N = B S tokens of a batch laid in a row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from medley.errors import UserError

Attention = Literal["auto", "sdpa", "flash", "flex", "xformers"]
_HALF = (torch.float16, torch.bfloat16)
# On a CPU torch's half precision kernel costs a document this short 2.5 times what float32 does.
_SHORT = 512


def set_attention(decoder: Any, choice: Attention, dtype: torch.dtype) -> str:
    """Makes a decoder use a kernel in training; gives the name of the one that was taken.

    `dtype` is what it computes in. Raises UserError with the reason where this machine lacks the
    kernel.
    """
    chosen = choice
    if choice == "auto":
        chosen = next(
            n for n in ("flash", "xformers", "sdpa") if unavailable_reason(n, dtype) is None
        )
    reason = unavailable_reason(chosen, dtype)
    if reason is not None:
        raise UserError(f"--attention {choice}: {reason}; --attention auto takes what there is")
    decoder.set_attn_implementation("flex_attention" if chosen == "flex" else f"medley_{chosen}")
    return chosen


def unavailable_reason(choice: str, dtype: torch.dtype) -> str | None:
    """Why this machine cannot use a kernel; None where it can."""
    if choice == "sdpa":
        return None
    if not torch.cuda.is_available():
        return "its kernel needs CUDA, and this machine (or this torch) has none"
    if choice == "flex":
        return None
    if dtype not in _HALF:
        return f"its kernel needs --bf16 or --fp16, not {dtype}"
    module = {"flash": "torch.nn.attention.varlen", "xformers": "xformers"}[choice]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"{module} is not installed here"


def sequence_lengths(position_ids: Tensor) -> list[list[int]]:
    """Positions int64 (B, S) that restart at each document -> lengths of those, by row."""
    lengths = []
    for row in position_ids.cpu():
        starts = [0, *((row[1:] != row[:-1] + 1).nonzero().squeeze(1) + 1).tolist(), len(row)]
        lengths.append([end - start for start, end in pairwise(starts)])
    return lengths


Kernel = Callable[[Tensor, Tensor, Tensor, list[int], float | None], Tensor]


def _attention(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    """A function as transformers' attention interface wants it."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        documents: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Query (B, H, S, K), keys and values of as many heads or fewer -> (B, S, H, K)."""
        if documents is None:  # no training: a mask says what is seen, or it is plainly causal
            output, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
            return output, None
        batch, heads, length, width = query.shape
        # Under autocast the norms of queries and keys give float32, values stay in half.
        query, key = query.to(value.dtype), key.to(value.dtype)

        def flat(states: Tensor) -> Tensor:
            whole = repeat_kv(states, heads // states.shape[1]).transpose(1, 2)
            return whole.reshape(1, batch * length, heads, width).transpose(1, 2)

        lengths = [n for row in documents for n in row]
        output = kernel(flat(query), flat(key), flat(value), lengths, scaling)
        return output.transpose(1, 2).reshape(batch, length, heads, width), None

    return attend


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None
) -> Tensor:
    parts = zip(*(torch.split(t, lengths, dim=2) for t in (query, key, value)), strict=True)
    return torch.cat([_sdpa_document(q, k, v, scale) for q, k, v in parts], dim=2)


def _sdpa_document(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention (1, H, S, K); short documents in float32 where that is faster."""
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
    from torch.nn.attention.varlen import varlen_attn  # newer than the oldest torch we take

    starts = torch.tensor([0, *lengths], device=query.device).cumsum(0).int()
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))  # (N, H, K)
    longest = max(lengths)
    causal = (-1, 0)  # any number of places to the left, none to the right
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


def _mask(*args: Any, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """In training documents take the mask's place; with a cache it is sdpa's."""
    if q_length == kv_length:
        return None
    return sdpa_mask(*args, q_length=q_length, kv_length=kv_length, **kwargs)


for _name, _kernel in (("sdpa", _sdpa), ("flash", _flash), ("xformers", _xformers)):
    AttentionInterface.register(f"medley_{_name}", _attention(_kernel))
    AttentionMaskInterface.register(f"medley_{_name}", _mask)
