"""Sequences to rows: documents packed whole, positions restarting, labels by answer span.

Shapes: B rows of a batch, S row length.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappush, heapreplace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medley.data.document import assistant_spans
from medley.data.vocabulary import Vocabulary
from medley.errors import UserError

TrainOn = Literal["answers", "everything", "pictures"]
IGNORE_INDEX = -100  # the label that a loss passes over, as torch's cross_entropy has it


class SequenceTooLong(UserError):
    """A document that is longer than a row."""


def pack_balanced(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Places whole documents into rows: longest first, each into the emptiest row.

    There are as many rows as the tokens need at the least, and another one whenever a document
    finds no room. That is about as few as best fit makes, but best fit puts documents of like
    lengths together, as batches that a model learns less from; here every row gets long ones
    and short ones.

    Gives lists of indices into `lengths`. Raises SequenceTooLong for a document that no row
    holds.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > row_length:
        raise SequenceTooLong(
            f"document {order[0]} has {lengths[order[0]]} tokens, a row {row_length}: raise "
            f"--max_length to {lengths[order[0]]} at least, or drop such documents when tokenizing "
            "(--overflow)"
        )
    rows: list[list[int]] = [[] for _ in range(-(-sum(lengths) // row_length))]
    used = [(0, row) for row in range(len(rows))]  # a heap: (tokens, row)
    for index in order:
        if used[0][0] + lengths[index] > row_length:
            heappush(used, (0, len(rows)))
            rows.append([])
        tokens, row = used[0]
        heapreplace(used, (tokens + lengths[index], row))
        rows[row].append(index)
    return [sorted(row) for row in rows]


def build_labels(
    ids: NDArray[np.int64], vocabulary: Vocabulary, learn: TrainOn = "answers"
) -> NDArray[np.int64]:
    """Labels (S,) of one document, not shifted: learned ids stand, the rest is IGNORED.

    Learned are the assistant's turns with their closing marks, or everything, or pictures
    only (codes with both marks, wherever they stand).
    """
    learned = np.zeros(len(ids), bool)
    if learn == "pictures":
        begun = np.cumsum(ids == vocabulary.begin_image)
        ended = np.cumsum(ids == vocabulary.end_image)
        learned = (begun > ended) | (ids == vocabulary.end_image)
    elif learn == "everything":
        learned[:] = True
    else:
        for start, end in assistant_spans(ids.tolist(), vocabulary):
            learned[start:end] = True
    learned[0] = False  # nothing predicts a document's first token
    return np.where(learned, ids, IGNORE_INDEX)


def build_sequence(
    documents: Sequence[NDArray[np.int64]], vocabulary: Vocabulary, learn: TrainOn = "answers"
) -> dict[str, Tensor]:
    """One row of documents: input_ids, position_ids and labels, each int64 (S,).

    Positions restart at every document, which is what keeps attention inside it.
    """
    ids = np.concatenate(documents)
    positions = np.concatenate([np.arange(len(d), dtype=np.int64) for d in documents])
    labels = np.concatenate([build_labels(d, vocabulary, learn) for d in documents])
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
    }


def collate(rows: Sequence[dict[str, Tensor]], vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Rows of any lengths -> tensors (B, S), padded on the right.

    Padding is a "document" of its own, with positions that restart, and carries no label.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": vocabulary.pad, "labels": IGNORE_INDEX}

    def pad(name: str, row: Tensor) -> Tensor:
        rest = longest - len(row)
        if name == "position_ids":
            return torch.cat([row, torch.arange(rest)])
        return torch.cat([row, torch.full((rest,), padding[name], dtype=row.dtype)])

    return {name: torch.stack([pad(name, row[name]) for row in rows]) for name in rows[0]}
