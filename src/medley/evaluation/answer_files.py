"""LLaVA's answer files: appended to during a run, resumed, and sorted at the end."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from medley.evaluation.questions import Question
from medley.inference.batch import read_existing
from medley.inference.choice_scoring import ChoiceScore
from medley.utils.jsonl import write_jsonl

Item = TypeVar("Item")
Key = tuple[str, str, int]


def question_keys(pairs: Iterable[tuple[Any, Any]]) -> Iterator[Key]:
    """(id, question text) -> a unique key of each, also where an id or a question is repeated."""
    seen: Counter[tuple[str, str]] = Counter()
    for identifier, text in pairs:
        pair = (json.dumps(identifier), str(text))
        yield (*pair, seen[pair])
        seen[pair] += 1


def read_answers(path: Path) -> dict[Key, dict[str, Any]]:
    """The rows of an answer file by their keys."""
    rows = read_existing(path, "question_id")
    keys = question_keys((row["question_id"], row.get("prompt")) for row in rows)
    return dict(zip(keys, rows, strict=True))


def shard(items: Sequence[Item], count: int, index: int) -> Sequence[Item]:
    """Shard `index` of `count`, as LLaVA splits its questions.

    All shards have the same size, except that the last ones may be smaller or empty.
    """
    size = -(-len(items) // count)
    return items[size * index : size * (index + 1)]


def model_name(ckpt: str) -> str:
    """LLaVA's name of a model: the folder's name, joined to its parent's for a `checkpoint-N`."""
    names = ckpt.strip("/").split("/")
    return "_".join(names[-2:]) if names[-1].startswith("checkpoint-") else names[-1]


def format_answer(
    question: Question,
    text: str,
    model_id: str,
    images: Sequence[str] = (),
    choices: Sequence[ChoiceScore] = (),
) -> dict[str, Any]:
    """A row of LLaVA's answer file. Its metadata lists the files of generated images.

    The row has `choices` if there are any.
    """
    scores = {"choices": [asdict(choice) for choice in choices]} if choices else {}
    return {
        "question_id": question.identifier,
        "prompt": question.raw_text,
        "text": text,
        "answer_id": secrets.token_urlsafe(16),
        "model_id": model_id,
        "metadata": {"images": list(images)} if images else {},
        **scores,
    }


def sort_answers(path: Path, keys: Sequence[Key]) -> None:
    """Sorts an answer file in the order of the questions, one row each; other rows follow."""
    rows = read_answers(path)
    ordered = [rows.pop(key) for key in keys if key in rows]
    write_jsonl(path, [*ordered, *rows.values()])
