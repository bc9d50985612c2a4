"""One training step of a new VQGAN, with a codebook that follows moving averages.

Each codebook vector is the exponential moving average of the latents that were quantized to it
(van den Oord et al. 2017, appendix A.1). The codebook gets no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medley.vqgan.model import VQGAN


@dataclass
class CodebookAverage:
    """Moving averages of the count of each code (n_embed,) and of the sum of its latents."""

    count: Tensor
    total: Tensor
    decay: float = 0.99

    @classmethod
    def start(
        cls, vqgan: VQGAN, latents: Tensor, active: int, generator: torch.Generator
    ) -> CodebookAverage:
        """Initializes `active` codes with random latents (N, E), so that all of them are used.

        The other codes are set far away from all latents and are therefore never used. A small
        decoder learns fewer codes sooner. `generator` is one of the CPU, so that the codebook does
        not depend on the device.
        """
        table = vqgan.quantize.embedding.weight
        device = latents.device
        picks = torch.randint(len(latents), (len(table),), generator=generator).to(device)
        noise = torch.randn(table.shape, generator=generator).to(device)
        with torch.no_grad():
            spread = latents.std() * 0.01  # makes equal picks different
            table.copy_(latents[picks])
            table.add_(noise * spread)
            table[active:] = table[active:] + 100 * latents.std()
        return cls(torch.ones(len(table), device=device), table.detach().clone())

    def update(self, vqgan: VQGAN, latents: Tensor, codes: Tensor) -> None:
        """Moves the codebook towards latents (N, E), quantized to codes (N,)."""
        table = vqgan.quantize.embedding.weight
        with torch.no_grad():
            chosen = torch.bincount(codes, minlength=len(table)).to(self.count.dtype)
            sums = torch.zeros_like(self.total).index_add_(0, codes, latents)
            self.count.mul_(self.decay).add_(chosen, alpha=1 - self.decay)
            self.total.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            alive = self.count > 1e-3  # unused codes do not move
            table[alive] = self.total[alive] / self.count[alive, None]


@dataclass
class StepResult:
    loss: Tensor
    reconstruction: Tensor  # (B, 3, H, W)
    codes: Tensor  # (N,) of the whole batch; empty without quantization
    latents: Tensor  # (N, E) of the whole batch, detached


def training_step(
    vqgan: VQGAN,
    pixels: Tensor,
    quantize: bool,
    commitment: float,
    weight: Tensor | None = None,
) -> StepResult:
    """Pixels (B, 3, H, W) in [-1, 1] -> loss and reconstruction, without an optimizer step.

    Without `quantize`, the decoder gets the latents themselves. A new VQGAN starts this way.
    The loss is |x - y| + 5 (x - y)^2 + commitment * (z - code)^2, each term a mean. The squared
    term preserves small findings, whose few pixels have little weight in a mean of absolute
    differences.

    Args:
        weight: weight of each pixel's error (B, 1, H, W); 1 unless given
    """
    z = vqgan.latents(pixels).float()
    b, width, h, w = z.shape
    flat = z.permute(0, 2, 3, 1).reshape(-1, width)
    codes = torch.empty(0, dtype=torch.int64, device=z.device)
    commit = z.new_zeros(())
    quantized = z
    if quantize:
        with torch.no_grad():
            codes = vqgan.quantize.codes(z.detach()).reshape(-1)
            chosen = vqgan.quantize.embedding.weight[codes]
            chosen = chosen.reshape(b, h, w, width).permute(0, 3, 1, 2)
        commit = F.mse_loss(z, chosen)
        quantized = z + (chosen - z).detach()  # straight-through gradient
    reconstruction = vqgan.decode_latents(quantized).float()
    error = reconstruction - pixels
    per_pixel = error.abs() + 5 * error**2
    loss = (per_pixel if weight is None else per_pixel * weight).mean() + commitment * commit
    return StepResult(loss, reconstruction, codes, flat.detach())
