"""Metrics of a VQGAN: reconstruction quality, and usage of the codebook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from medley.images.preprocess import to_pil

HIGHEST_PSNR = 100.0  # decibels; the PSNR of two equal images is infinite


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in decibels of pixels (B, 3, H, W) in [-1, 1]."""
    error = ((one.clamp(-1, 1) - other.clamp(-1, 1)) ** 2).mean((1, 2, 3)) / 4
    return (-10 * torch.log10(error)).clamp(max=HIGHEST_PSNR)


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity (B,) of pixels (B, 3, H, W) in [-1, 1] (Wang et al. 2004).

    It needs torchmetrics (extra `evaluate`).
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    # SSIM compares means as ratios and therefore needs values of at least 0.
    unit = [(pixels.clamp(-1, 1) + 1) / 2 for pixels in (one, other)]
    measured = structural_similarity_index_measure(*unit, data_range=1.0, reduction="none")
    assert isinstance(measured, Tensor)
    return measured.reshape(len(one))


def comparison_grid(pairs: Sequence[tuple[Tensor, Tensor]]) -> Image.Image:
    """Pairs of pixels (3, size, size) -> one image: originals above, reconstructions below."""
    side = pairs[0][0].shape[-1]
    grid = Image.new("RGB", (side * len(pairs), 2 * side))
    for column, pair in enumerate(pairs):
        for row, pixels in enumerate(pair):
            grid.paste(to_pil(pixels), (column * side, row * side))
    return grid


class CodeUsage:
    """Counts how often each code of a codebook is used."""

    def __init__(self, n_embed: int) -> None:
        self.counts = torch.zeros(n_embed, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        flat = codes.detach().reshape(-1).cpu()
        self.counts += torch.bincount(flat, minlength=len(self.counts))

    @property
    def used(self) -> int:
        return int((self.counts > 0).sum())

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the codes: the number of codes, if all were used equally often."""
        share = self.counts[self.counts > 0].double() / max(1, int(self.counts.sum()))
        return float(torch.exp(-(share * share.log()).sum()))

    def summary(self) -> dict[str, float]:
        size = len(self.counts)
        return {
            "codes_used": self.used,
            "codes_dead": size - self.used,
            "usage": self.used / size,
            "perplexity": self.perplexity,
        }
