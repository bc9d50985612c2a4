"""Fine-tunes a VQGAN: reconstruction, codebook, perceptual and adversarial losses.

The losses are those of Esser et al. 2021 (arXiv:2012.09841): L1 and LPIPS, the codebook and
commitment terms of van den Oord et al. 2017, and a hinge discriminator. The weight of the
adversarial loss follows the gradients of the decoder's last layer.
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
    """Weights and schedule of the losses.

    Attributes:
        lr: learning rate
        decoder_only: train only the layers after the codebook, which changes no image code
        commitment_weight: weight of the loss that pulls latents to their codebook vectors
        perceptual_weight: weight of LPIPS
        discriminator_weight: factor of the adaptive weight of the adversarial loss
        discriminator_from: first step that trains the discriminator
        adversarial_from: first step whose loss contains the adversarial term
    """

    lr: float
    decoder_only: bool
    commitment_weight: float
    perceptual_weight: float
    discriminator_weight: float
    discriminator_from: int
    adversarial_from: int


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
        torch.manual_seed(seed)  # the discriminator must be equal on every rank
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
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), options.lr, betas
        )
        self.step = 0

    @property
    def device(self) -> torch.device:
        return next(self.vqgan.parameters()).device

    def train_step(self, pixels: Tensor, seed: int) -> tuple[dict[str, float], Tensor]:
        """One step on this rank's pixels (B, 3, H, W). Returns its losses and image codes.

        `seed` determines the dropout, if the VQGAN's configuration has any.
        """
        options = self.options
        torch.manual_seed(seed)
        reconstruction, codes, codebook = self._reconstruct(pixels)
        l1 = (pixels - reconstruction).abs().mean()
        losses = {"l1": l1, "codebook": codebook}
        reconstruction_loss = l1
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(pixels, reconstruction).mean()
            reconstruction_loss = l1 + options.perceptual_weight * losses["perceptual"]
        loss = reconstruction_loss + codebook
        if self.step >= options.adversarial_from:
            self.discriminator.requires_grad_(False)
            adversarial = -self.discriminator(reconstruction).mean()
            balance = self._adaptive_weight(reconstruction_loss, adversarial)
            weight = options.discriminator_weight * balance
            losses |= {"adversarial": adversarial, "adversarial_weight": weight}
            loss = loss + weight * adversarial
        _update(loss, self.trained, self.optimizer)
        if self.step >= options.discriminator_from:
            self.discriminator.requires_grad_(True)
            real = self.discriminator(pixels)
            fake = self.discriminator(reconstruction.detach())
            hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
            losses["discriminator"] = hinge
            _update(hinge, list(self.discriminator.parameters()), self.discriminator_optimizer)
        self.step += 1
        losses["loss"] = loss
        values = torch.stack([value.detach() for value in losses.values()]).tolist()  # one wait
        return dict(zip(losses, values, strict=True)), codes

    def _reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels -> reconstruction, image codes (B, C), codebook and commitment loss."""
        z = self.vqgan.latents(pixels)
        b, width, h, w = z.shape
        codes = self.vqgan.quantize.codes(z.detach())
        chosen = self.vqgan.quantize.embedding(codes).reshape(b, h, w, width).permute(0, 3, 1, 2)
        loss = F.mse_loss(chosen, z.detach())
        loss = loss + self.options.commitment_weight * F.mse_loss(z, chosen.detach())
        quantized = z + (chosen - z).detach()  # straight-through gradient
        return self.vqgan.decode_latents(quantized), codes, loss

    def _adaptive_weight(self, reconstruction_loss: Tensor, adversarial: Tensor) -> Tensor:
        last = self.vqgan.decoder.conv_out.weight
        one, other = (
            torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            for loss in (reconstruction_loss, adversarial)
        )
        return (one / (other + 1e-4)).clamp(0, HIGHEST_ADAPTIVE_WEIGHT).detach()

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "vqgan": self.vqgan.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        if "judge_optimizer" in state:  # alias
            state = {**state, "discriminator_optimizer": state["judge_optimizer"]}  # alias
        self.step = state["step"]
        self.vqgan.load_state_dict(state["vqgan"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        for optimizer in (self.optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = self.options.lr  # replaces the saved learning rate


def decoder_parameters(vqgan: VQGAN) -> list[nn.Parameter]:
    """The parameters after the codebook. Training them changes no image code."""
    return [*vqgan.post_quant_conv.parameters(), *vqgan.decoder.parameters()]


def _update(loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Adam) -> None:
    """One optimizer step with the gradients averaged over all ranks."""
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
