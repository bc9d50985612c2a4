"""Questions with right answers, and an answer file: put together by id and place, not one lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from medley.errors import UserError
from medley.evaluation.vqa import CLOSED, OPEN, Case
from medley.files import read_json
from medley.formats.files import records_of
from medley.formats.llava import TURNS
from medley.formats.sample import RecordError
from medley.vocabulary import IMAGE

_KINDS = (OPEN, CLOSED)


def read_cases(gold: Path, answers: Path, skip_missing: bool) -> tuple[list[Case], int]:
    """Cases in the order of the gold file, and how many questions have no answer.

    Those count as answered with nothing, unless they are skipped. Raises UserError for a bad
    record, an answer to no question, or two answers to one.
    """
    given: dict[Any, list[str]] = {}
    for place, row in _rows(answers):
        if not isinstance(row, dict) or "question_id" not in row or "text" not in row:
            raise UserError(f"{place}: expected question_id and text")
        if not isinstance(row["text"], str):
            raise UserError(f"{place}: its text is {row['text']!r}, expected text")
        given.setdefault(_key(row["question_id"]), []).append(row["text"])
    cases: list[Case] = []
    missing = 0
    for place, row in _rows(gold):
        case, key = _case(place, row)
        texts = given.get(key, [])
        if not texts:
            missing += 1
            if skip_missing:
                continue
        cases.append(_with_answer(case, texts.pop(0) if texts else ""))
    left = [key for key, texts in given.items() if texts]
    if left:
        raise UserError(
            f"{answers}: {len(left)} ids have more answers than {gold} has questions, the first is "
            f"{left[0]!r}: is it the answer file of another data set, or split?"
        )
    if not cases:
        raise UserError(f"{gold}: no questions in it")
    return cases, missing


def _key(identifier: Any) -> str:
    return str(identifier)  # some tools make texts of numbers


def _with_answer(case: Case, answer: str) -> Case:
    return Case(
        case.identifier, case.question, case.gold, answer, case.kind, case.image, case.fields
    )


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    for place, _, row in records_of(path):
        if isinstance(row, RecordError):
            raise UserError(f"{place}: {row}")
        yield place, row


def _case(place: str, row: Any) -> tuple[Case, str]:
    try:
        turns = next(row[name] for name in TURNS if name in row)
        asked, answered = turns[0]["value"], turns[1]["value"]
        kind, identifier = row["answer_type"], row["id"]
    except (StopIteration, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{place}: expected id, answer_type and two turns of conversation ({error} is missing)"
        ) from error
    if len(turns) != 2:
        raise UserError(f"{place}: {len(turns)} turns, expected a question and its answer")
    if not isinstance(asked, str) or isinstance(answered, bool | None | list | dict):
        raise UserError(f"{place}: the question or its answer is no text")
    if str(kind).strip().upper() not in _KINDS:
        raise UserError(f"{place}: answer_type is {kind!r}, expected OPEN or CLOSED")
    fields = {n: v for n, v in row.items() if n not in TURNS}
    text = asked.replace(IMAGE, "").strip()
    image = row.get("image") if isinstance(row.get("image"), str) else None
    case = Case(identifier, text, str(answered), "", str(kind).strip().upper(), image, fields)
    return case, _key(identifier)


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
        if not isinstance(row, dict) or "question_id" not in row or "text" not in row:
            raise UserError(f"{place}: expected question_id and text")
        if found.setdefault(_key(row["question_id"]), row) is not row:
            raise UserError(f"{place}: a second answer to {row['question_id']!r}")
    return found


def missing_of(wanted: Iterable[str], answers: dict[str, Any]) -> list[str]:
    return [identifier for identifier in wanted if identifier not in answers]
