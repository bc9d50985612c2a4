"""Packing: complete documents in sequences of limited length, with positions and labels.

Shapes: B packed sequences of a batch, S sequence length.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from heapq import heappush, heapreplace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medley.data.document import assistant_spans, turn_spans
from medley.data.vocabulary import Vocabulary
from medley.errors import UserError

TrainOn = Literal["assistant", "all", "images"]
IGNORE_INDEX = -100  # a token with this label is excluded from the loss, as in torch


class SequenceTooLong(UserError):
    """A document that is longer than a packed sequence."""


def pack_balanced(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Assigns complete documents to packed sequences: longest first, to the emptiest sequence.

    It starts with the fewest sequences that can hold all tokens and adds one whenever a document
    fits nowhere. The result has about as many sequences as best-fit packing. Best fit groups
    documents of similar length, and a model learns less from such batches. Here each sequence
    gets long and short documents.

    Returns lists of indices into `lengths`. Raises SequenceTooLong for a document longer than
    `max_length`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > max_length:
        raise SequenceTooLong(
            f"Document {order[0]} is too long (got {lengths[order[0]]} tokens, expected at most "
            f"{max_length}). Increase --max_length to {lengths[order[0]]}, or drop long documents "
            "with `medley tokenize --overflow drop`."
        )
    packed: list[list[int]] = [[] for _ in range(-(-sum(lengths) // max_length))]
    fill = [(0, number) for number in range(len(packed))]  # a heap of (tokens, sequence)
    for index in order:
        if fill[0][0] + lengths[index] > max_length:
            heappush(fill, (0, len(packed)))
            packed.append([])
        tokens, number = fill[0]
        heapreplace(fill, (tokens + lengths[index], number))
        packed[number].append(index)
    return [sorted(indices) for indices in packed]


def build_labels(
    ids: NDArray[np.int64],
    vocabulary: Vocabulary,
    train_on: TrainOn = "assistant",
    untrained_turns: Collection[int] = (),
) -> NDArray[np.int64]:
    """Labels (S,) of one document, not shifted: the id, or IGNORE_INDEX if not trained on.

    `assistant` trains on the assistant turns with the tokens that end them, `all` on all tokens,
    `images` on all image tokens with their begin and end tokens. No turn in `untrained_turns` has
    labels, whatever `train_on` is.
    """
    trained = np.zeros(len(ids), bool)
    if train_on == "images":
        begun = np.cumsum(ids == vocabulary.begin_image)
        ended = np.cumsum(ids == vocabulary.end_image)
        trained = (begun > ended) | (ids == vocabulary.end_image)
    elif train_on == "all":
        trained[:] = True
    else:
        for start, end in assistant_spans(ids.tolist(), vocabulary):
            trained[start:end] = True
    if untrained_turns:
        for number, (start, end) in enumerate(turn_spans(ids.tolist(), vocabulary)):
            trained[start:end] &= number not in untrained_turns
    trained[0] = False  # no token precedes the first one and predicts it
    return np.where(trained, ids, IGNORE_INDEX)


def build_sequence(
    documents: Sequence[NDArray[np.int64]],
    vocabulary: Vocabulary,
    train_on: TrainOn = "assistant",
    untrained_turns: Sequence[Collection[int]] | None = None,
) -> dict[str, Tensor]:
    """Documents -> one packed sequence: input_ids, position_ids and labels, each int64 (S,).

    `untrained_turns` are the turns of each document that have no labels.
    Positions restart at 0 in every document, which confines attention to each document.
    """
    ids = np.concatenate(documents)
    positions = np.concatenate([np.arange(len(d), dtype=np.int64) for d in documents])
    untrained = untrained_turns if untrained_turns is not None else [()] * len(documents)
    labels = np.concatenate([
        build_labels(document, vocabulary, train_on, turns)
        for document, turns in zip(documents, untrained, strict=True)
    ])  # fmt: skip
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
    }


def collate(sequences: Sequence[dict[str, Tensor]], vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Packed sequences of any lengths -> tensors (B, S), padded on the right.

    The padding has restarting positions, as a document of its own would, and no labels.
    """
    longest = max(len(sequence["input_ids"]) for sequence in sequences)
    padding = {"input_ids": vocabulary.pad, "labels": IGNORE_INDEX}

    def pad(name: str, values: Tensor) -> Tensor:
        missing = longest - len(values)
        if name == "position_ids":
            return torch.cat([values, torch.arange(missing)])
        return torch.cat([values, torch.full((missing,), padding[name], dtype=values.dtype)])

    return {name: torch.stack([pad(name, s[name]) for s in sequences]) for name in sequences[0]}
