"""Options of the embedded model's recipe, and its learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from medley.errors import UserError

CODES = 8192  # image codes in Chameleon's vocabulary layout


@dataclass(frozen=True)
class Options:
    """Makes the embedded model from scratch.

    Args:
        output: folder of the new checkpoint; complete parts in it are kept
        seed: seed of data and weights
        vqgan_steps: optimizer steps of the VQGAN
        vqgan_batch: images per step
        vqgan_lr: peak learning rate of the VQGAN
        active_codes: number of the 8192 image codes that are used
        codebook_start: first step with quantized latents
        merges: number of merges of the byte-level BPE
        width: width of the decoder
        layers: number of layers of the decoder
        heads: number of attention heads of the decoder
        context: maximum sequence length of the decoder
        decoder_steps: optimizer steps of the decoder
        decoder_rows: packed sequences per step
        row_length: tokens of a packed sequence
        decoder_lr: peak learning rate of the decoder's embeddings, head and norms (AdamW)
        matrix_lr: peak learning rate of the matrices in its layers (Muon)
    """

    output: Path = Path("build/tiny")
    seed: int = 0
    vqgan_steps: int = 5000
    vqgan_batch: int = 16
    vqgan_lr: float = 1e-3
    active_codes: int = 1024
    codebook_start: int = 300
    merges: int = 1000
    width: int = 192
    layers: int = 6
    heads: int = 6
    context: int = 4096
    decoder_steps: int = 5600
    decoder_rows: int = 6
    row_length: int = 640
    decoder_lr: float = 3e-3
    matrix_lr: float = 3e-3

    def __post_init__(self) -> None:
        if self.vqgan_steps <= self.codebook_start:
            raise UserError(
                f"--vqgan_steps {self.vqgan_steps}: Expected more than --codebook_start "
                f"{self.codebook_start}, since the codebook is trained after that step."
            )
        if self.decoder_steps < 1:
            raise UserError(f"--decoder_steps {self.decoder_steps}: Expected 1 or more.")


def cosine(step: int, steps: int, warmup: int) -> float:
    """Fraction of the peak learning rate: linear warmup, then a cosine decay to 2%."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
