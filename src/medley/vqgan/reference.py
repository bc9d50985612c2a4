"""Image codes in float64, which settle the near ties of float32.

The rounding errors of float64 are smaller than any difference that decides between two codes, so
the codes do not depend on the device, the kernels or the number of threads.

Shapes: B batch, H and W pixels, E codebook width, C image codes of an image, N positions.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from medley.vqgan.model import VQGAN, Encoder, Quantizer
from medley.vqgan.winograd import Conv3x3


class ReferenceEncoder:
    """A copy in float64 of the layers of a VQGAN that determine image codes.

    It runs on `device`, or on the CPU if the device has no float64 (MPS).
    """

    def __init__(self, vqgan: VQGAN, device: torch.device) -> None:
        self.device = torch.device("cpu") if device.type == "mps" else device

        def copy_of(module: nn.Module) -> nn.Module:
            return copy.deepcopy(module).to(self.device).double()

        self._encoder, self._quant_conv = copy_of(vqgan.encoder), copy_of(vqgan.quant_conv)
        quantizer = copy_of(vqgan.quantize)
        assert isinstance(self._encoder, Encoder)
        assert isinstance(quantizer, Quantizer)
        self._quantizer = quantizer
        for module in self._encoder.modules():
            if isinstance(module, Conv3x3):
                module.freeze()

    def codes(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> image codes int64 (B, C)."""
        return self._quantizer.codes(self._latents(pixels))

    def rounding_error(self, pixels: Tensor, latents: Tensor, quantizer: Quantizer) -> float:
        """How far rounding moves the two smallest distances of a position apart or together.

        `quantizer` computes the rounded distances of `latents` (B, E, h, w), which are those of
        `pixels` on another device or in another dtype. The result is the largest over all
        positions, relative to the scale |z|^2 + |e|^2 of the smallest distance.
        """
        lengths = (self._quantizer.embedding.weight**2).sum(1)
        errors = []
        for (part, exact), (_, rounded) in zip(
            self._quantizer.distances(self._latents(pixels)),
            quantizer.distances(latents),
            strict=True,
        ):
            nearest = exact.topk(2, 1, largest=False).indices  # (N, 2)
            moved = (rounded.to(self.device).double() - exact).gather(1, nearest)
            scale = (part**2).sum(1) + lengths[nearest[:, 0]]
            errors.append(((moved[:, 1] - moved[:, 0]).abs() / scale).max())
        return float(torch.stack(errors).max())

    def _latents(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self._quant_conv(self._encoder(pixels.to(self.device).double()))
        return latents
