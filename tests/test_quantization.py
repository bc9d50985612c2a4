"""Layers in 4 and 8 bits: reading, drawing, adapters, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import medley
from medley.checkpoints.checkpoint import open_checkpoint
from medley.errors import UserError
from medley.trainer.parameters import trainable_model

GREEDY = {"text_greedy": True, "repetition_penalty": 1.0}


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantised_layers_read_and_draw(kind: Any, tmp_path: Path) -> None:
    plain = medley.load("tiny", device="cpu")
    model = medley.load("tiny", device="cpu", quantize=kind)
    assert model.engine.runner.fused is None
    ids = torch.tensor([plain.encode_prompt(["What does this scan show?"])])
    with torch.inference_mode():
        one, other = plain.decoder(ids).logits, model.decoder(ids).logits
    text = list(plain.vocabulary.text_tokens)
    likeness = torch.cosine_similarity(one[0, -1, text], other[0, -1, text], dim=0)
    assert float(likeness) > 0.8
    assert not torch.allclose(one, other, atol=1e-5)
    assert len(model.generate(["Show me a CT scan."], mode="image", max_new_tokens=70)) == 1
    small, large = (
        sum(p.nbytes for p in m.decoder.model.layers.parameters()) for m in (model, plain)
    )
    assert small < 0.4 * large


def test_an_adapter_lies_over_quantised_layers(tmp_path: Path) -> None:
    base = open_checkpoint("tiny")
    marks = base.text_tokenizer().vocabulary
    trained = trainable_model(
        base.decoder(torch.float32),
        "lora",
        marks,
        "tiny",
        rank=2,
        alpha=4,
        dropout=0.0,
        targets=["q_proj", "up_proj"],
    )
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    trained.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[0, 8720, 8730, 8710]])
    with torch.inference_mode():
        wanted = trained.eval()(input_ids=ids).logits
        whole = medley.load(tmp_path / "adapter", device="cpu")
        assert torch.allclose(whole.decoder(input_ids=ids).logits, wanted, atol=1e-4)
        small = medley.load(tmp_path / "adapter", device="cpu", quantize="8bit")
        found = small.decoder(input_ids=ids).logits
    likeness = torch.cosine_similarity(found[0, -1], wanted[0, -1], dim=0)
    assert float(likeness) > 0.8
    assert whole.engine.runner.fused is None


def test_quantising_without_the_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"medley-mm\[quantize\]"):
        medley.load("tiny", device="cpu", quantize="4bit")
