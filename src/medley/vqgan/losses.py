"""One training step of a VQGAN: reconstruction, commitment, and a codebook by moving averages.

The codebook follows the exponential moving average of the latents that chose each code
(van den Oord et al. 2017, appendix A.1); its rows take no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medley.vqgan import VQGAN


@dataclass
class CodebookAverage:
    """Moving averages of how often each code is chosen (n_embed,) and of what chose it."""

    count: Tensor
    total: Tensor
    decay: float = 0.99

    @classmethod
    def start(
        cls, vqgan: VQGAN, latents: Tensor, active: int, generator: torch.Generator
    ) -> CodebookAverage:
        """Sets `active` codes to latents (N, E) picked at random, so that they start in use.

        The other codes are put far outside of the latents, where none is ever chosen: a small
        decoder learns a part of the layout sooner than the whole.
        """
        table = vqgan.quantize.embedding.weight
        picks = torch.randint(len(latents), (len(table),), generator=generator)
        with torch.no_grad():
            spread = latents.std() * 0.01  # equal picks must not stay equal
            table.copy_(latents[picks])
            table.add_(torch.randn(table.shape, generator=generator) * spread)
            table[active:] = table[active:] + 100 * latents.std()
        return cls(torch.ones(len(table)), table.detach().clone())

    def update(self, vqgan: VQGAN, latents: Tensor, codes: Tensor) -> None:
        """Moves the codebook towards latents (N, E) that chose codes (N,)."""
        table = vqgan.quantize.embedding.weight
        with torch.no_grad():
            chosen = torch.bincount(codes, minlength=len(table)).to(self.count.dtype)
            sums = torch.zeros_like(self.total).index_add_(0, codes, latents)
            self.count.mul_(self.decay).add_(chosen, alpha=1 - self.decay)
            self.total.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            alive = self.count > 1e-3  # a code that nobody chooses keeps its place
            table[alive] = self.total[alive] / self.count[alive, None]


@dataclass
class StepResult:
    loss: Tensor
    reconstruction: Tensor  # (B, 3, H, W)
    codes: Tensor  # (N,) flat; empty where the step did not quantise
    latents: Tensor  # (N, E) flat, detached


def training_step(
    vqgan: VQGAN,
    pixels: Tensor,
    quantise: bool,
    commitment: float,
    weight: Tensor | None = None,
) -> StepResult:
    """Pixels (B, 3, H, W) in [-1, 1] -> loss and reconstruction; no optimizer step is taken.

    `weight` (B, 1, H, W) says how much each pixel's error counts; all the same unless given.

    Without `quantise` the latents pass through as they are, which is how a new VQGAN starts.
    The loss is |x - y| + 5 (x - y)^2 + commitment * (z - code)^2, each a mean; the square
    keeps small findings, whose few pixels a mean of absolute differences gives away.
    """
    z = vqgan.latents(pixels).float()
    b, width, h, w = z.shape
    flat = z.permute(0, 2, 3, 1).reshape(-1, width)
    codes = torch.empty(0, dtype=torch.int64)
    commit = torch.zeros(())
    quantized = z
    if quantise:
        with torch.no_grad():
            codes = vqgan.quantize.codes(z.detach()).reshape(-1)
            chosen = vqgan.quantize.embedding.weight[codes]
            chosen = chosen.reshape(b, h, w, width).permute(0, 3, 1, 2)
        commit = F.mse_loss(z, chosen)
        quantized = z + (chosen - z).detach()  # the gradient passes straight through
    reconstruction = vqgan.decode_latents(quantized).float()
    error = reconstruction - pixels
    each = error.abs() + 5 * error**2
    loss = (each if weight is None else each * weight).mean() + commitment * commit
    return StepResult(loss, reconstruction, codes, flat.detach())
