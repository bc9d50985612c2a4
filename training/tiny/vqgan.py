"""The embedded VQGAN, trained on phantoms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from medley.phantoms import VQGAN_MODALITIES, Phantom
from medley.vqgan import VQGAN, VQGANConfig
from medley.vqgan.files import build_vqgan
from medley.vqgan.losses import CodebookAverage, training_step
from training.tiny.recipe import CODES, Options, cosine

FINDING_WEIGHT = 3.0  # extra weight of the pixels that a finding changes


def training_images(rng: np.random.Generator, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Phantoms (count, 3, size, size) in [-1, 1], and pixel weights (count, 1, size, size).

    Pixels that a finding changes have a larger weight. 30% of the images have modified contrast or
    colors, or are shifted and mirrored, so that the codebook also covers other images.
    """
    pixels = np.empty((count, 3, size, size), np.float32)
    weights = np.ones((count, 1, size, size), np.float32)
    for index in range(count):
        scan = Phantom.random(rng, VQGAN_MODALITIES)
        image = scan.render(size).astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
        kind = rng.random()
        if kind < 0.3:
            image = image * rng.uniform(0.4, 1.0) * rng.choice([-1, 1])
            image = np.clip(image + rng.uniform(-0.4, 0.4), -1, 1)
        else:
            clean = replace(scan, findings=()).render(size).astype(np.float32) / 127.5 - 1
            changed = np.abs(image - clean.transpose(2, 0, 1)).max(0) > 0.2
            weights[index, 0] += FINDING_WEIGHT * changed
        if kind < 0.15:
            image = np.roll(image, rng.integers(-16, 17, 2), (1, 2))[:, :, :: rng.choice([-1, 1])]
        if kind < 0.05:
            tint = rng.uniform(0.5, 1, (3, 1, 1)).astype(np.float32)
            shift = rng.uniform(-0.3, 0.3, (3, 1, 1)).astype(np.float32)
            image = np.clip(image * tint + shift, -1, 1)
        pixels[index] = image
    return torch.from_numpy(pixels), torch.from_numpy(weights)


def truncate_codebook(vqgan: VQGAN, codes: int) -> VQGAN:
    """The same VQGAN with only the first vectors of its codebook.

    The encoder never emits the other codes, and decoding one would give arbitrary pixels.
    """
    config = replace(vqgan.config, n_embed=codes)
    state = vqgan.state_dict()
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"][:codes].clone()
    return build_vqgan(config, state, "the trained VQGAN")


def train_vqgan(options: Options, log: list[dict[str, float]]) -> VQGAN:
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    vqgan = VQGAN(
        VQGANConfig(
            ch=32, ch_mult=(1, 1, 2, 3), num_res_blocks=1, resolution=64,
            z_channels=32, embed_dim=8, n_embed=CODES,
        )
    )  # fmt: skip
    weights = [p for n, p in vqgan.named_parameters() if not n.startswith("quantize.")]
    optimizer = torch.optim.AdamW(weights, lr=1.0, weight_decay=0, betas=(0.9, 0.99))
    average: CodebookAverage | None = None
    recent: list[Tensor] = []
    for step in range(options.vqgan_steps):
        for group in optimizer.param_groups:
            group["lr"] = options.vqgan_lr * cosine(step, options.vqgan_steps, 100)
        pixels, pixel_weights = training_images(rng, options.vqgan_batch, vqgan.config.resolution)
        with torch.autocast("cpu", torch.bfloat16):
            result = training_step(vqgan, pixels, average is not None, 0.5, pixel_weights)
        optimizer.zero_grad()
        result.loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if average is not None:
            average.update(vqgan, result.latents, result.codes)
        elif step < options.codebook_start:
            recent = [*recent[-7:], result.latents]
        else:
            average = CodebookAverage.start(
                vqgan, torch.cat(recent), options.active_codes, generator
            )
        if step % 50 == 0 or step == options.vqgan_steps - 1:
            error = float((result.reconstruction.detach() - pixels).square().mean())
            row = {
                "step": step,
                "loss": float(result.loss.detach()),
                "psnr": -10 * math.log10(error / 4),
            }
            log.append(row)
            print(
                f"vqgan   step {step:5d}  loss {row['loss']:.4f}  PSNR {row['psnr']:.2f} dB",
                flush=True,
            )
    return vqgan.eval()
