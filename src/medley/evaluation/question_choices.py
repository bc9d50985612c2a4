"""The choices of questions, as `medley answer --choices` names them."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from medley.errors import UserError
from medley.evaluation.choice_scores import normalize_choice
from medley.evaluation.questions import Question

RECORD, LETTERS = "record", "letters"
CHOICE = "{choice}"  # where a template has the choice
_FIELD = "choices"


def parse_choices(words: Sequence[str]) -> list[str]:
    """`yes,no` or `yes no` -> the choices. A single word is split at its commas.

    RECORD and LETTERS stay as they are. Raises UserError unless there are two or more different
    choices.
    """
    choices = words[0].split(",") if len(words) == 1 else list(words)
    choices = [choice.strip() for choice in choices]
    if choices not in ([RECORD], [LETTERS]):
        _check("--choices", choices)
    return choices


def choices_of(
    questions: Sequence[Question], choices: Sequence[str]
) -> list[list[str] | UserError]:
    """The choices of each question: the same for all, those of its record, or their letters.

    A question whose record does not have valid ones has the error instead. Raises it if that is so
    for all questions.
    """
    if list(choices) not in ([RECORD], [LETTERS]):
        return [list(choices)] * len(questions)
    own: list[list[str] | UserError] = []
    for question in questions:
        try:
            own.append(_of_record(question, list(choices) == [LETTERS]))
        except UserError as error:
            own.append(error)
    if isinstance(own[0], UserError) and all(isinstance(one, UserError) for one in own):
        raise UserError(f"Question {questions[0].identifier}: {own[0]}")
    return own


def _of_record(question: Question, as_letters: bool) -> list[str]:
    choices = question.fields.get(_FIELD)
    if choices is None:
        raise UserError(
            f"The record has no {_FIELD!r}. Name the choices, such as --choices yes,no, or remove "
            "the question."
        )
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{_FIELD!r} must be a list of texts (got {choices!r}).")
    if as_letters and len(choices) > len(ascii_uppercase):
        raise UserError(
            f"{_FIELD!r} has more texts than there are letters (got {len(choices)}, expected at "
            f"most {len(ascii_uppercase)}). Use --choices {RECORD}."
        )
    own = list(ascii_uppercase[: len(choices)]) if as_letters else choices
    _check(_FIELD, own)
    return own


def _check(where: str, choices: Sequence[str]) -> None:
    """Raises UserError unless these are choices that `medley evaluate` can tell apart."""
    seen: dict[str, str] = {}
    for number, choice in enumerate(choices, 1):
        if not choice.strip():
            raise UserError(f"{where}: Choice {number} of {len(choices)} is empty. Remove it.")
        key = normalize_choice(choice)
        if key in seen:
            raise UserError(
                f"{where}: Two choices are the same without regard to case and spaces (got "
                f"{seen[key]!r} and {choice!r}). Change or remove one."
            )
        seen[key] = choice
    if len(choices) < 2:
        raise UserError(
            f"{where}: Expected two or more choices (got {', '.join(choices) or 'none'})."
        )
