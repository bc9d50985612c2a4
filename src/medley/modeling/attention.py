"""Attention within packed documents, by one of several kernels.

`sdpa` runs torch's causal attention for each document, on any device. `flash` is torch's kernel for
sequences of varying length, `xformers` its block-diagonal kernel, and `flex` a compiled mask. These
three need CUDA. All compute the same: each token attends to itself and to the preceding tokens of
its own document.

Shapes: B batch, S sequence, H heads, K head width, N = B S tokens of a batch, concatenated.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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
_FAILED = "A trial on 16 tokens failed"
# The names for transformers. It searches them for "flash" and would look for another package.
_NAMES = {
    "sdpa": "medley_sdpa",
    "flash": "medley_varlen",
    "flex": "flex_attention",
    "xformers": "medley_xformers",
}
_PACKAGES = {  # the module of a kernel, and the package that contains it
    "flash": ("torch.nn.attention.varlen", "torch 2.11 or later with CUDA"),
    "xformers": ("xformers", "the release of xformers that was built for this torch"),
}


def set_attention(decoder: PreTrainedModel, choice: Attention, dtype: torch.dtype) -> str:
    """Sets the attention kernel of a decoder for training. Returns the name of the kernel.

    `dtype` is the dtype of the computation. `auto` takes the fastest kernel that runs on this
    machine, and warns if one is installed that fails. Raises UserError if this machine cannot run
    the kernel that `choice` names.
    """
    config = decoder.config
    shape = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    chosen = choice if choice != "auto" else _fastest(dtype, shape)
    reason = unavailable_reason(chosen, dtype, shape)
    if reason is not None:
        others = [n for n in _NAMES if unavailable_reason(n, dtype, shape) is None]
        raise UserError(
            f"--attention {choice}: {reason} Use --attention auto (kernels that run here: "
            f"{', '.join(others)})."
        )
    decoder.set_attn_implementation(_NAMES[chosen])
    return chosen


def _fastest(dtype: torch.dtype, shape: tuple[int, int]) -> Attention:
    kernels: tuple[Attention, ...] = ("flash", "xformers")
    for name in kernels:
        reason = unavailable_reason(name, dtype, shape)
        if reason is None:
            return name
        if reason.startswith(_FAILED):
            warnings.warn(f"Attention kernel {name} is not used. {reason}", stacklevel=3)
    return "sdpa"


def unavailable_reason(
    choice: str, dtype: torch.dtype, shape: tuple[int, int] = (2, 64)
) -> str | None:
    """The reason why this machine cannot run a kernel, and what to install; None if it can.

    `shape` is the number of heads and their width.
    """
    if choice == "sdpa":
        return None
    if not torch.cuda.is_available():
        return (
            "The kernel needs CUDA, which this machine or this torch does not have. Install a "
            "torch with CUDA on a machine with an NVIDIA GPU."
        )
    if choice == "flex":
        return None
    if dtype not in _HALF:
        return f"The kernel needs --bf16 or --fp16 (got {dtype})."
    module, package = _PACKAGES[choice]
    try:
        is_installed = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        is_installed = False
    if not is_installed:
        return f"{module} is not installed. Install {package}."
    error = _try(_KERNELS[choice], dtype, shape)
    return None if error is None else f"{_FAILED} ({error}). Install {package}, or use another GPU."


def _try(kernel: Kernel, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
    """Runs a kernel with its gradient on two documents of 16 tokens; its error, or None.

    An installed kernel may be built for another torch, may take other parameters, or may not
    support this GPU.
    """
    heads, width = shape
    device = torch.device("cuda", torch.cuda.current_device())
    documents = Documents.of(torch.tensor([[*range(9), *range(7)]], device=device))
    states = torch.ones(3, 1, heads, 16, width, dtype=dtype, device=device, requires_grad=True)
    try:
        with torch.enable_grad():
            output = kernel(states[0], states[1], states[2], documents, None)
        (gradient,) = torch.autograd.grad(output.sum(), states)
        if not bool(gradient.isfinite().all()):
            return "its gradient is NaN or infinite"
    except Exception as error:  # each kernel raises its own types
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
    return None


@dataclass(frozen=True)
class Documents:
    """The documents of a batch. It is made where the batch is, so that no layer asks the device.

    Attributes:
        lengths: tokens of each document, in the order of the N tokens; padding is a document
        starts: int32 (documents + 1,), the first of the N tokens of each document, and N
    """

    lengths: tuple[int, ...]
    starts: Tensor

    @classmethod
    def of(cls, position_ids: Tensor) -> Documents:
        """From positions int64 (B, S) that restart at each document. Copies them to the CPU."""
        positions = position_ids.cpu()
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        starts = [*begins.reshape(-1).nonzero().squeeze(1).tolist(), positions.numel()]
        lengths = tuple(end - start for start, end in pairwise(starts))
        on_cpu = torch.tensor(starts, dtype=torch.int32)
        return cls(lengths, on_cpu.to(position_ids.device))

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Documents:
        """accelerate calls this for each object of a batch."""
        return Documents(self.lengths, self.starts.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Documents:
        """torch's DataLoader calls this for each object of a batch."""
        return Documents(self.lengths, self.starts.pin_memory())

    @cached_property
    def xformers_mask(self) -> Any:
        from xformers import ops

        bias = ops.fmha.attn_bias.BlockDiagonalCausalMask
        return bias.from_seqlens(list(self.lengths), device=self.starts.device)


Kernel = Callable[[Tensor, Tensor, Tensor, Documents, float | None], Tensor]


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
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Query (B, H, S, K), keys and values with H heads or fewer -> (B, S, H, K)."""
        # Under autocast, the norms of queries and keys return float32; values stay in half.
        query, key = query.to(value.dtype), key.to(value.dtype)
        if documents is None:  # outside of training: a mask, or plain causal attention
            output, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
            return output, None
        batch, heads, length, width = query.shape

        def concatenate(states: Tensor) -> Tensor:
            repeated = repeat_kv(states, heads // states.shape[1]).transpose(1, 2)
            return repeated.reshape(1, batch * length, heads, width).transpose(1, 2)

        states = (concatenate(query), concatenate(key), concatenate(value))
        output = kernel(*states, documents, scaling)
        return output.transpose(1, 2).reshape(batch, length, heads, width), None

    return attend


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None
) -> Tensor:
    lengths = list(documents.lengths)
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
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # the oldest supported torch lacks it

    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))  # (N, H, K)
    starts, longest = documents.starts, documents.longest
    causal = (-1, 0)  # window: unlimited to the left, nothing to the right
    output = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=causal)
    assert isinstance(output, Tensor)
    return output.transpose(0, 1)[None]


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None
) -> Tensor:
    from xformers import ops

    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (1, N, H, K)
    mask = documents.xformers_mask
    output: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)
    return output.transpose(1, 2)


def no_mask(device: torch.device) -> Tensor:
    """An attention mask for a batch with `Documents`: transformers passes on a mask with 4 axes.

    Without one, transformers would search the positions for documents, which waits for the device.
    """
    return torch.empty(1, 1, 1, 1, device=device)


_KERNELS: dict[str, Kernel] = {"sdpa": _sdpa, "flash": _flash, "xformers": _xformers}
for _name, _kernel in _KERNELS.items():
    AttentionInterface.register(_NAMES[_name], _attention(_kernel))
    AttentionMaskInterface.register(_NAMES[_name], sdpa_mask)
