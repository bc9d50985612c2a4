"""MedMax's own sequence and label rules, where they differ from ours (`--compat medmax`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medley.data.document import DocumentError
from medley.data.vocabulary import TextTokenizer, Vocabulary

if TYPE_CHECKING:
    from torch import Tensor


def encode_medmax(row: Any, tokenizer: TextTokenizer) -> list[int]:
    """One line as MedMax's program makes it: every mark typed in `text` is parsed, the one
    list of codes stands at every placeholder, and no code is checked.
    """
    vocabulary = tokenizer.vocabulary
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DocumentError("'text' is missing or no string")
    codes = row.get("image_tokens") or []
    if not isinstance(codes, list) or not all(type(code) is int for code in codes):
        raise DocumentError(
            "'image_tokens' must be one list of whole numbers (MedMax has one picture)"
        )
    picture = [vocabulary.begin_image, *(c + vocabulary.image_codes.start for c in codes)]
    ids = [vocabulary.bos]
    for token in tokenizer.marked.encode(row["text"], add_special_tokens=False).ids:
        ids += [*picture, vocabulary.end_image] if token == vocabulary.image else [token]
    return [*ids, vocabulary.eos]


def medmax_collate(rows: list[list[int]], vocabulary: Vocabulary) -> dict[str, Tensor]:
    """MedMax's batch, int64 (B, S): padded on the right, prompts masked by the first row's rule.

    If the first row has an end-of-turn mark, the labels of every row up to its own first mark
    are left out, and a row without one raises IndexError; otherwise nothing is masked.
    """
    import torch  # here, so that tokenizing documents starts without it

    from medley.data.packing import IGNORE_INDEX

    longest = max(map(len, rows))
    ids = torch.tensor([row + [vocabulary.pad] * (longest - len(row)) for row in rows])
    mask = (ids != vocabulary.pad).long()
    labels = torch.full_like(ids, IGNORE_INDEX)
    for number, row in enumerate(rows):
        start = 0
        if vocabulary.end_turn in rows[0]:
            if vocabulary.end_turn not in row:
                raise IndexError(f"row {number} has no end-of-turn mark, the first row has one")
            start = row.index(vocabulary.end_turn) + 1
        labels[number, start : len(row)] = ids[number, start : len(row)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
