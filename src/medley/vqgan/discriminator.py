"""Discriminates patches of real images from reconstructed ones (Isola et al. 2017, PatchGAN)."""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Pixels (B, 3, H, W) -> a score for each patch (B, 1, h, w), high for real ones.

    Group norm replaces the batch norm of the original. Each score then depends only on its own
    image, not on the batch or the number of ranks.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            out = width * 2 if layer <= 3 else width
            stride = 1 if layer == layers else 2
            blocks += [
                nn.Conv2d(width, out, 4, stride, 1, bias=False),
                nn.GroupNorm(32, out),
                nn.LeakyReLU(0.2),
            ]
            width = out
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.blocks(pixels)
