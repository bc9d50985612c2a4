"""Answer files matched to questions with gold answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medley.data.vocabulary import IMAGE
from medley.errors import UserError
from medley.evaluation.examples import Example
from medley.evaluation.questions import CLOSED, OPEN, Question
from medley.evaluation.records import read_objects
from medley.evaluation.yes_no import gold_normality, gold_yes_no
from medley.utils.files import read_json


@dataclass(frozen=True)
class Prediction:
    """A row of an answer file.

    Attributes:
        text: the answer
        prompt: its question without `<image>`
        where: location of the row
        choices: the field `choices`, not validated; None without it
    """

    text: str
    prompt: str
    where: str = ""
    choices: Any = None


def read_predictions(path: Path) -> dict[str, list[Prediction]]:
    """The answers of a file by question id, in the file's order."""
    predictions: dict[str, list[Prediction]] = {}
    for where, row in read_objects(path):
        _check_answer(where, row)
        prompt = _without_placeholder(str(row.get("prompt", "")))
        prediction = Prediction(row["text"], prompt, where, row.get("choices"))
        predictions.setdefault(_normalize_id(row["question_id"]), []).append(prediction)
    return predictions


def read_unique_answers(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of an answer file by question id. Raises UserError for a repeated id."""
    answers: dict[str, dict[str, Any]] = {}
    for where, row in read_objects(path):
        _check_answer(where, row)
        if answers.setdefault(_normalize_id(row["question_id"]), row) is not row:
            raise UserError(f"{where}: Duplicate answer to question {row['question_id']!r}.")
    return answers


def missing_ids(wanted: Iterable[str], answers: Collection[str]) -> list[str]:
    return [identifier for identifier in wanted if identifier not in answers]


def match_predictions(
    questions: Sequence[Question], path: Path, skip_missing: bool = False
) -> tuple[list[Example], int]:
    """Examples in the order of the questions, and the number of questions without an answer.

    A missing answer counts as an empty one, unless `skip_missing` leaves its question out. Raises
    the errors of `pair_predictions`, and UserError for a question without a gold answer and for a
    file without answers that count.
    """
    paired = pair_predictions(questions, path)
    examples = [
        to_example(question, "" if prediction is None else prediction.text)
        for question, prediction in zip(questions, paired, strict=True)
        if prediction is not None or not skip_missing
    ]
    if not examples:
        raise UserError(f"{path}: The file answers none of the questions.")
    return examples, sum(prediction is None for prediction in paired)


def pair_predictions(questions: Sequence[Question], path: Path) -> list[Prediction | None]:
    """The row of an answer file for each question; None if it is missing.

    Questions that share an id are matched by the prompts in the answer file, else by their order.

    Raises:
        UserError: an answer has no question, a question has two answers, or the answers to
            questions with the same id are ambiguous
    """
    predictions = read_predictions(path)
    questions_by_id: dict[str, list[Question]] = {}
    for question in questions:
        questions_by_id.setdefault(_normalize_id(question.identifier), []).append(question)
    surplus = [
        key for key, own in predictions.items() if len(own) > len(questions_by_id.get(key, []))
    ]
    if surplus:
        raise UserError(
            f"{path}: {len(surplus)} ids have more answers than questions; the first is "
            f"{surplus[0]!r}. Check that the answers belong to this dataset and split."
        )
    paired: dict[int, Prediction | None] = {}  # by object identity, since two may be equal
    for key, own in questions_by_id.items():
        matched = _match_by_prompt(path, key, own, predictions.get(key, []))
        paired |= {id(question): one for question, one in zip(own, matched, strict=True)}
    return [paired[id(question)] for question in questions]


def _match_by_prompt(
    path: Path, key: str, questions: Sequence[Question], predictions: Sequence[Prediction]
) -> list[Prediction | None]:
    """The answer to each question of one id; None if it is missing."""
    if len(questions) == 1:
        return [predictions[0] if predictions else None]
    rest = list(predictions)
    matched: list[Prediction | None] = []
    for question in questions:
        prompt = _without_placeholder(question.raw_text)
        match = next((prediction for prediction in rest if prediction.prompt == prompt), None)
        matched.append(match)
        if match is not None:
            rest.remove(match)
    if not rest:
        return matched
    if len(predictions) == len(questions):
        return list(predictions)
    raise UserError(
        f"{path}: {len(questions)} questions share the id {key!r}, and the prompts of its "
        f"{len(predictions)} answers do not determine which questions they belong to."
    )


def to_example(question: Question, answer: str) -> Example:
    """An example; without an answer_type, gold answers yes, no and normality are closed.

    Raises UserError for a question without a gold answer.
    """
    if question.gold is None:
        raise UserError(f"Question {question.identifier}: The gold answer is missing.")
    is_closed = gold_yes_no(question.gold) or gold_normality(question.gold)
    kind = question.kind or (CLOSED if is_closed else OPEN)
    return Example(
        question.identifier, question.text, question.gold, answer, kind, question.image,
        question.fields,
    )  # fmt: skip


def _without_placeholder(prompt: str) -> str:
    return prompt.replace(IMAGE, "").strip()


def _normalize_id(identifier: Any) -> str:
    return str(identifier)  # Some tools convert numbers to strings.


def _check_answer(where: str, row: dict[str, Any]) -> None:
    if "question_id" not in row or "text" not in row:
        raise UserError(f"{where}: Expected question_id and text.")
    if not isinstance(row["text"], str):
        raise UserError(f"{where}: text must be a string (got {row['text']!r}).")


def read_candidates(path: Path) -> list[Any]:
    """Open answers of a training set: a list, or LLaVA-Med's object with a list under "0"."""
    content = read_json(path)
    values = content.get("0") if isinstance(content, dict) else content
    if not isinstance(values, list):
        raise UserError(f'{path}: Expected a list of answers, or an object with a list under "0".')
    return values


# --- several answer files ---------------------------------------------------------------------


def find_question_files(path: Path) -> dict[str, Path]:
    """Dataset name -> question file: `path` itself, or NAME.json and NAME/test.json below it."""
    if path.is_file():
        return {path.parent.resolve().name if path.stem == "test" else path.stem: path}
    files = {file.parent.name: file for file in sorted(path.glob("*/test.json"))}
    files |= {file.stem: file for file in sorted(path.glob("*.json"))}
    if not files:
        raise UserError(
            f"{path}: Expected a file, or a folder with NAME.json or NAME/test.json files."
        )
    return files


def dataset_of(answer_file: Path, datasets: Mapping[str, Path]) -> str:
    """The dataset whose name is a whole word in an answer file's relative path.

    The file name is searched first, then its folders. A single dataset matches every file. Raises
    UserError if no dataset or several match.
    """
    if len(datasets) == 1:
        return next(iter(datasets))
    matches: list[str] = []
    for part in (answer_file.name, *reversed(answer_file.parent.parts)):
        found = [name for name in datasets if _has_word(part, name)]
        # vqa_rad contains the word of a dataset named rad: the longer name wins.
        matches = [n for n in found if not any(n != m and _has_word(m, n) for m in found)]
        if matches:
            break
    if len(matches) != 1:
        raise UserError(
            f"{answer_file}: The path must contain the name of one dataset (got "
            f"{', '.join(matches) or 'none'}, expected one of {', '.join(datasets)})."
        )
    return matches[0]


def _has_word(text: str, word: str) -> bool:
    pattern = rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])"
    return re.search(pattern, text, re.IGNORECASE) is not None
