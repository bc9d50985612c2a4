"""Questions with their gold answer, a model's answer, and its scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medley.errors import UserError
from medley.utils.jsonl import json_lines, write_jsonl

# Deprecated names of scores -> present ones, for files that an earlier version wrote.
_RENAMED_SCORES = {"right": "correct"}
_RENAMED_PREFIXES = {
    "similarity of pictures (": "image similarity (",  # alias
    "similarity of words (": "text similarity (",
}
_RENAMED_SUFFIXES = {"; no judge's score)": "; not a judge's score)"}


@dataclass(frozen=True)
class Example:
    """A question with its gold answer and a model's answer; `fields` are those of its record."""

    identifier: Any
    question: str
    gold: str
    answer: str
    kind: str
    image: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredExample:
    """An example with its scores.

    Attributes:
        example: the example
        scores: metric -> value, where 1 means 100%; `correct` is 0 or 1
        note: the reason for a missing score
        generated_image: file of a generated image in the answer
    """

    example: Example
    scores: dict[str, float]
    note: str = ""
    generated_image: str | None = None

    @property
    def is_correct(self) -> bool | None:
        """None if no metric decides between correct and wrong."""
        value = self.scores.get("correct")
        return None if value is None else value == 1


def write_scored(path: Path, scored: Iterable[ScoredExample]) -> None:
    write_jsonl(path, (_to_row(one) for one in scored))


def _to_row(scored: ScoredExample) -> dict[str, Any]:
    example = scored.example
    return {
        "id": example.identifier, "kind": example.kind, "image": example.image,
        "question": example.question, "gold": example.gold, "answer": example.answer,
        "generated_image": scored.generated_image, "scores": scored.scores, "note": scored.note,
    }  # fmt: skip


def read_scored(path: Path) -> list[ScoredExample]:
    """Reads what `write_scored` wrote. Raises UserError for any other file."""
    scored = []
    for number, line in json_lines(path):
        try:
            scored.append(_from_row(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}:{number}: Not an example of an evaluation ({error})."
            ) from error
    return scored


def _from_row(row: dict[str, Any]) -> ScoredExample:
    generated = row["drawn"] if "drawn" in row else row["generated_image"]  # alias
    for path in (row["image"], generated):
        if not isinstance(path, str | None):
            raise TypeError("an image path is not a string")
    example = Example(
        row["id"], row["question"], row["gold"], row["answer"], row["kind"], row["image"]
    )
    scores = {_present_name(str(name)): float(value) for name, value in row["scores"].items()}
    return ScoredExample(example, scores, row["note"], generated)


def _present_name(name: str) -> str:
    """The present name of a score."""
    name = _RENAMED_SCORES.get(name, name)
    for old, new in _RENAMED_PREFIXES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    for old, new in _RENAMED_SUFFIXES.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def sample_examples(scored: Sequence[ScoredExample], count: int) -> list[ScoredExample]:
    """At most `count` examples, evenly spaced over the file, half of them wrong if possible."""
    wrong = [one for one in scored if one.is_correct is False]
    others = [one for one in scored if one.is_correct is not False]
    wrong_count = min(len(wrong), max(count // 2, count - len(others)))
    chosen = [*_evenly_spaced(wrong, wrong_count), *_evenly_spaced(others, count - wrong_count)]
    identities = {id(one) for one in chosen}
    return [one for one in scored if id(one) in identities]


def _evenly_spaced(items: Sequence[ScoredExample], count: int) -> list[ScoredExample]:
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
