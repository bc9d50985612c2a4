"""A question with its right answer and a given one, and what that scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medley.errors import UserError
from medley.utils.files import atomic_file
from medley.utils.jsonl import json_lines


@dataclass(frozen=True)
class Example:
    """A question with its right answer and the one that was given; `fields` of its record."""

    identifier: Any
    question: str
    gold: str
    answer: str
    kind: str
    image: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredExample:
    """A case with its values by measure, where 1 is 100 percent; `right` is 0 or 1. `note` says why
    one is missing. `drawn` is the file of a picture that was the answer, or part of it."""

    case: Example
    scores: dict[str, float]
    note: str = ""
    drawn: str | None = None

    @property
    def is_right(self) -> bool | None:
        """None where no measure says right or wrong."""
        found = self.scores.get("right")
        return None if found is None else found == 1


def write_scored(path: Path, cases: Iterable[ScoredExample]) -> None:
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for one in cases:
            case = one.case
            row = {
                "id": case.identifier, "kind": case.kind, "image": case.image,
                "question": case.question, "gold": case.gold, "answer": case.answer,
                "drawn": one.drawn, "scores": one.scores, "note": one.note,
            }  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_scored(path: Path) -> list[ScoredExample]:
    """Raises UserError for a file that is not one of these."""
    found = []
    for number, line in json_lines(path):
        try:
            row = json.loads(line)
            case = Example(
                row["id"], row["question"], row["gold"], row["answer"], row["kind"], row["image"]
            )
            if not isinstance(row["image"], str | None) or not isinstance(row["drawn"], str | None):
                raise TypeError("a picture's name is no text")
            scores = {str(name): float(value) for name, value in row["scores"].items()}
            found.append(ScoredExample(case, scores, row["note"], row["drawn"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a case of an evaluation ({error})") from error
    return found


def sample_examples(cases: Sequence[ScoredExample], count: int) -> list[ScoredExample]:
    """At most so many, evenly over the file; half of them wrong ones, where there are as many."""
    wrong = [one for one in cases if one.is_right is False]
    others = [one for one in cases if one.is_right is not False]
    half = min(len(wrong), max(count // 2, count - len(others)))
    chosen = {id(one) for one in [*_evenly(wrong, half), *_evenly(others, count - half)]}
    return [one for one in cases if id(one) in chosen]


def _evenly(items: Sequence[ScoredExample], count: int) -> list[ScoredExample]:
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
