"""LPIPS: a perceptual distance between images, from the features of VGG16 (Zhang et al. 2018).

The weights are in two files, which must be downloaded beforehand: torchvision's VGG16
(`features.0.weight`, ...) and the linear heads of LPIPS v0.1 (`lin0.model.1.weight`, ...).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medley.errors import UserError
from medley.utils.tensor_files import load_tensors

# Convolutions of VGG16 by stage, each (index in torchvision's `features`, output channels).
_STAGES = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
# Mean and standard deviation by which LPIPS normalizes pixels in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class PerceptualDistance(nn.Module):
    """Two batches of pixels (B, 3, H, W) in [-1, 1] -> distances (B,)."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        self.heads = nn.ParameterList()
        width = 3
        for stage in _STAGES:
            for layer, out in stage:
                self.features[str(layer)] = nn.Conv2d(width, out, 3, padding=1)
                width = out
            self.heads.append(torch.zeros(width))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))

    @classmethod
    def from_files(cls, vgg: Path, linear: Path) -> PerceptualDistance:
        """Reads both files. Raises UserError that names a missing tensor and its file."""
        distance = cls()
        backbone, heads = load_tensors(vgg), load_tensors(linear)
        with torch.no_grad():
            for layer, convolution in distance.features.items():
                assert isinstance(convolution, nn.Conv2d)
                assert convolution.bias is not None
                for name, target in (("weight", convolution.weight), ("bias", convolution.bias)):
                    _copy(target, backbone, f"features.{layer}.{name}", vgg)
            for index, head in enumerate(distance.heads):
                _copy(head, heads, f"lin{index}.model.1.weight", linear)
        return distance.eval().requires_grad_(False)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        total = one.new_zeros(len(one))
        x, y = ((p - self.shift) / self.scale for p in (one, other))
        for index, stage in enumerate(_STAGES):
            if index:
                x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
            for layer, _ in stage:
                convolution = self.features[str(layer)]
                x, y = F.relu(convolution(x)), F.relu(convolution(y))
            difference = (_normalize(x) - _normalize(y)) ** 2
            weighted = difference * self.heads[index].view(1, -1, 1, 1)
            total = total + weighted.sum(1).mean((1, 2))
        return total


def _normalize(x: Tensor) -> Tensor:
    """Features (B, K, H, W), scaled to length 1 at every position."""
    return x / (x.norm(dim=1, keepdim=True) + 1e-10)


def _copy(target: Tensor, tensors: dict[str, Tensor], name: str, where: Path) -> None:
    found = tensors.get(name)
    if found is None or found.numel() != target.numel():
        shape = None if found is None else tuple(found.shape)
        raise UserError(
            f"{where}: {name} has the wrong shape (got {shape}, expected {tuple(target.shape)})."
        )
    target.copy_(found.reshape(target.shape))
