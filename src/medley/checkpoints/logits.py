"""Compares the logits of two models, and judges whether rounding explains their difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from medley.checkpoints.checkpoint import Checkpoint

_FLOAT32_NOISE = 1e-5  # of the logits' size: the order of summation


@dataclass(frozen=True)
class LogitDifference:
    """The largest absolute difference of float32 logits, and the largest absolute logit."""

    largest: float
    size: float

    def limit(self, rounded_to: torch.dtype | None = None, layers: int = 1) -> float:
        """The largest difference that rounding explains.

        Args:
            rounded_to: dtype that the weights of one of the models were rounded to; None if both
                have the same weights
            layers: number of layers; independent errors grow with its root
        """
        noise = _FLOAT32_NOISE
        if rounded_to is not None:
            noise = max(noise, torch.finfo(rounded_to).eps * math.sqrt(layers))
        return noise * max(self.size, 1.0)


def compare_logits(expected: Tensor, found: Tensor) -> LogitDifference:
    """A difference that is infinite if the shapes differ or a logit is not finite."""
    size = float(expected.abs().max())
    if expected.shape != found.shape or not bool((expected - found).isfinite().all()):
        return LogitDifference(math.inf, size)
    return LogitDifference(float((expected - found).abs().max()), size)


def random_ids(checkpoint: Checkpoint) -> Tensor:
    """int64 (2, 32): the same random ids on each call."""
    generator = torch.Generator().manual_seed(0)
    size = checkpoint.text_tokenizer().vocabulary.size
    return torch.randint(size, (2, 32), generator=generator)


def logit_difference(one: Checkpoint, other: Checkpoint) -> LogitDifference:
    """The difference of two checkpoints in float32, for the same random ids."""
    ids = random_ids(one)
    with torch.inference_mode():  # one decoder in memory at a time
        logits = [c.decoder(torch.float32)(input_ids=ids).logits for c in (one, other)]
    return compare_logits(logits[0], logits[1])
