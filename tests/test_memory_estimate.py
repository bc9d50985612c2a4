"""The memory estimate of a model before it is loaded."""

from __future__ import annotations

import pytest
import torch

import medley
from medley.checkpoints.checkpoint import open_checkpoint
from medley.errors import UserError
from medley.inference.memory import MemoryEstimate


def test_memory_estimate_equals_the_loaded_weights() -> None:
    model = medley.load("tiny", device="cpu")
    checkpoint, cpu = open_checkpoint("tiny").config(), torch.device("cpu")
    estimate = MemoryEstimate.of(checkpoint, torch.float32, None, cpu)
    decoder = model.engine.decoder
    parts = [*decoder.model.layers, decoder.model.embed_tokens, decoder.lm_head]
    weights = sum(p.nbytes for part in parts for p in part.parameters())
    packed = weights - decoder.model.embed_tokens.weight.nbytes
    assert estimate.weights == pytest.approx(weights + packed, rel=0.01)
    config = decoder.config
    assert estimate.per_token == 2 * config.num_hidden_layers * config.hidden_size * 4
    summary = estimate.summary(4, 1 << 30)
    assert f"{estimate.per_token / 1e3:.1f} kB per token" in summary
    assert "4 sequences" in summary
    quantized = MemoryEstimate.of(checkpoint, torch.float32, "8bit", cpu)
    assert quantized.weights < 0.7 * weights
    smaller = MemoryEstimate.smaller(checkpoint, torch.float32, None, cpu)
    with pytest.raises(UserError, match=r"0\.0 GB free\. Nothing smaller fits"):
        estimate.check(1 << 20, cpu, smaller)
