"""LLaVA's answer files: written as answers come, gone on with, put into order."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from medley.evaluation.questions import Question
from medley.inference.batch import read_existing
from medley.utils.files import atomic_file

Item = TypeVar("Item")
Key = tuple[str, str, int]


def question_keys(pairs: Iterable[tuple[Any, Any]]) -> Iterator[Key]:
    """(id, question) -> what tells them apart, though an id or a whole question may stand twice."""
    seen: Counter[tuple[str, str]] = Counter()
    for identifier, text in pairs:
        pair = (json.dumps(identifier), str(text))
        yield (*pair, seen[pair])
        seen[pair] += 1


def read_answers(path: Path) -> dict[Key, dict[str, Any]]:
    rows = read_existing(path, "question_id")
    return dict(
        zip(question_keys((r["question_id"], r.get("prompt")) for r in rows), rows, strict=True)
    )


def shard(items: Sequence[Item], count: int, index: int) -> Sequence[Item]:
    """Part `index` of `count`, as LLaVA cuts them: of the same size, but for the last ones, which
    may be smaller or empty."""
    size = -(-len(items) // count)
    return items[size * index : size * (index + 1)]


def model_name(ckpt: str) -> str:
    """What LLaVA calls a model: the folder's name, with the one above it for a checkpoint."""
    names = ckpt.strip("/").split("/")
    return "_".join(names[-2:]) if names[-1].startswith("checkpoint-") else names[-1]


def format_answer(
    question: Question, text: str, model_id: str, pictures: Sequence[str] = ()
) -> dict[str, Any]:
    """A row of LLaVA's answer file. Generated images are listed in its metadata."""
    return {
        "question_id": question.identifier,
        "prompt": question.asked,
        "text": text,
        "answer_id": secrets.token_urlsafe(16),
        "model_id": model_id,
        "metadata": {"pictures": list(pictures)} if pictures else {},
    }


def sort_answers(path: Path, keys: Sequence[Key]) -> None:
    """The answers in the order of their questions, each once; any others stay behind them."""
    there = read_answers(path)
    ordered = [there.pop(key) for key in keys if key in there]
    write_rows(path, [*ordered, *there.values()])


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic_file(path) as temporary:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
