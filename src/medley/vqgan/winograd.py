"""3 x 3 convolutions of channels-last feature maps on the CPU, by Winograd's algorithm.

F(2 x 2, 3 x 3) (Lavin and Gray 2016, arXiv:1509.09308) computes 2 x 2 outputs from tiles of 4 x 4
inputs by 16 matrix products and needs 2.25 times fewer multiplications. Its error against double
precision is smaller than that of torch's direct convolution. On one thread it is faster
(docs/log.md), on several threads it is not. One process for each core is therefore fastest. In
float64, torch's own convolution is slower and needs nine times the memory of its input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TILES = 256  # tiles in one block, so that its data fit in the cache
_DTYPES = (torch.float32, torch.float64)

_FILTER = torch.tensor(
    [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64
)


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution that keeps the size of the map. `freeze` makes inference fast."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)
        self._transformed: Tensor | None = None

    def freeze(self) -> None:
        """Transforms the weights. Call it again after the weights change."""
        is_supported = self.weight.device.type == "cpu" and self.weight.dtype in _DTYPES
        self._transformed = _transform_filter(self.weight.detach()) if is_supported else None

    def forward(self, x: Tensor) -> Tensor:
        if self._transformed is None or not _is_supported(x, self._transformed.dtype):
            return super().forward(x)
        assert self.bias is not None
        maps = [_convolve(one, self._transformed, self.bias) for one in x.permute(0, 2, 3, 1)]
        return torch.stack(maps).permute(0, 3, 1, 2) if len(maps) > 1 else _with_batch(maps[0])


def _with_batch(y: Tensor) -> Tensor:
    return y[None].permute(0, 3, 1, 2)


def _is_supported(x: Tensor, dtype: torch.dtype) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == dtype
        and x.shape[2] % 2 == 0
        and x.shape[3] % 2 == 0
        and (dtype == torch.float64 or torch.get_num_threads() == 1)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _transform_filter(weight: Tensor) -> Tensor:
    """Weights (K, D, 3, 3) -> (16, D, K) of the same dtype, with one rounding."""
    k, d = weight.shape[:2]
    wide = torch.einsum("ai,kdij,bj->abdk", _FILTER, weight.double(), _FILTER)
    return wide.reshape(16, d, k).to(weight.dtype).contiguous()


def _convolve(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """One map (H, W, D) -> (H, W, K). H and W must be even."""
    h, w, d = x.shape
    k = filters.shape[2]
    across = w // 2  # tiles in a row of tiles
    padded = x.new_zeros(h + 2, w + 2, d)
    padded[1:-1, 1:-1] = x
    y = x.new_empty(h, w, k)
    max_rows = max(1, TILES // across)  # rows of tiles in one block
    rows = x.new_empty(4, max_rows, w + 2, d)
    tiles = x.new_empty(16, max_rows * across, d)
    products = x.new_empty(16, max_rows * across, k)
    for start in range(0, h // 2, max_rows):
        n = min(max_rows, h // 2 - start)
        part = padded[2 * start : 2 * (start + n) + 2]
        _transform_input(part, rows[:, :n], tiles[:, : n * across].view(4, 4, n, across, d))
        torch.bmm(tiles[:, : n * across], filters, out=products[:, : n * across])
        target = y[2 * start : 2 * (start + n)].view(n, 2, across, 2, k)
        _transform_output(products[:, : n * across].view(4, 4, n, across, k), bias, target)
    return y


def _transform_input(x: Tensor, rows: Tensor, tiles: Tensor) -> None:
    """B^T d B: n rows of tiles (2n + 2, W + 2, D) -> (4, 4, n, tiles in a row, D)."""
    n, w = rows.shape[1], rows.shape[2] - 2
    r0, r1, r2, r3 = (x[i : i + 2 * n - 1 : 2] for i in range(4))
    torch.sub(r0, r2, out=rows[0])
    torch.add(r1, r2, out=rows[1])
    torch.sub(r2, r1, out=rows[2])
    torch.sub(r1, r3, out=rows[3])
    c0, c1, c2, c3 = (rows[:, :, i : i + w - 1 : 2] for i in range(4))
    torch.sub(c0, c2, out=tiles[:, 0])
    torch.add(c1, c2, out=tiles[:, 1])
    torch.sub(c2, c1, out=tiles[:, 2])
    torch.sub(c1, c3, out=tiles[:, 3])


def _transform_output(m: Tensor, bias: Tensor, y: Tensor) -> None:
    """A^T m A plus bias: (4, 4, n, tiles, K) -> (n, 2, tiles, 2, K)."""
    top = m[0] + m[1]
    top += m[2]
    bottom = m[1] - m[2]
    bottom -= m[3]
    for i, half in enumerate((top, bottom)):
        left = half[0] + half[1]
        left += half[2]
        torch.add(left, bias, out=y[:, i, :, 0])
        right = half[1] - half[2]
        right -= half[3]
        torch.add(right, bias, out=y[:, i, :, 1])
