"""The rows that a run learns from: documents of one file or several, packed or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from medley.utils.manifest import check_fingerprint

ROW = "row_numbers"  # in a batch: which rows it holds, so that an error can name their documents


@dataclass(frozen=True)
class WeightedSource:
    """A tokens file, and how often its documents stand in the rows: 2 is twice, 0.5 a half."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> WeightedSource:
        """`FILE` or `FILE:WEIGHT`. A file that has the whole text as its name is that file."""
        name, colon, number = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(Path(text))
        try:
            weight = float(number)
        except ValueError:
            return cls(Path(text))
        if not 0 < weight < float("inf"):
            raise UserError(f"--train_data {text}: the weight is {number}, expected above 0")
        return cls(Path(name), weight)


@dataclass(frozen=True)
class PackingConfig:
    """`learn` says which tokens have labels; `as_medmax` gives batches MedMax's labels instead,
    by the rule of their first row."""

    max_length: int
    pack: bool = False
    learn: TrainOn = "answers"
    as_medmax: bool = False
    seed: int = 0
    max_samples: int | None = None


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Rows of documents: one each, or packed up to `max_length`.

    `pad_to` adds blank rows until their number is a multiple of it (a whole step of all ranks):
    then no row is seen twice in an epoch, whatever the number of ranks.

    Raises SequenceTooLong for a document longer than `max_length`.
    """

    def __init__(
        self,
        files: Sequence[tuple[TokenDataset, float]],
        vocabulary: Vocabulary,
        options: PackingConfig,
        only: NDArray[np.int64] | None = None,
        pad_to: int = 1,
    ) -> None:
        self.shards = [shards for shards, _ in files]
        self.vocabulary, self.options = vocabulary, options
        for shards in self.shards:
            refuse_long(shards, options.max_length)
        self.documents = select_documents(files, options) if only is None else only
        lengths = lengths_of(self.shards, self.documents).tolist()
        if options.pack:
            self.rows = pack_balanced(lengths, options.max_length)
        else:
            self.rows = [[i] for i in range(len(lengths))]
        self.lengths = [sum(lengths[i] for i in row) for row in self.rows]
        self.blank = -len(self.rows) % pad_to

    def __len__(self) -> int:
        return len(self.rows) + self.blank

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= len(self.rows):  # a blank row: one token, and no label
            documents = [np.array([self.vocabulary.pad], np.int64)]
        else:
            places = (self.documents[i] for i in self.rows[index])
            documents = [self.shards[file][number] for file, number in places]
        row = build_sequence(documents, self.vocabulary, self.options.learn)
        return {**row, ROW: torch.tensor(index)}

    def names(self, index: int) -> list[str]:
        """What to call the documents of a row in a message: file and number from 0."""
        if index >= len(self.rows):
            return []
        places = (self.documents[i] for i in self.rows[index])
        return [f"{self.shards[file].path} document {number}" for file, number in places]

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        plain = [{name: value for name, value in row.items() if name != ROW} for row in rows]
        batch = collate(plain, self.vocabulary)
        if self.options.as_medmax:
            batch["labels"] = self._medmax_labels(rows, batch["labels"])
        return {**batch, ROW: torch.stack([row[ROW] for row in rows])}

    def _medmax_labels(self, rows: Sequence[dict[str, Tensor]], plain: Tensor) -> Tensor:
        """MedMax's labels for the rows that are not blank; nothing predicts a first token."""
        labels = torch.full_like(plain, IGNORE_INDEX)
        real = [i for i, row in enumerate(rows) if int(row[ROW]) < len(self.rows)]
        if real:
            try:
                theirs = medmax_collate(
                    [rows[i]["input_ids"].tolist() for i in real], self.vocabulary
                )["labels"]
            except IndexError as error:
                names = [name for i in real for name in self.names(int(rows[i][ROW]))]
                raise UserError(f"--compat medmax: {error} ({', '.join(names)})") from error
            labels[torch.tensor(real), : theirs.shape[1]] = theirs
        labels[:, 0] = IGNORE_INDEX
        return labels


def refuse_long(shards: TokenDataset, max_length: int) -> None:
    longest = int(shards.lengths.max(initial=0))
    if longest > max_length:
        raise SequenceTooLong(
            f"{shards.path}: document {int(shards.lengths.argmax())} has {longest} tokens, "
            f"--max_length is {max_length}: raise it, or tokenize with --max_length {max_length} "
            "--overflow drop"
        )


def select_documents(
    files: Sequence[tuple[TokenDataset, float]], options: PackingConfig
) -> NDArray[np.int64]:
    """Places (file, number) of all documents, int64 (N, 2), as often as the weights say.

    The part of a file that a fraction takes, and `max_samples`, are drawn by the seed.
    """
    places = []
    for number, (shards, weight) in enumerate(files):
        generator = np.random.default_rng([options.seed, number])
        count = round(len(shards) * weight)
        rounds = [np.arange(len(shards))] * (count // len(shards))
        part = generator.permutation(len(shards))[: count % len(shards)]
        chosen = np.concatenate([*rounds, np.sort(part)]).astype(np.int64)
        if not len(chosen):
            raise UserError(f"{shards.path}: a weight of {weight} takes none of its documents")
        places.append(np.stack([np.full_like(chosen, number), chosen], 1))
    together = np.concatenate(places)
    if options.max_samples is not None and options.max_samples < len(together):
        generator = np.random.default_rng([options.seed, len(files)])
        kept = generator.permutation(len(together))[: options.max_samples]
        together = together[np.sort(kept)]
    return together


def lengths_of(shards: Sequence[TokenDataset], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of the documents at places (N, 2), int64 (N,)."""
    lengths = np.zeros(len(places), np.int64)
    for file, own in enumerate(shards):
        here = places[:, 0] == file
        lengths[here] = own.lengths[places[here, 1]]
    return lengths


def by_task(shards: TokenDataset) -> dict[str, NDArray[np.int64]]:
    """Places of the documents of each task, in the file's order; one without a task is `other`."""
    found: dict[str, list[int]] = {}
    for number in range(len(shards)):
        found.setdefault(shards.task(number) or "other", []).append(number)
    return {
        task: np.stack([np.zeros(len(own), np.int64), np.array(own)], 1)
        for task, own in sorted(found.items())
    }


def open_shards(path: Path, base: Checkpoint, vocabulary: Vocabulary) -> TokenDataset:
    """A tokens file that a base can learn from.

    Raises UserError for one of another token space, without sequences, or with pictures or ids
    that the base does not have.
    """
    vqgan, fit, _ = base.vqgan()
    check_fingerprint(path, base.fingerprint(), str(base.folder), fit)
    shards = TokenDataset(path)
    if not len(shards):
        raise UserError(f"{path}: no sequences in it")
    codes = vqgan.config.codes_per_image
    for index in range(len(shards)):
        ids = shards[index]
        begins = (ids == vocabulary.begin_image).nonzero()[0]
        ends = (ids == vocabulary.end_image).nonzero()[0]
        if len(begins) != len(ends) or not bool(((ends - begins) == codes + 1).all()):
            raise UserError(
                f"{path}: sequence {index} has a picture that does not have {codes} codes, as "
                f"those of {base.folder} do"
            )
        largest = int(ids.max())
        if largest >= vocabulary.size:
            raise UserError(
                f"{path}: sequence {index} has the token id {largest}, the vocabulary of "
                f"{base.folder} ends at {vocabulary.size - 1}"
            )
    return shards
