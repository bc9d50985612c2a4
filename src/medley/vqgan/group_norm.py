"""Group norm with swish for channels-last feature maps.

On the CPU, torch's group norm sums in one pass and loses half of the digits of float32
(docs/log.md), which is enough to change image codes. The implementation here keeps the digits, and
is faster because it works on blocks that fit in the cache. On other devices torch's group norm
returns channels-first maps, so that the next convolution copies them; the implementation here keeps
the layout. With gradients, torch's own group norm runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 1 << 18  # numbers in one block: 1 MB of float32
_SAMPLE = 256  # positions whose mean is subtracted before summing


def norm(x: Tensor, layer: nn.GroupNorm) -> Tensor:
    """Group norm of feature maps (B, K, H, W)."""
    if not _is_supported(x):
        return layer(x)
    return _blocked(x, layer, swish=False) if x.device.type == "cpu" else _grouped(x, layer)


def norm_swish(x: Tensor, layer: nn.GroupNorm) -> Tensor:
    """Group norm of feature maps (B, K, H, W), then x * sigmoid(x)."""
    if _is_supported(x):
        if x.device.type == "cpu":
            return _blocked(x, layer, swish=True)
        return F.silu(_grouped(x, layer), inplace=True)
    y = layer(x)
    # F.silu differs in the last bit of float32 and would change image codes near a tie.
    gate = torch.sigmoid(y)
    return y * gate if torch.is_grad_enabled() else gate.mul_(y)


def _is_supported(x: Tensor) -> bool:
    return (
        (x.device.type != "cpu" or x.dtype in (torch.float32, torch.bfloat16))
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _grouped(x: Tensor, layer: nn.GroupNorm) -> Tensor:
    """Group norm in two passes over channels-last maps, which stay channels-last."""
    b, k, h, w = x.shape
    flat = x.permute(0, 2, 3, 1).reshape(b, h * w, k)  # a view
    wide = flat if x.dtype in (torch.float32, torch.float64) else flat.float()
    groups = wide.view(b, h * w, layer.num_groups, -1)
    variance, mean = torch.var_mean(groups, (1, 3), correction=0, keepdim=True)  # (B, 1, groups, 1)
    parameters = (layer.num_groups, -1)
    scale = torch.rsqrt(variance + layer.eps) * layer.weight.view(parameters)
    shift = layer.bias.view(parameters) - mean * scale
    normed = torch.addcmul(shift.view(b, 1, k), wide, scale.view(b, 1, k)).to(x.dtype)
    return normed.view(b, h, w, k).permute(0, 3, 1, 2)


def _blocked(x: Tensor, layer: nn.GroupNorm, swish: bool) -> Tensor:
    b, k, h, w = x.shape
    rows = max(1, BLOCK // k)
    full_precision = x.dtype == torch.float32
    flat = x.permute(0, 2, 3, 1).reshape(b, h * w, k)
    out = torch.empty_like(flat)
    for one, target in zip(flat, out, strict=True):
        scale, shift = _scale_and_shift(one, rows, layer)
        for block, result in zip(torch.split(one, rows), torch.split(target, rows), strict=True):
            normed = torch.addcmul(shift, block.float(), scale)
            if swish and full_precision:
                torch.mul(normed, torch.sigmoid(normed), out=result)
            elif swish:
                result.copy_(F.silu(normed, inplace=True))
            else:
                result.copy_(normed)
    return out.view(b, h, w, k).permute(0, 3, 1, 2)


def _scale_and_shift(one: Tensor, rows: int, layer: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift (K,) that normalize positions (P, K) group by group.

    Sums of differences from an approximate mean lose no digits. The sums of the blocks are added
    in double precision.
    """
    positions, k = one.shape
    rough_mean = one[:: max(1, positions // _SAMPLE)].float().mean(0)
    total = torch.zeros(k, dtype=torch.float64)
    squares = torch.zeros(k, dtype=torch.float64)
    for block in torch.split(one, rows):
        centered = block.float() - rough_mean
        total += centered.sum(0)
        squares += centered.square_().sum(0)
    total, squares = total / positions, squares / positions
    groups = (layer.num_groups, -1)
    means = (total + rough_mean).view(groups)
    mean = means.mean(1, keepdim=True)
    variance = ((squares - total**2).view(groups) + (means - mean) ** 2).mean(1, keepdim=True)
    scale = torch.rsqrt(variance + layer.eps) * layer.weight.double().view(groups)
    shift = layer.bias.double().view(groups) - mean * scale
    return scale.reshape(-1).float(), shift.reshape(-1).float()
