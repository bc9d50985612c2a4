"""Goes on training a VQGAN: reconstruction, codebook, perceptual and adversarial losses.

Losses as Esser et al. 2021 (arXiv:2012.09841): L1 plus LPIPS, the codebook and commitment terms
of van den Oord et al. 2017, a hinge discriminator whose weight follows the gradients of the
decoder's last layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from medley.vqgan.discriminator import PatchDiscriminator
from medley.vqgan.model import VQGAN
from medley.vqgan.perceptual import PerceptualDistance

HIGHEST_ADAPTIVE_WEIGHT = 1e4


@dataclass(frozen=True)
class FinetuningOptions:
    """Weights of the losses, and when the discriminator learns and counts (in steps)."""

    lr: float
    decoder_only: bool
    commitment: float
    perceptual_weight: float
    discriminator_weight: float
    discriminator_from: int  # it learns from here on
    discriminator_counts_from: int


class Finetuner:
    """A VQGAN with its discriminator and optimizers. `state` and `load` make resuming exact."""

    def __init__(
        self,
        vqgan: VQGAN,
        options: FinetuningOptions,
        perceptual: PerceptualDistance | None,
        device: torch.device,
        seed: int,
    ) -> None:
        self.options, self.perceptual = options, perceptual
        self.vqgan = vqgan.to(device).train()
        torch.manual_seed(seed)  # the discriminator must be the same on every rank
        self.discriminator = PatchDiscriminator().to(device)
        self.trained = (
            decoder_parameters(vqgan) if options.decoder_only else list(vqgan.parameters())
        )
        for parameter in vqgan.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trained:
            parameter.requires_grad_(True)
        betas = (0.5, 0.9)
        self.optimizer = torch.optim.Adam(self.trained, options.lr, betas)
        self.judge_optimizer = torch.optim.Adam(self.discriminator.parameters(), options.lr, betas)
        self.step = 0

    def train_on(self, pixels: Tensor, seed: int) -> tuple[dict[str, float], Tensor]:
        """One step on pixels (B, 3, H, W), this rank's share; gives its losses and codes.

        `seed` decides what dropout the configuration asks for.
        """
        options = self.options
        torch.manual_seed(seed)
        reconstruction, codes, codebook = self._reconstruct(pixels)
        l1 = (pixels - reconstruction).abs().mean()
        losses = {"l1": l1, "codebook": codebook}
        closeness = l1
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(pixels, reconstruction).mean()
            closeness = l1 + options.perceptual_weight * losses["perceptual"]
        loss = closeness + codebook
        if self.step >= options.discriminator_counts_from:
            self.discriminator.requires_grad_(False)
            adversarial = -self.discriminator(reconstruction).mean()
            weight = options.discriminator_weight * self._balance(closeness, adversarial)
            losses |= {"adversarial": adversarial, "adversarial_weight": weight}
            loss = loss + weight * adversarial
        _descend(loss, self.trained, self.optimizer)
        if self.step >= options.discriminator_from:
            self.discriminator.requires_grad_(True)
            real, drawn = self.discriminator(pixels), self.discriminator(reconstruction.detach())
            judging = (F.relu(1 - real).mean() + F.relu(1 + drawn).mean()) / 2
            losses["discriminator"] = judging
            _descend(judging, list(self.discriminator.parameters()), self.judge_optimizer)
        self.step += 1
        losses["loss"] = loss
        return {name: float(value.detach()) for name, value in losses.items()}, codes

    def _reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels -> reconstruction, codes (B, C), and the loss that moves codes and latents."""
        z = self.vqgan.latents(pixels)
        b, width, h, w = z.shape
        codes = self.vqgan.quantize.codes(z.detach())
        chosen = self.vqgan.quantize.embedding(codes).reshape(b, h, w, width).permute(0, 3, 1, 2)
        loss = F.mse_loss(chosen, z.detach())
        loss = loss + self.options.commitment * F.mse_loss(z, chosen.detach())
        quantized = z + (chosen - z).detach()  # the gradient passes straight through
        return self.vqgan.decode_latents(quantized), codes, loss

    def _balance(self, closeness: Tensor, adversarial: Tensor) -> Tensor:
        last = self.vqgan.decoder.conv_out.weight
        one, other = (
            torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            for loss in (closeness, adversarial)
        )
        return (one / (other + 1e-4)).clamp(0, HIGHEST_ADAPTIVE_WEIGHT).detach()

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "vqgan": self.vqgan.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "judge_optimizer": self.judge_optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.vqgan.load_state_dict(state["vqgan"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.judge_optimizer.load_state_dict(state["judge_optimizer"])
        for optimizer in (self.optimizer, self.judge_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = self.options.lr  # the state brings the one it was saved with


def decoder_parameters(vqgan: VQGAN) -> list[nn.Parameter]:
    """What may learn without changing a single code: everything behind the codebook."""
    return [*vqgan.post_quant_conv.parameters(), *vqgan.decoder.parameters()]


def _descend(loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Adam) -> None:
    """A step down the mean of the gradients of all ranks."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if dist.is_initialized():
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(
            gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))
    optimizer.step()
