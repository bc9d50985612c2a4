"""LLaVA's question files and answer files."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from medley.errors import UserError
from medley.files import whole_file
from medley.formats.files import records_of
from medley.formats.sample import RecordError
from medley.responses import rows_there
from medley.vocabulary import IMAGE

Item = TypeVar("Item")
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Question:
    """`asked` is the text as it stands in the file, with its `<image>`."""

    identifier: str | int
    asked: str
    image: str | None

    @property
    def text(self) -> str:
        # The picture's place in LLaVA's files is before or behind the words; here it comes first.
        return self.asked.replace(IMAGE, "").strip()


def read_questions(path: Path) -> list[Question]:
    """Questions in their order. Raises UserError with the place of a bad one."""
    found = []
    for place, _, row in records_of(path):
        if isinstance(row, RecordError):
            raise UserError(f"{place}: {row}")
        found.append(_question(place, row))
    if not found:
        raise UserError(f"{path}: no questions in it")
    return found


def _question(place: str, row: Any) -> Question:
    try:
        identifier = row["question_id"] if "question_id" in row else row["id"]
        turns = [] if "text" in row else [t for t in row["conversations"] if t["from"] == "human"]
        text = row["text"] if "text" in row else turns[0]["value"]
        image = row.get("image")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place}: expected question_id and text, or id and conversations ({error} is missing)"
        ) from error
    if len(turns) > 1:
        raise UserError(
            f"{place}: {len(turns)} questions in one record, and answers have one for each record: "
            "give each its own"
        )
    if not isinstance(text, str) or isinstance(identifier, bool | float):
        raise UserError(f"{place}: the question is no text, or its id neither text nor number")
    if not isinstance(identifier, str | int) or not isinstance(image, str | None):
        raise UserError(f"{place}: its id or its image is neither text nor number")
    return Question(identifier, text, image or None)


def keys_of(pairs: Iterable[tuple[Any, Any]]) -> Iterator[Key]:
    """(id, question) -> what tells them apart, though an id or a whole question may stand twice."""
    seen: Counter[tuple[str, str]] = Counter()
    for identifier, text in pairs:
        pair = (json.dumps(identifier), str(text))
        yield (*pair, seen[pair])
        seen[pair] += 1


def answers_there(path: Path) -> dict[Key, dict[str, Any]]:
    rows = rows_there(path, "question_id")
    return dict(zip(keys_of((r["question_id"], r.get("prompt")) for r in rows), rows, strict=True))


def chunk(items: Sequence[Item], count: int, index: int) -> Sequence[Item]:
    """Part `index` of `count`, as LLaVA cuts them: of the same size, but for the last ones, which
    may be smaller or empty."""
    size = -(-len(items) // count)
    return items[size * index : size * (index + 1)]


def model_name(ckpt: str) -> str:
    """What LLaVA calls a model: the folder's name, with the one above it for a checkpoint."""
    names = ckpt.strip("/").split("/")
    return "_".join(names[-2:]) if names[-1].startswith("checkpoint-") else names[-1]


def row_of(question: Question, text: str, model_id: str) -> str:
    return json.dumps(
        {
            "question_id": question.identifier,
            "prompt": question.asked,
            "text": text,
            "answer_id": secrets.token_urlsafe(16),
            "model_id": model_id,
            "metadata": {},
        },
        ensure_ascii=False,
    )


def in_order(path: Path, keys: Sequence[Key]) -> None:
    """The answers in the order of their questions, each once; any others stay behind them."""
    there = answers_there(path)
    ordered = [there.pop(key) for key in keys if key in there]
    write_rows(path, [*ordered, *there.values()])


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with whole_file(path) as temporary:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
