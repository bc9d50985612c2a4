"""Metrics of a VQGAN, LPIPS, and the discriminator."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from medley.errors import UserError
from medley.vqgan.discriminator import PatchDiscriminator
from medley.vqgan.metrics import CodeUsage, psnr, ssim
from medley.vqgan.perceptual import PerceptualDistance


def test_psnr_and_ssim() -> None:
    one = torch.zeros(2, 3, 16, 16)
    other = one.clone()
    other[1] += 0.2  # a tenth of the range: 20 dB
    assert torch.allclose(psnr(one, other), torch.tensor([100.0, 20.0]))
    same = torch.rand(1, 3, 16, 16) * 2 - 1
    assert float(ssim(same, same)) == pytest.approx(1, abs=1e-4)
    assert float(ssim(same, -same)) < 0


def test_usage_and_perplexity() -> None:
    usage = CodeUsage(8)
    usage.add(torch.tensor([[0, 1], [2, 3]]))
    assert usage.summary() == {
        "codes_used": 4, "codes_dead": 4, "usage": 0.5, "perplexity": pytest.approx(4)
    }  # fmt: skip
    usage.add(torch.zeros(1000, dtype=torch.int64))
    assert 1 < usage.perplexity < 1.1
    assert CodeUsage(8).perplexity == 1


def test_lpips_follows_its_formula(tmp_path: Path) -> None:
    torch.manual_seed(0)
    distance = PerceptualDistance()
    state = {f"features.{p}.{n}": t for p, m in distance.features.items()
             for n, t in m.state_dict().items()}  # fmt: skip
    heads = {f"lin{i}.model.1.weight": torch.rand(1, len(h), 1, 1)
             for i, h in enumerate(distance.heads)}  # fmt: skip
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    torch.save(heads, tmp_path / "lin.pth")
    loaded = PerceptualDistance.from_files(tmp_path / "vgg.pth", tmp_path / "lin.pth")
    one, other = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded(one, one), torch.zeros(2))
    assert torch.allclose(loaded(one, other), loaded(other, one))

    def features(x: torch.Tensor) -> list[torch.Tensor]:
        """The first stage, computed by hand."""
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        for layer in (0, 2):
            weights = state[f"features.{layer}.weight"], state[f"features.{layer}.bias"]
            x = torch.relu(torch.nn.functional.conv2d(x, *weights, padding=1))
        return [x / x.norm(dim=1, keepdim=True)]

    first = ((features(one)[0] - features(other)[0]) ** 2 * heads["lin0.model.1.weight"]).sum(1)
    with torch.no_grad():
        for head in loaded.heads[1:]:
            head.zero_()
    assert torch.allclose(loaded(one, other), first.mean((1, 2)), atol=1e-6)
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match=r"empty\.pth: features\.0\.weight"):
        PerceptualDistance.from_files(tmp_path / "empty.pth", tmp_path / "lin.pth")


def test_discriminator_scores_do_not_depend_on_the_batch() -> None:
    discriminator = PatchDiscriminator(width=32)
    pixels = torch.rand(3, 3, 64, 64)
    scores = discriminator(pixels)
    assert scores.shape == (3, 1, 6, 6)
    assert torch.allclose(discriminator(pixels[:1]), scores[:1], atol=1e-5)
    assert math.isfinite(float(scores.detach().sum()))
