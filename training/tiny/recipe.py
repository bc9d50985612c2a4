"""What the embedded model is made with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from medley.errors import UserError

CODES = 8192  # the layout of Chameleon's vocabulary, kept whole


@dataclass(frozen=True)
class Options:
    """Makes the embedded model from nothing.

    Args:
        output: folder of the new checkpoint; parts that are there are kept
        seed: seed of data and weights
        vqgan_steps: optimizer steps of the VQGAN
        vqgan_batch: pictures of a step
        vqgan_lr: peak learning rate of the VQGAN
        active_codes: codes of the 8192 that are put to use
        codebook_start: step from which on latents are quantised
        merges: merges of the byte-level BPE
        width: width of the decoder
        layers: layers of the decoder
        heads: heads of the decoder
        context: longest sequence of the decoder
        decoder_steps: optimizer steps of the decoder
        decoder_rows: packed rows of a step
        row_length: tokens of a packed row
        decoder_lr: peak learning rate of the decoder's embeddings, head and norms (AdamW)
        matrix_lr: peak learning rate of its layers' matrices (Muon)
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
                f"--vqgan_steps {self.vqgan_steps}: expected more than --codebook_start "
                f"{self.codebook_start}, or no codebook is learned"
            )
        if self.decoder_steps < 1:
            raise UserError(f"--decoder_steps {self.decoder_steps}: expected 1 or more")


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
