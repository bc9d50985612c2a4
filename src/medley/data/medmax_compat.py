"""MedMax's token sequences and labels, where they differ from Medley's (`--compat medmax`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medley.data.document import DocumentError
from medley.data.vocabulary import TextTokenizer, Vocabulary

if TYPE_CHECKING:
    from torch import Tensor


def encode_medmax(row: Any, tokenizer: TextTokenizer) -> list[int]:
    """One line -> the ids that MedMax's program writes.

    Special tokens in `text` are parsed. The line has one list of image codes, which is inserted at
    every placeholder. The codes are not checked.
    """
    vocabulary = tokenizer.vocabulary
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DocumentError("'text' is missing or not a string.")
    codes = row.get("image_tokens") or []
    if not isinstance(codes, list) or not all(type(code) is int for code in codes):
        raise DocumentError(
            "'image_tokens' must be one list of integers, because a MedMax document has one image."
        )
    image = [vocabulary.begin_image, *(c + vocabulary.image_codes.start for c in codes)]
    ids = [vocabulary.bos]
    for token in tokenizer.raw_tokenizer.encode(row["text"], add_special_tokens=False).ids:
        is_image = token == vocabulary.image_placeholder
        ids += [*image, vocabulary.end_image] if is_image else [token]
    return [*ids, vocabulary.eos]


def medmax_collate(sequences: list[list[int]], vocabulary: Vocabulary) -> dict[str, Tensor]:
    """MedMax's batch: input_ids, attention_mask and labels, int64 (B, S), padded on the right.

    The first sequence decides on the labels of all sequences. If it has an end-of-turn token, each
    sequence is trained on after its own first end-of-turn token, and a sequence without one raises
    IndexError. Otherwise all tokens are trained on.
    """
    import torch  # here: tokenizing documents needs no torch

    from medley.data.packing import IGNORE_INDEX

    longest = max(map(len, sequences))
    ids = torch.tensor([own + [vocabulary.pad] * (longest - len(own)) for own in sequences])
    mask = (ids != vocabulary.pad).long()
    labels = torch.full_like(ids, IGNORE_INDEX)
    for number, own in enumerate(sequences):
        start = 0
        if vocabulary.end_turn in sequences[0]:
            if vocabulary.end_turn not in own:
                raise IndexError(
                    f"Sequence {number} has no end-of-turn token, but the first sequence has one."
                )
            start = own.index(vocabulary.end_turn) + 1
        labels[number, start : len(own)] = ids[number, start : len(own)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
