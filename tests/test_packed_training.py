"""Packed documents in training: as one by one, and blind to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_chameleon, write_hugging_face
from medley.data.packing import IGNORE_INDEX, build_sequence, collate
from medley.modeling.chameleon import ChameleonForConditionalGeneration, LossOptions, tie_head_norms


@pytest.fixture(scope="module")
def decoder() -> ChameleonForConditionalGeneration:
    folder = Path(__file__).parent / "golden" / "checkpoints" / "chameleon_7b_layout" / "input"
    return open_checkpoint(folder).decoder(torch.float32)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_packed_loss_equals_documents_one_by_one(
    decoder: Any, sequences: list[Any], tokenizer: Any, weight: float
) -> None:
    vocabulary = tokenizer.vocabulary
    decoder.loss_options = LossOptions(image_weight=weight)
    try:
        row = collate(
            [build_sequence(sequences, vocabulary), build_sequence(sequences[:2], vocabulary)],
            vocabulary,
        )
        packed = decoder(**row, num_items_in_batch=1).loss
        alone = torch.zeros(())
        for ids in [*sequences, *sequences[:2]]:
            single = build_sequence([ids], vocabulary)
            logits = decoder(single["input_ids"][None]).logits[0, :-1]
            labels = single["labels"][1:]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            image = (labels >= 4) & (labels <= 8195)
            alone = alone + (losses * torch.where(image, weight, 1.0)).sum()
    finally:
        decoder.loss_options = LossOptions()
    assert torch.allclose(packed, alone, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_do_not_see_each_other(
    decoder: Any, sequences: list[Any], tokenizer: Any, checkpointing: bool
) -> None:
    """Changing one document of a row leaves the loss gradient of the others' ids alone."""
    vocabulary = tokenizer.vocabulary
    first, second = sequences[0], sequences[1]
    changed = first.copy()
    changed[3:-1] = 8750
    decoder.train()
    if checkpointing:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        hidden = [
            decoder.model(
                row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False
            ).last_hidden_state[0, len(first) :]
            for row in (build_sequence([a, second], vocabulary) for a in (first, changed))
        ]
    finally:
        decoder.gradient_checkpointing_disable()
        decoder.eval()
    assert torch.allclose(hidden[0], hidden[1], atol=1e-5)


def test_a_mask_while_training_is_refused(decoder: Any) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention_mask"):
        decoder(ids, attention_mask=torch.ones(1, 4), labels=ids)


def test_rows_without_labels_train_to_zero(decoder: Any) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    loss = decoder(ids, labels=torch.full((1, 4), IGNORE_INDEX)).loss
    assert loss.item() == 0


def test_tied_norms_stay_writeable_in_chameleons_layout(
    sequences: list[Any], tokenizer: Any, tmp_path: Path, layout: Path
) -> None:
    source = open_checkpoint(layout / "input")
    decoder = source.decoder(torch.float32).train()
    tie_head_norms(decoder)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    row = collate([build_sequence(sequences, tokenizer.vocabulary)], tokenizer.vocabulary)
    for _ in range(3):
        optimizer.zero_grad()
        decoder(**row).loss.backward()
        optimizer.step()
    names = dict(source.tensors())
    trained = {
        n: t.detach().to(names[n].dtype) for n, t in decoder.state_dict().items() if n in names
    }
    name = "model.layers.0.self_attn.q_norm.weight"
    assert not torch.equal(trained[name], names[name])
    write_hugging_face(tmp_path / "hf", source, iter(trained.items()))
    write_chameleon(tmp_path / "pth", open_checkpoint(tmp_path / "hf"), "any", source)
