"""Packed documents in training: the same loss as one by one, and no attention between them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN

from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_chameleon, write_hugging_face
from medley.data.packing import IGNORE_INDEX, build_sequence, collate
from medley.modeling.chameleon import ChameleonForConditionalGeneration, LossOptions, tie_head_norms


@pytest.fixture(scope="module")
def decoder() -> ChameleonForConditionalGeneration:
    folder = GOLDEN / "checkpoints" / "chameleon_7b_layout" / "input"
    return open_checkpoint(folder).decoder(torch.float32)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_packed_loss_equals_the_sum_over_single_documents(
    decoder: Any, sequences: list[Any], tokenizer: Any, weight: float
) -> None:
    vocabulary = tokenizer.vocabulary
    decoder.loss_options = LossOptions(image_weight=weight)
    try:
        parts = (sequences, sequences[:2])
        batch = collate([build_sequence(part, vocabulary) for part in parts], vocabulary)
        packed = decoder(**batch, num_items_in_batch=1).loss
        expected = torch.zeros(())
        for ids in [*sequences, *sequences[:2]]:
            single = build_sequence([ids], vocabulary)
            logits = decoder(single["input_ids"][None]).logits[0, :-1]
            labels = single["labels"][1:]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            is_image = (labels >= 4) & (labels <= 8195)
            expected = expected + (losses * torch.where(is_image, weight, 1.0)).sum()
    finally:
        decoder.loss_options = LossOptions()
    assert torch.allclose(packed, expected, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_document_does_not_change_the_hidden_states_of_the_next(
    decoder: Any, sequences: list[Any], tokenizer: Any, checkpointing: bool
) -> None:
    vocabulary = tokenizer.vocabulary
    first, second = sequences[0], sequences[1]
    changed = first.copy()
    changed[3:-1] = 8750
    decoder.train()
    if checkpointing:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        states = []
        for document in (first, changed):
            packed = build_sequence([document, second], vocabulary)
            ids, positions = packed["input_ids"][None], packed["position_ids"][None]
            output = decoder.model(ids, position_ids=positions, use_cache=False)
            states.append(output.last_hidden_state[0, len(first) :])
    finally:
        decoder.gradient_checkpointing_disable()
        decoder.eval()
    assert torch.allclose(states[0], states[1], atol=1e-5)


def test_an_attention_mask_with_packed_positions_and_labels_raises(decoder: Any) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    positions = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="attention_mask and positions of packed documents"):
        decoder(ids, attention_mask=torch.ones(1, 4), position_ids=positions, labels=ids)


@pytest.mark.parametrize("kernel", ["sdpa", "medley_sdpa"])
def test_padded_batches_have_the_loss_of_their_sequences(
    decoder: Any, sequences: list[Any], kernel: str
) -> None:
    """Left and right padding with a 2-D mask, as transformers' own trainers make batches."""
    before = decoder.config._attn_implementation
    ids = torch.tensor(sequences[0][:12].tolist())
    with torch.inference_mode():
        expected = decoder(ids[None], labels=ids[None]).loss
        try:
            decoder.set_attn_implementation(kernel)
            for pad in ((5, 0), (0, 5)):
                padded = torch.nn.functional.pad(ids[None], pad, value=1)
                mask = torch.nn.functional.pad(torch.ones(1, 12, dtype=torch.int64), pad)
                labels = torch.where(mask.bool(), padded, IGNORE_INDEX)
                labels[0, pad[0]] = IGNORE_INDEX  # predicted from padding
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                loss = decoder(
                    padded, attention_mask=mask, labels=labels, position_ids=positions
                ).loss
                assert torch.allclose(loss, expected, atol=1e-5)
        finally:
            decoder.set_attn_implementation(before)


def test_generating_a_left_padded_batch_equals_single_prompts(
    decoder: Any, sequences: list[Any]
) -> None:
    """With the attention that training leaves set."""
    before = decoder.config._attn_implementation
    ids = torch.tensor(sequences[0][:10].tolist())[None]
    padded = torch.nn.functional.pad(ids, (6, 0), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (6, 0))
    with torch.inference_mode():
        try:
            decoder.set_attn_implementation("medley_sdpa")
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            found = decoder(padded, attention_mask=mask, position_ids=positions).logits[:, 6:]
        finally:
            decoder.set_attn_implementation(before)
        assert torch.allclose(found, decoder(ids).logits, atol=1e-4)


def test_labels_that_are_shifted_give_the_same_loss(decoder: Any, sequences: list[Any]) -> None:
    ids = torch.tensor(sequences[0][:12].tolist())[None]
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)
    with torch.inference_mode():
        assert torch.equal(decoder(ids, shift_labels=shifted).loss, decoder(ids, labels=ids).loss)


def test_outputs_can_be_tuples(decoder: Any) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with torch.inference_mode():
        (loss,) = decoder(ids, labels=ids, return_dict=False)
        logits, *_ = decoder(ids, return_dict=False)
    assert loss.ndim == 0
    assert logits.shape[:2] == (1, 4)


def test_a_fresh_decoder_has_the_initial_scale_and_the_tied_head_of_the_stock_class(
    decoder: Any,
) -> None:
    config = copy.deepcopy(decoder.config)
    torch.manual_seed(0)
    fresh = ChameleonForConditionalGeneration(config)
    assert fresh.lm_head.weight.std().item() == pytest.approx(config.initializer_range, rel=0.05)
    config.tie_word_embeddings = True
    tied = ChameleonForConditionalGeneration(config)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_the_loss_without_labels_is_zero(decoder: Any) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    loss = decoder(ids, labels=torch.full((1, 4), IGNORE_INDEX)).loss
    assert loss.item() == 0


def test_trained_decoder_with_tied_norms_is_writable_in_chameleons_layout(
    sequences: list[Any], tokenizer: Any, tmp_path: Path, layout: Path
) -> None:
    source = open_checkpoint(layout / "input")
    decoder = source.decoder(torch.float32).train()
    tie_head_norms(decoder)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    batch = collate([build_sequence(sequences, tokenizer.vocabulary)], tokenizer.vocabulary)
    for _ in range(3):
        optimizer.zero_grad()
        decoder(**batch).loss.backward()
        optimizer.step()
    original = dict(source.tensors())
    trained = {
        name: tensor.detach().to(original[name].dtype)
        for name, tensor in decoder.state_dict().items()
        if name in original
    }
    norm = "model.layers.0.self_attn.q_norm.weight"
    assert not torch.equal(trained[norm], original[norm])
    write_hugging_face(tmp_path / "hf", source, iter(trained.items()))
    write_chameleon(tmp_path / "pth", open_checkpoint(tmp_path / "hf"), "any", source)
