"""Checkpoints in Hugging Face's layout whose head is the embedding (tie_word_embeddings)."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

import medley
from medley.checkpoints.adapter import load_adapter, merge_difference, merged_tensors
from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_chameleon, write_hugging_face
from medley.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.tensor([[0, 9, 300, 8710, 12, 7]])


def make_tied(folder: Path, head: str) -> Path:
    """A folder whose configuration ties the head; the head is absent, equal, or different."""
    write_hugging_face(folder, open_checkpoint(GOLDEN / "checkpoints/chameleon_7b_layout/input"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    if head == "absent":
        del tensors[HEAD]
    elif head == "equal":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tied(tmp_path_factory.mktemp("tied") / "hf", "absent")


def logits(folder: Path) -> Tensor:
    with torch.inference_mode():
        return open_checkpoint(folder).decoder(torch.float32)(input_ids=IDS).logits


def stock_logits(folder: Path) -> Tensor:
    """transformers' own class, which masks the logits of image tokens."""
    stock = transformers.ChameleonForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        return stock.eval()(input_ids=IDS).logits


def assert_equal_to_stock(found: Tensor, folder: Path) -> None:
    expected = stock_logits(folder)
    is_text = expected > torch.finfo(torch.float32).min
    assert is_text.any()
    torch.testing.assert_close(found[is_text], expected[is_text], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["absent", "equal", "different"])
def test_loads_as_transformers_does(head: str, tmp_path: Path) -> None:
    folder = make_tied(tmp_path / "hf", head)
    decoder = open_checkpoint(folder).decoder(torch.float32)
    shared = decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert shared == (head != "different")
    assert_equal_to_stock(logits(folder), folder)


def test_the_public_function_loads_it(tied: Path) -> None:
    model = medley.load(tied, device="cpu")
    with torch.inference_mode():
        assert torch.equal(model.decoder(input_ids=IDS).logits, logits(tied))


def test_conversions_keep_the_logits(tied: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tied)
    write_chameleon(tmp_path / "pth", source, "7b")
    assert torch.equal(logits(tmp_path / "pth"), logits(tied))
    write_hugging_face(tmp_path / "hf", source)
    assert torch.equal(logits(tmp_path / "hf"), logits(tied))
    assert_equal_to_stock(logits(tied), tmp_path / "hf")


def make_adapter(base: Path, folder: Path, target: str) -> Path:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    peft.get_peft_model(open_checkpoint(base).decoder(torch.float32), config).save_pretrained(
        folder
    )
    return folder


def test_an_adapter_of_the_layers_merges(tied: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tied, tmp_path / "adapter", "q_proj")
    base = open_checkpoint(tied)
    write_hugging_face(tmp_path / "merged", base, merged_tensors(base, adapter))
    merged = open_checkpoint(tmp_path / "merged")
    assert merged.config().tie_word_embeddings
    difference = merge_difference(base, adapter, merged)
    assert difference.largest <= difference.limit(base.dtype(), layers=2)
    assert_equal_to_stock(logits(tmp_path / "merged"), tmp_path / "merged")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_a_tied_tensor_is_applied_and_not_merged(
    target: str, tied: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tied, tmp_path / "adapter", target)
    base = open_checkpoint(tied)
    with torch.inference_mode():
        adapted = load_adapter(base.decoder(torch.float32), adapter)(input_ids=IDS).logits
    assert not torch.equal(adapted, logits(tied))
    with pytest.raises(UserError, match=r"ties to the other .*\(tie_word_embeddings\)"):
        merged_tensors(base, adapter)
