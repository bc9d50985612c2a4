"""Questions with right answers, and an answer file: put together by id and place, not one lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medley.data.vocabulary import IMAGE
from medley.datasets.base import RecordError
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.evaluation.cases import Example
from medley.evaluation.matching import is_yes_or_no
from medley.evaluation.questions import CLOSED, OPEN, Question
from medley.utils.files import check_unicode, read_json


def paired(
    questions: Sequence[Question], answers: Path, skip_missing: bool = False
) -> tuple[list[Example], int]:
    """Cases in the order of the questions, and how many of them have no answer.

    Those count as answered with nothing, unless they are skipped. Questions that share an id are
    told apart by the answers' prompts, or else by their order. Raises UserError for a question
    without its right answer, an answer to no question, two answers to one, and where equal ids
    cannot be told apart.
    """
    given = answers_by(answers)
    asked: dict[str, list[Question]] = {}
    for question in questions:
        asked.setdefault(_key(question.identifier), []).append(question)
    left = [key for key, own in given.items() if len(own) > len(asked.get(key, []))]
    if left:
        raise UserError(
            f"{answers}: {len(left)} ids have more answers than there are questions, the first is "
            f"{left[0]!r}: is it the answer file of another data set, or split?"
        )
    texts: dict[int, str] = {}  # by the question's place in memory: equal ones are told apart
    for key, own in asked.items():
        found = _told_apart(answers, key, own, given.get(key, []))
        texts |= {id(q): text for q, text in zip(own, found, strict=True) if text is not None}
    missing = sum(id(question) not in texts for question in questions)
    cases = [
        case_of(question, texts.get(id(question), ""))
        for question in questions if id(question) in texts or not skip_missing
    ]  # fmt: skip
    if not cases:
        raise UserError(f"{answers}: no question has an answer in it")
    return cases, missing


def _told_apart(
    answers: Path, key: str, questions: Sequence[Question], given: Sequence[Prediction]
) -> list[str | None]:
    """The text of each of the questions that share an id; None for one without."""
    if len(questions) == 1:
        return [given[0].text if given else None]
    rest = list(given)
    found: list[str | None] = []
    for question in questions:
        fitting = next((one for one in rest if one.prompt == _bare(question.asked)), None)
        found.append(None if fitting is None else fitting.text)
        if fitting is not None:
            rest.remove(fitting)
    if not rest:
        return found
    if len(given) == len(questions):
        return [one.text for one in given]
    raise UserError(
        f"{answers}: {len(questions)} questions have the id {key!r}, and {len(given)} answers, "
        "whose prompts do not say to which they belong"
    )


@dataclass(frozen=True)
class Prediction:
    """An answer, and the question as its file has it, without marks of pictures."""

    text: str
    prompt: str


def _bare(prompt: str) -> str:
    return prompt.replace(IMAGE, "").strip()


def answers_by(path: Path) -> dict[str, list[Prediction]]:
    """The answers of a file by id, in their order."""
    given: dict[str, list[Prediction]] = {}
    for place, row in _rows(path):
        _check(place, row)
        one = Prediction(row["text"], _bare(str(row.get("prompt", ""))))
        given.setdefault(_key(row["question_id"]), []).append(one)
    return given


def case_of(question: Question, answer: str) -> Example:
    """Without an answer_type, yes and no are closed and the rest is open. Raises UserError for a
    question without its right answer."""
    if question.gold is None:
        raise UserError(f"question {question.identifier}: the file has no right answer to it")
    kind = question.kind or (OPEN if is_yes_or_no(question.gold) is None else CLOSED)
    return Example(
        question.identifier, question.text, question.gold, answer, kind, question.image,
        question.fields,
    )  # fmt: skip


def _key(identifier: Any) -> str:
    return str(identifier)  # some tools make texts of numbers


def _check(place: str, row: Any) -> None:
    if not isinstance(row, dict) or "question_id" not in row or "text" not in row:
        raise UserError(f"{place}: expected question_id and text")
    if not isinstance(row["text"], str):
        raise UserError(f"{place}: its text is {row['text']!r}, expected text")
    check_unicode(place, row)


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


def missing_ids(wanted: Iterable[str], answers: dict[str, Any]) -> list[str]:
    return [identifier for identifier in wanted if identifier not in answers]
