"""Layers in 4 and 8 bits: generation, adapters, missing library."""

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
def test_quantized_layers_generate_text_and_images(kind: Any) -> None:
    plain = medley.load("tiny", device="cpu")
    model = medley.load("tiny", device="cpu", quantize=kind)
    assert model.engine.runner.fused is None
    ids = torch.tensor([plain.encode_prompt(["What does this scan show?"])])
    with torch.inference_mode():
        one, other = plain.decoder(ids).logits, model.decoder(ids).logits
    text = list(plain.vocabulary.text_tokens)
    similarity = torch.cosine_similarity(one[0, -1, text], other[0, -1, text], dim=0)
    assert float(similarity) > 0.8
    assert not torch.allclose(one, other, atol=1e-5)
    assert len(model.generate(["Show me a CT scan."], mode="image", max_new_tokens=70)) == 1
    small, large = (
        sum(p.nbytes for p in m.decoder.model.layers.parameters()) for m in (model, plain)
    )
    assert small < 0.4 * large


def test_an_adapter_applies_to_quantized_layers(tmp_path: Path) -> None:
    base = open_checkpoint("tiny")
    trained = trainable_model(
        base.decoder(torch.float32),
        "lora",
        base.text_tokenizer().vocabulary,
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
        expected = trained.eval()(input_ids=ids).logits
        plain = medley.load(tmp_path / "adapter", device="cpu")
        assert torch.allclose(plain.decoder(input_ids=ids).logits, expected, atol=1e-4)
        quantized = medley.load(tmp_path / "adapter", device="cpu", quantize="8bit")
        found = quantized.decoder(input_ids=ids).logits
    similarity = torch.cosine_similarity(found[0, -1], expected[0, -1], dim=0)
    assert float(similarity) > 0.8
    assert plain.engine.runner.fused is not None  # merged


def test_quantization_without_bitsandbytes_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"medley-mm\[quantize\]"):
        medley.load("tiny", device="cpu", quantize="4bit")
