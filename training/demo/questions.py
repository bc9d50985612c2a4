"""Held-out questions of the demo, their scores, and an image-blind baseline."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from medley.data.document import Document, Turn
from medley.utils.jsonl import json_lines
from medley.utils.manifest import read_manifest

Item = TypeVar("Item")
Scores = dict[str, dict[str, int]]  # group -> {"correct": exact matches, "n": questions}
EXAMPLES = 8  # in each section of the report


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Questions of a `group` are scored together: closed or open ones and, for phantoms, those about
    the new modality or about the modalities of the embedded model.
    """

    document: Document
    group: str

    @property
    def text(self) -> str:
        return text_of(self.document.turns[0])

    @property
    def gold(self) -> str:
        return "".join(map(str, self.document.turns[1].parts)).strip()

    def is_correct(self, answer: str) -> bool:
        return answer.lower() == self.gold.lower()


def text_of(turn: Turn) -> str:
    return "".join(part for part in turn.parts if isinstance(part, str)).strip()


def phantom_modality(data: Path) -> str | None:
    """The first modality of a folder of phantoms; None for a folder of real images."""
    modality = read_manifest(data).get("options", {}).get("modality")
    return None if modality is None else str(modality).split(",")[0]


def read_questions(data: Path) -> Iterator[Question]:
    """The questions of test.jsonl."""
    new = phantom_modality(data)
    for _, line in json_lines(data / "test.jsonl"):
        row = json.loads(line)
        group = str(row["answer_type"]).lower()
        if new is not None:
            group += f", {new if row['modality'] == new else 'known modalities'}"
        yield Question(Document.from_json(row), group)


def majority_answers(data: Path) -> dict[str, str]:
    """Question text -> its most frequent answer in train.jsonl."""
    counts: dict[str, Counter[str]] = {}
    for _, line in json_lines(data / "train.jsonl"):
        for question, answer in pairwise(Document.from_json(json.loads(line)).turns):
            if question.role == "user" and all(isinstance(part, str) for part in answer.parts):
                counts.setdefault(text_of(question), Counter())[text_of(answer)] += 1
    return {question: count.most_common(1)[0][0] for question, count in counts.items()}


def image_blind_answers(questions: Sequence[Question], data: Path) -> list[str]:
    """Answers without access to the image.

    The most frequent answer to the same question in train.jsonl; for a question that is not in
    there, the most frequent correct answer in its group.
    """
    majority = majority_answers(data)
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        counts.setdefault(question.group, Counter())[question.gold] += 1
    return [
        majority.get(question.text) or counts[question.group].most_common(1)[0][0]
        for question in questions
    ]


def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    scores: Scores = {}
    for question, answer in zip(questions, answers, strict=True):
        group = scores.setdefault(question.group, {"correct": 0, "n": 0})
        group["correct"] += question.is_correct(answer)
        group["n"] += 1
    return dict(sorted(scores.items()))


def sample_evenly(items: Sequence[Item], count: int) -> Sequence[Item]:
    return items[:: max(1, len(items) // count)][:count]
