"""Questions with right answers, and an answer file: put together by id and place, not one lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medley.errors import UserError
from medley.evaluation.cases import Case
from medley.files import read_json
from medley.formats.files import records_of
from medley.formats.sample import RecordError
from medley.questions import CLOSED, OPEN, Question


def paired(
    questions: Sequence[Question], answers: Path, skip_missing: bool = False
) -> tuple[list[Case], int]:
    """Cases in the order of the questions, and how many of them have no answer.

    Those count as answered with nothing, unless they are skipped. Raises UserError for a question
    without its right answer, an answer to no question, or two answers to one.
    """
    given = answers_by(answers)
    cases: list[Case] = []
    missing = 0
    for question in questions:
        texts = given.get(_key(question.identifier), [])
        if not texts:
            missing += 1
            if skip_missing:
                continue
        cases.append(case_of(question, texts.pop(0) if texts else ""))
    left = [key for key, texts in given.items() if texts]
    if left:
        raise UserError(
            f"{answers}: {len(left)} ids have more answers than there are questions, the first is "
            f"{left[0]!r}: is it the answer file of another data set, or split?"
        )
    if not cases:
        raise UserError(f"{answers}: no question has an answer in it")
    return cases, missing


def answers_by(path: Path) -> dict[str, list[str]]:
    """The texts of an answer file by id, in their order."""
    given: dict[str, list[str]] = {}
    for place, row in _rows(path):
        _check(place, row)
        if not isinstance(row["text"], str):
            raise UserError(f"{place}: its text is {row['text']!r}, expected text")
        given.setdefault(_key(row["question_id"]), []).append(row["text"])
    return given


def case_of(question: Question, answer: str) -> Case:
    """Without an answer_type, yes and no are closed and the rest is open. Raises UserError for a
    question without its right answer."""
    if question.gold is None:
        raise UserError(f"question {question.identifier}: the file has no right answer to it")
    says = question.gold.strip().lower().rstrip(".")
    kind = question.kind or (CLOSED if says in ("yes", "no") else OPEN)
    return Case(
        question.identifier, question.text, question.gold, answer, kind, question.image,
        question.fields,
    )  # fmt: skip


def _key(identifier: Any) -> str:
    return str(identifier)  # some tools make texts of numbers


def _check(place: str, row: Any) -> None:
    if not isinstance(row, dict) or "question_id" not in row or "text" not in row:
        raise UserError(f"{place}: expected question_id and text")


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    for place, _, row in records_of(path):
        if isinstance(row, RecordError):
            raise UserError(f"{place}: {row}")
        yield place, row


def read_candidates(path: Path) -> list[Any]:
    """Open answers of the train set: a list, or LLaVA-Med's object with one under "0"."""
    found = read_json(path)
    values = found.get("0") if isinstance(found, dict) else found
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of answers, or one under the key 0")
    return values


def by_identifier(path: Path) -> dict[str, Any]:
    """An answer file by id. Raises UserError where an id has two answers."""
    found: dict[str, Any] = {}
    for place, row in _rows(path):
        _check(place, row)
        if found.setdefault(_key(row["question_id"]), row) is not row:
            raise UserError(f"{place}: a second answer to {row['question_id']!r}")
    return found


def missing_of(wanted: Iterable[str], answers: dict[str, Any]) -> list[str]:
    return [identifier for identifier in wanted if identifier not in answers]
