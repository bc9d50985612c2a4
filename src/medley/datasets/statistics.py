"""What is known of a data set once its records have gone by: its hash, counts, ids that repeat.

All of it takes little memory: 8 bytes a record at most.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from typing import Any

import numpy as np

from medley.data.document import Document
from medley.datasets.base import Sample

DOMAINS = ("domain", "image_organ", "organ", "modality", "subject", "source")
_MODULUS = 1 << 256
_NAMES = 500
# The published splits that were at hand when this was written: records, and their hash.
PUBLISHED = {
    ("vqa_rad", "train"): (
        3064,
        "57124988fda8069b4dd143d0373b39219b8f21d198402bb68b1f8ba50c272d55",
    ),
    ("vqa_rad", "test"): (
        451,
        "fb584ffd526ee6294b2ad9bc15b52541d54b2dc1f140d7e048487f741617c1f0",
    ),
}


class Duplicates:
    """Finds ids that stand more than once."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._without = 0

    def add(self, identifier: Any) -> None:
        if identifier is None:
            self._without += 1
            return
        text = repr(identifier).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(text, digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest, "little"))

    def count(self) -> int:
        """Records whose id stood before."""
        hashes = np.frombuffer(self._hashes, np.uint64)
        hashes.sort()  # in place: their order was of no use
        return int((hashes[1:] == hashes[:-1]).sum())


class SplitHash:
    """A hash over questions and answers that does not depend on their order or on folders: the
    sum of each document's SHA-256, over its turns and the names of its pictures."""

    def __init__(self) -> None:
        self.records, self._sum = 0, 0

    def add(self, document: Document) -> None:
        self.records += 1
        self._sum = (self._sum + int.from_bytes(document_hash(document), "big")) % _MODULUS

    def hexadecimal(self) -> str:
        return f"{self._sum:064x}"


def document_hash(document: Document) -> bytes:
    pieces = []
    for turn in document.turns:  # separators of ASCII stand between parts and turns
        pieces += ["\x1e", turn.role]
        for part in turn.parts:
            pieces.append(f"\x1f{part}" if isinstance(part, str) else f"\x1d{_name(part)}")
    return hashlib.sha256("".join(pieces).encode("utf-8", "surrogatepass")).digest()


def _name(picture: Any) -> str:
    return str(picture.path).replace("\\", "/").rpartition("/")[2]


class DatasetStats:
    """Records by domain, by type of question, and by length in words."""

    def __init__(self) -> None:
        self.domain: Counter[str] = Counter()
        self.question: Counter[str] = Counter()
        self.answer_words: Counter[str] = Counter()
        self.turns: Counter[str] = Counter()
        self.pictures: Counter[str] = Counter()

    def add(self, sample: Sample) -> None:
        document = sample.document
        _count(self.domain, domain_of(sample))
        _count(self.question, question_type(sample))
        self.turns[str(len(document.turns))] += 1
        self.pictures[str(len(document.pictures))] += 1
        words = sum(
            len(part.split())
            for turn in document.turns
            if turn.role == "assistant"
            for part in turn.parts
            if isinstance(part, str)
        )
        self.answer_words[_range(words)] += 1

    def tables(self) -> dict[str, dict[str, int]]:
        return {
            "domain": dict(self.domain.most_common()),
            "question type": dict(self.question.most_common()),
            "words of the answers": dict(
                sorted(self.answer_words.items(), key=lambda x: _start(x[0]))
            ),
            "turns": dict(sorted(self.turns.items(), key=lambda x: int(x[0]))),
            "pictures": dict(sorted(self.pictures.items(), key=lambda x: int(x[0]))),
        }


def _count(counter: Counter[str], name: str) -> None:
    """Counts a name; once there are many, new ones are `other`, so that no table grows for ever."""
    counter[name if name in counter or len(counter) < _NAMES else "other"] += 1


def domain_of(sample: Sample, key: str | None = None) -> str:
    """The concept that a record belongs to: LLaVA-Med's `domain` (its first true one), or an organ,
    a modality, a source; `key` names another value."""
    for name in DOMAINS if key is None else (key,):
        value = sample.fields.get(name)
        if isinstance(value, dict):
            value = next((concept for concept, there in value.items() if there is True), None)
        if isinstance(value, str | int) and value != "":
            return str(value)
    return "none"


def question_type(sample: Sample) -> str:
    """OPEN or CLOSED where the record says so, else the question's first word."""
    kind = sample.fields.get("answer_type") or sample.fields.get("type")
    if isinstance(kind, str) and kind:
        return kind
    first = sample.document.turns[0]
    words = next((part for part in first.parts if isinstance(part, str)), "")[:80].split()
    if first.role != "user" or not words:
        return "none"
    word = words[0].lower().strip(",.:;?!")
    return word if word.isascii() and len(word) < 20 else "other"


def _range(words: int) -> str:
    upper = 1
    while upper < words:
        upper *= 2
    return "0" if words == 0 else f"{upper // 2 + 1 if upper > 1 else 1}-{upper}"


def _start(name: str) -> int:
    return int(name.partition("-")[0])
