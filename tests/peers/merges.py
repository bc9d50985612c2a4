"""Merges of adapters with two options of PEFT at once: as PEFT merges them, or refused by name.

tests/test_adapter_options.py has each option alone. Not collected by `make test`.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapter_options import APPLIED, MERGED, REFUSED, logits, train

from medley.checkpoints.adapter import load_adapter, merged_tensors
from medley.checkpoints.checkpoint import Checkpoint, open_checkpoint
from medley.errors import UserError

OPTIONS = {**MERGED, **REFUSED, **APPLIED}
BASE = Path(__file__).parents[1] / "golden" / "checkpoints" / "chameleon_7b_layout" / "input"


def _pairs() -> list[tuple[str, str]]:
    """60 pairs of options that set different fields."""
    pairs = [
        pair
        for pair in itertools.combinations(sorted(OPTIONS), 2)
        if not OPTIONS[pair[0]].keys() & OPTIONS[pair[1]].keys()
    ]
    return sorted(random.Random(0).sample(pairs, 60))


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return open_checkpoint(BASE)


@pytest.mark.parametrize("pair", _pairs(), ids=" + ".join)
def test_pair_merges_as_peft_merges_it_or_is_refused(
    pair: tuple[str, str], base: Checkpoint, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**OPTIONS[pair[0]], **OPTIONS[pair[1]]}
    try:
        model = train(base, tmp_path, options)
    except Exception as error:
        pytest.skip(f"PEFT refuses the pair: {error}")
    trained = logits(model)
    try:
        applied = logits(load_adapter(base.decoder(torch.float32), tmp_path))
        assert torch.allclose(applied, trained, atol=1e-4)
    except UserError as error:
        assert "Unsupported" in str(error) or "pattern" in str(error)
    try:
        found = dict(merged_tensors(base, tmp_path))
    except UserError as error:
        assert "Unsupported" in str(error) or "pattern" in str(error)
        return
    assert found
    expected = model.merge_and_unload().state_dict()
    for name, tensor in found.items():
        rounded = expected[name].to(tensor.dtype).float()
        assert torch.allclose(tensor.float(), rounded, rtol=2**-7, atol=1e-6), name
