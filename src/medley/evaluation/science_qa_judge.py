"""Two ScienceQA answer files, and a judge's decision where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medley.datasets.base import RecordError
from medley.datasets.science_qa import PROBLEMS, format_problem
from medley.errors import UserError
from medley.evaluation.judge import JudgeStats, failure_note, fill_template
from medley.evaluation.predictions import missing_ids, read_unique_answers
from medley.evaluation.science_qa import FAILED, parse_last_letter, parse_letter
from medley.utils.chat_client import Message, RequestFailed
from medley.utils.files import read_json

Answers = Mapping[str, dict[str, Any]]
PROMPT_FORMAT = "QCM-A"


def read_outputs(path: Path) -> dict[str, dict[str, Any]]:
    """The answers by problem id, from an answer file or the `outputs` of a JSON result file."""
    if path.suffix != ".json":
        return read_unique_answers(path)
    content = read_json(path)
    outputs = content.get("outputs") if isinstance(content, dict) else None
    if not isinstance(outputs, dict):
        raise UserError(f"{path}: Expected a result file with outputs by problem.")
    if invalid := [name for name, text in outputs.items() if not isinstance(text, str)]:
        raise UserError(f"{path}: The output of problem {invalid[0]} must be a string.")
    return {name: {"question_id": name, "text": text} for name, text in outputs.items()}


def check_complete(path: Path, answers: Answers, wanted: Sequence[str]) -> None:
    """Raises UserError if the answer to a problem is missing."""
    if missing := missing_ids(wanted, answers):
        raise UserError(
            f"{path}: {len(missing)} problems have no answer; the first is {missing[0]}."
        )


def disagreements(
    wanted: Sequence[str], first: Answers, second: Answers, problems: Mapping[str, Any]
) -> list[str]:
    """The problems whose answers differ, or have no letter."""
    letters = {
        name: [
            parse_letter(str(answers[name]["text"]), choices=problems[name]["choices"])
            for answers in (first, second)
        ]
        for name in wanted
    }
    return [name for name, (a, b) in letters.items() if a != b or FAILED in (a, b)]


def judge_messages(
    where: Path,
    name: str,
    problem: dict[str, Any],
    pair: tuple[str, str],
    templates: dict[str, str],
) -> list[Message]:
    """The request about one problem and the texts of its two answers."""
    try:
        question, _ = format_problem(problem, PROMPT_FORMAT, False)
    except (KeyError, TypeError, RecordError) as error:
        raise UserError(f"{where / PROBLEMS}: problem {name}: {error}") from error
    values = {"question": question, "first": pair[0], "second": pair[1]}
    text = fill_template(templates["question"], values)
    return [{"role": "system", "content": templates["system"]}, {"role": "user", "content": text}]


def has_letter(_: str, reply: str) -> bool:
    return parse_last_letter(reply) != FAILED


@dataclass(frozen=True)
class Adjudication:
    """The first file's answers, replaced by the judge's where its reply has a letter.

    `notes` describe the judge's part in an answer, by problem.
    """

    answers: dict[str, dict[str, Any]]
    notes: dict[str, str]
    stats: JudgeStats

    @classmethod
    def from_replies(
        cls, answers: Answers, replies: Mapping[str, str | RequestFailed]
    ) -> Adjudication:
        is_parsed = {
            name: isinstance(reply, str) and has_letter(name, reply)
            for name, reply in replies.items()
        }
        notes = {
            name: failure_note(reply, is_parsed[name]) or "The judge decided."
            for name, reply in replies.items()
        }
        decided = dict(answers)
        for name in (name for name in replies if is_parsed[name]):
            decided[name] = {**answers[name], "text": parse_last_letter(str(replies[name]))}
        return cls(decided, notes, JudgeStats.from_replies(replies, is_parsed))
