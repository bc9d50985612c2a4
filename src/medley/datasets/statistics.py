"""Statistics of a dataset that are collected record by record: hashes, counts, duplicate ids.

The memory use is small: at most 8 bytes per record.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from typing import Any

import numpy as np

from medley.data.document import Document, ImagePart
from medley.datasets.base import Sample

DOMAIN_KEYS = ("domain", "image_organ", "organ", "modality", "subject", "source")
_MODULUS = 1 << 256
_MAX_NAMES = 500
# (format, split) -> number of records and hash of a published split.
PUBLISHED_SPLITS = {
    ("vqa_rad", "train"): (
        3064,
        "57124988fda8069b4dd143d0373b39219b8f21d198402bb68b1f8ba50c272d55",
    ),
    ("vqa_rad", "test"): (
        451,
        "fb584ffd526ee6294b2ad9bc15b52541d54b2dc1f140d7e048487f741617c1f0",
    ),
}


class DuplicateCounter:
    """Counts the records whose id is that of an earlier record."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, identifier: Any) -> None:
        if identifier is None:
            return
        text = repr(identifier).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(text, digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest, "little"))

    def count(self) -> int:
        hashes = np.frombuffer(self._hashes, np.uint64)
        hashes.sort()  # in place; the order is not needed
        return int((hashes[1:] == hashes[:-1]).sum())


class SplitHash:
    """A hash of a split: the sum of the SHA-256 of its documents.

    It depends on the turns and on the names of the images, not on the order of the documents or
    on folders.
    """

    def __init__(self) -> None:
        self.records, self._sum = 0, 0

    def add(self, document: Document) -> None:
        self.records += 1
        self._sum = (self._sum + int.from_bytes(document_hash(document), "big")) % _MODULUS

    def hexadecimal(self) -> str:
        return f"{self._sum:064x}"


def document_hash(document: Document) -> bytes:
    """SHA-256 of the roles, the texts and the image names of a document."""
    pieces = []
    for turn in document.turns:  # ASCII control characters separate turns and parts
        pieces += ["\x1e", turn.role]
        for part in turn.parts:
            pieces.append(f"\x1f{part}" if isinstance(part, str) else f"\x1d{_file_name(part)}")
    return hashlib.sha256("".join(pieces).encode("utf-8", "surrogatepass")).digest()


def _file_name(image_part: ImagePart) -> str:
    return str(image_part.path).replace("\\", "/").rpartition("/")[2]


class DatasetStats:
    """Number of records by domain, question type, answer length, turns and images."""

    def __init__(self) -> None:
        self.domains: Counter[str] = Counter()
        self.question_types: Counter[str] = Counter()
        self.answer_words: Counter[str] = Counter()
        self.turns: Counter[str] = Counter()
        self.images: Counter[str] = Counter()

    def add(self, sample: Sample) -> None:
        document = sample.document
        _increment(self.domains, domain_of(sample))
        _increment(self.question_types, question_type(sample))
        self.turns[str(len(document.turns))] += 1
        self.images[str(len(document.images))] += 1
        words = sum(
            len(part.split())
            for turn in document.turns
            if turn.role == "assistant"
            for part in turn.parts
            if isinstance(part, str)
        )
        self.answer_words[_word_range(words)] += 1

    def tables(self) -> dict[str, dict[str, int]]:
        """Title -> table of a value and its number of records."""
        return {
            "domain": dict(self.domains.most_common()),
            "question type": dict(self.question_types.most_common()),
            "words per answer": _sorted_by_number(self.answer_words),
            "turns": _sorted_by_number(self.turns),
            "images": _sorted_by_number(self.images),
        }


def _sorted_by_number(counter: Counter[str]) -> dict[str, int]:
    """Sorts keys like `5` and `5-8` by their first number."""
    return dict(sorted(counter.items(), key=lambda item: int(item[0].partition("-")[0])))


def _increment(counter: Counter[str], name: str) -> None:
    """Counts a name; new names are counted as `other` once there are 500."""
    counter[name if name in counter or len(counter) < _MAX_NAMES else "other"] += 1


def domain_of(sample: Sample, key: str | None = None) -> str:
    """The domain of a record, or "none".

    This is the first true key of LLaVA-Med's `domain`, else an organ, a modality, a subject or a
    source; `key` selects another field.
    """
    for name in DOMAIN_KEYS if key is None else (key,):
        value = sample.fields.get(name)
        if isinstance(value, dict):
            value = next((domain for domain, flag in value.items() if flag is True), None)
        if isinstance(value, str | int) and value != "":
            return str(value)
    return "none"


def question_type(sample: Sample) -> str:
    """The record's question type, such as OPEN or CLOSED, else the first word of the question."""
    own_type = sample.fields.get("answer_type") or sample.fields.get("type")
    if isinstance(own_type, str) and own_type:
        return own_type
    first = sample.document.turns[0]
    words = next((part for part in first.parts if isinstance(part, str)), "")[:80].split()
    if first.role != "user" or not words:
        return "none"
    word = words[0].lower().strip(",.:;?!")
    return word if word.isascii() and len(word) < 20 else "other"


def _word_range(words: int) -> str:
    """A number of words -> its range: 0, 1-1, 2-2, 3-4, 5-8, ..."""
    upper = 1
    while upper < words:
        upper *= 2
    return "0" if words == 0 else f"{upper // 2 + 1 if upper > 1 else 1}-{upper}"
