"""Datasets of training sequences: one document each, or several packed up to a maximum length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from medley.checkpoints.checkpoint import Checkpoint
from medley.data.medmax_compat import medmax_collate
from medley.data.packing import (
    IGNORE_INDEX,
    SequenceTooLong,
    TrainOn,
    build_sequence,
    collate,
    pack_balanced,
)
from medley.data.token_dataset import TokenDataset
from medley.data.vocabulary import Vocabulary
from medley.errors import UserError
from medley.modeling.attention import Documents
from medley.modeling.chameleon import label_positions
from medley.utils.manifest import check_fingerprint

SEQUENCE_INDEX = "sequence_index"  # in samples and batches, so that errors can name documents


@dataclass(frozen=True)
class WeightedSource:
    """A tokens file and how often an epoch uses it: 2 is twice, 0.5 half of its documents."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> WeightedSource:
        """Parses `FILE` or `FILE:WEIGHT`. A file whose name is the whole text takes precedence."""
        name, colon, number = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(Path(text))
        try:
            weight = float(number)
        except ValueError:
            return cls(Path(text))
        if not 0 < weight < float("inf"):
            raise UserError(
                f"--train_data {text}: invalid weight (got {number}, expected above 0)."
            )
        return cls(Path(name), weight)


@dataclass(frozen=True)
class PackingConfig:
    """How documents become sequences.

    Attributes:
        max_length: tokens of the longest sequence
        pack: pack several documents into a sequence
        train_on: tokens that have labels
        medmax_labels: use MedMax's labels instead, by the rule of a batch's first sequence
        seed: seed of the choice of documents
        max_samples: largest number of documents
    """

    max_length: int
    pack: bool = False
    train_on: TrainOn = "assistant"
    medmax_labels: bool = False
    seed: int = 0
    max_samples: int | None = None


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Sequences of one document each, or of several packed up to `max_length` tokens.

    Blank sequences fill the dataset up to a multiple of `multiple_of`. With the global batch size
    there, no sequence is seen twice in an epoch, on any number of ranks.

    Args:
        sources: tokens files and their weights
        vocabulary: the base's vocabulary
        config: how documents become sequences
        documents: (source, document) pairs to use, int64 (N, 2); chosen by weight unless given
        multiple_of: the number of sequences becomes a multiple of this

    Raises SequenceTooLong for a document longer than `max_length`.
    """

    def __init__(
        self,
        sources: Sequence[tuple[TokenDataset, float]],
        vocabulary: Vocabulary,
        config: PackingConfig,
        documents: NDArray[np.int64] | None = None,
        multiple_of: int = 1,
    ) -> None:
        self.sources = [source for source, _ in sources]
        self.vocabulary, self.config = vocabulary, config
        for source in self.sources:
            check_lengths(source, config.max_length)
            if config.medmax_labels and source.has_untrained_turns:
                raise UserError(
                    f"{source.path}: --compat medmax: MedMax's labels have no weights, but turns "
                    "of weight 0 must not be trained on. Leave out --compat medmax."
                )
        self.documents = select_documents(sources, config) if documents is None else documents
        lengths = document_lengths(self.sources, self.documents).tolist()
        if config.pack:
            self.sequences = pack_balanced(lengths, config.max_length)
        else:
            self.sequences = [[i] for i in range(len(lengths))]
        self.lengths = [sum(lengths[i] for i in sequence) for sequence in self.sequences]
        self.num_blank = -len(self.sequences) % multiple_of

    def __len__(self) -> int:
        return len(self.sequences) + self.num_blank

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """input_ids, position_ids and labels, int64 (S,), and the index itself."""
        if index >= len(self.sequences):  # blank: one padding token without a label
            ids, untrained = [np.array([self.vocabulary.pad], np.int64)], [()]
        else:
            pairs = [self.documents[i] for i in self.sequences[index]]
            ids = [self.sources[source][document] for source, document in pairs]
            untrained = [self.sources[source].untrained_turns(own) for source, own in pairs]
        sequence = build_sequence(ids, self.vocabulary, self.config.train_on, untrained)
        return {**sequence, SEQUENCE_INDEX: torch.tensor(index)}

    def document_names(self, index: int) -> list[str]:
        """The documents of a sequence, for messages: file and number, counted from 0."""
        if index >= len(self.sequences):
            return []
        pairs = (self.documents[i] for i in self.sequences[index])
        return [f"{self.sources[source].path} document {document}" for source, document in pairs]

    def collate(self, sequences: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Sequences -> a batch: input_ids, position_ids and labels (B, S), sequence_index (B,).

        `documents` and `label_positions` follow from them. They are computed here, on the CPU, so
        that the training step does not wait for the device.
        """
        plain = [
            {name: value for name, value in sequence.items() if name != SEQUENCE_INDEX}
            for sequence in sequences
        ]
        batch = collate(plain, self.vocabulary)
        if self.config.medmax_labels:
            batch["labels"] = self._medmax_labels(sequences, batch["labels"])
        return {
            **batch,
            "documents": Documents.of(batch["position_ids"]),
            "label_positions": label_positions(batch["labels"][:, 1:]),
            SEQUENCE_INDEX: torch.stack([s[SEQUENCE_INDEX] for s in sequences]),
        }

    def _medmax_labels(self, sequences: Sequence[dict[str, Tensor]], like: Tensor) -> Tensor:
        """MedMax's labels for the sequences that are not blank; first tokens have no label."""
        labels = torch.full_like(like, IGNORE_INDEX)
        indices = [int(sequence[SEQUENCE_INDEX]) for sequence in sequences]
        filled = [i for i, index in enumerate(indices) if index < len(self.sequences)]
        if filled:
            try:
                medmax = medmax_collate(
                    [sequences[i]["input_ids"].tolist() for i in filled], self.vocabulary
                )["labels"]
            except IndexError as error:
                names = [name for i in filled for name in self.document_names(indices[i])]
                raise UserError(f"--compat medmax: {error} ({', '.join(names)})") from error
            labels[torch.tensor(filled), : medmax.shape[1]] = medmax
        labels[:, 0] = IGNORE_INDEX
        return labels


def check_lengths(source: TokenDataset, max_length: int) -> None:
    """Raises SequenceTooLong for a file with a document of more than `max_length` tokens."""
    longest = int(source.lengths.max(initial=0))
    if longest > max_length:
        raise SequenceTooLong(
            f"{source.path}: document {int(source.lengths.argmax())} is too long (got {longest} "
            f"tokens, --max_length is {max_length}). Raise --max_length, or tokenize with "
            f"--max_length {max_length} --overflow drop."
        )


def select_documents(
    sources: Sequence[tuple[TokenDataset, float]], config: PackingConfig
) -> NDArray[np.int64]:
    """(source, document) pairs of all documents, int64 (N, 2), as often as the weights say.

    The documents of a fractional weight, and those of `max_samples`, are sampled with the seed.
    """
    selected = []
    for number, (source, weight) in enumerate(sources):
        generator = np.random.default_rng([config.seed, number])
        count = round(len(source) * weight)
        rounds = [np.arange(len(source))] * (count // len(source))
        part = generator.permutation(len(source))[: count % len(source)]
        documents = np.concatenate([*rounds, np.sort(part)]).astype(np.int64)
        if not len(documents):
            raise UserError(
                f"{source.path}: the weight {weight} selects none of {len(source)} documents. "
                "Use a larger weight."
            )
        selected.append(np.stack([np.full_like(documents, number), documents], 1))
    pairs = np.concatenate(selected)
    if config.max_samples is not None and config.max_samples < len(pairs):
        generator = np.random.default_rng([config.seed, len(sources)])
        sampled = generator.permutation(len(pairs))[: config.max_samples]
        pairs = pairs[np.sort(sampled)]
    return pairs


def document_lengths(
    sources: Sequence[TokenDataset], documents: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Tokens of the documents of (source, document) pairs (N, 2), int64 (N,)."""
    lengths = np.zeros(len(documents), np.int64)
    for number, source in enumerate(sources):
        own = documents[:, 0] == number
        lengths[own] = source.lengths[documents[own, 1]]
    return lengths


def group_by_task(source: TokenDataset) -> dict[str, NDArray[np.int64]]:
    """(source, document) pairs of each task, in the file's order; `other` is without a task."""
    tasks: dict[str, list[int]] = {}
    for number in range(len(source)):
        tasks.setdefault(source.task(number) or "other", []).append(number)
    return {
        task: np.stack([np.zeros(len(documents), np.int64), np.array(documents)], 1)
        for task, documents in sorted(tasks.items())
    }


def open_token_dataset(path: Path, base: Checkpoint, vocabulary: Vocabulary) -> TokenDataset:
    """Opens a tokens file and checks that it fits a base.

    Raises UserError for a file of another token space, without sequences, or with images or ids
    that the base does not have.
    """
    vqgan, preprocessing, _ = base.vqgan()
    check_fingerprint(path, base.fingerprint(), str(base.folder), preprocessing.describe())
    source = TokenDataset(path)
    if not len(source):
        raise UserError(f"{path}: contains no sequences.")
    codes = vqgan.config.codes_per_image
    for index in range(len(source)):
        ids = source[index]
        begins = (ids == vocabulary.begin_image).nonzero()[0]
        ends = (ids == vocabulary.end_image).nonzero()[0]
        if len(begins) != len(ends) or not bool(((ends - begins) == codes + 1).all()):
            raise UserError(
                f"{path}: sequence {index} contains an incomplete image (expected {codes} image "
                f"tokens, as in {base.folder})."
            )
        largest = int(ids.max())
        if largest >= vocabulary.size:
            raise UserError(
                f"{path}: sequence {index} contains the token id {largest} (the vocabulary of "
                f"{base.folder} ends at {vocabulary.size - 1})."
            )
    return source
