"""ScienceQA's answers: the letter that a text names, as LLaVA's scorer finds it."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from medley.data.vocabulary import IMAGE
from medley.datasets.base import resolve_image_path
from medley.datasets.science_qa import folder_of
from medley.errors import UserError
from medley.evaluation.cases import Example, ScoredExample

Compat = Literal["none", "llava", "llava_med"]

FAILED = "FAILED"
LETTERS = "ABCDE"
# As published: the period is any character, and one has to follow.
_PUBLISHED = re.compile(r"The answer is ([A-Z]).")
# Ours: a letter alone, or before what sets it apart ("A toy" has an article)...
_ALONE = re.compile(rf"\(?([{LETTERS}])\)?(?:[.,:!\uff1a\uff09\n].*)?", re.DOTALL)
_ALONE_SMALL = re.compile(rf"\(?([{LETTERS.lower()}])\)?[.!]?")
# ... or the one that is named, in capitals, or small at the end.
_NAMED = re.compile(
    rf"\b(?i:answer|option|choice)(?i:\s+is)?\s*[:\uff1a]?\s*\(?(?:([{LETTERS}])(?![\w'])"
    rf"|([{LETTERS.lower()}])\)?[.!]?\s*$)"
)
_EMPHASIS = str.maketrans("", "", "*_`")


def parsed_letter(text: str, compat: Compat = "none") -> str:
    """The letter of an answer: alone, before a period and words, or the only one that "The answer
    is" names. FAILED where there is none."""
    if compat == "llava_med":
        found = _PUBLISHED.findall(text)
        return str(found[0]) if len(found) == 1 else FAILED
    if compat == "llava":
        if text in LETTERS and len(text) == 1:
            return text
        if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
            return text[0]
        found = _PUBLISHED.findall(text)
        return str(found[0]) if len(found) == 1 else FAILED
    bare = text.translate(_EMPHASIS).strip()
    named = {str(capital or small).upper() for capital, small in _NAMED.findall(bare)}
    if named:
        return named.pop() if len(named) == 1 else FAILED
    alone = _ALONE.fullmatch(bare) or _ALONE_SMALL.fullmatch(bare)
    return alone[1].upper() if alone else FAILED


def last_letter(text: str) -> str:
    """The letter of the last line that names one: what stands before are reasons."""
    found = (parsed_letter(line) for line in reversed(text.splitlines()) if line.strip())
    return next((letter for letter in found if letter != FAILED), FAILED)


def check_problem(place: str, problem: Any) -> None:
    """Raises UserError for a problem without choices, or without the number of the right one."""
    offered = problem.get("choices") if isinstance(problem, dict) else None
    right = problem.get("answer") if isinstance(problem, dict) else None
    most = len(ascii_uppercase)
    if not isinstance(offered, list) or not all(isinstance(c, str) for c in offered[:most]):
        raise UserError(f"{place}: its choices are no list of texts")
    if type(right) is not int or not 0 <= right < min(len(offered), most):
        raise UserError(f"{place}: its answer is {right!r}, expected 0 to {len(offered) - 1}")


@dataclass(frozen=True)
class Scores:
    """Rows that are right and wrong, as LLaVA writes them, and its result file."""

    correct: list[dict[str, Any]]
    incorrect: list[dict[str, Any]]
    result: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [*self.correct, *self.incorrect]

    @property
    def unread(self) -> int:
        """Answers in which no letter was found."""
        return sum(row["parsed_ans"] == FAILED and row["pred"] != FAILED for row in self.rows)

    def line(self) -> str:
        """What LLaVA prints; without a picture it divides by zero, ours leaves that share out."""
        n, right = self.result["count"], self.result["correct"]
        line = f"Total: {n}, Correct: {right}, Accuracy: {self.result['acc']:.2f}%"
        pictured = sum(row["is_multimodal"] for row in self.rows)
        if pictured:
            own = sum(row["is_multimodal"] for row in self.correct)
            line += f", IMG-Accuracy: {100 * own / pictured:.2f}%"
        return line

    def confusion(self) -> dict[str, dict[str, int]]:
        """Right letter -> given letter -> how often."""
        pairs = Counter((row["ground_truth"], row["parsed_ans"]) for row in self.rows)
        columns = sorted({letter for pair in pairs for letter in pair})
        return {
            right: {given: pairs[right, given] for given in columns}
            for right in sorted({right for right, _ in pairs})
        }

    def cases(self, problems: Mapping[str, Any], folder: Path | None) -> list[ScoredExample]:
        """The same for a report, in the order of the results. Raises RecordError for a picture
        outside of the folder."""
        right = {row["question_id"] for row in self.correct}
        by_name = {row["question_id"]: row for row in self.rows}
        found = []
        for name in self.result["results"]:
            problem, row = problems[name], by_name[name]
            offered = "\n".join(
                f"({letter}) {text}"
                for letter, text in zip(ascii_uppercase, problem["choices"])  # noqa: B905
            )
            image = None
            if problem.get("image") and folder is not None:
                image = resolve_image_path(f"{name}/{problem['image']}", folder_of(folder, problem))
            case = Example(
                name, f"{problem.get('question', '')}\n{offered}", row["ground_truth"],
                row["pred"], str(problem.get("subject", "")), image,
            )  # fmt: skip
            hit = float(name in right)
            found.append(ScoredExample(case, {"right": hit, "accuracy": hit}))
        return found


def score(
    problems: Mapping[str, Any],
    wanted: Sequence[str],
    answers: Mapping[str, Any],
    compat: Compat = "none",
    seed: int = 0,
) -> Scores:
    """Scores of the problems of a split.

    A problem without an answer is wrong; LLaVA-Med leaves it out. A letter beyond the choices
    counts as -1 in the results; LLaVA-Med draws one of the choices there, and where it finds no
    letter, twice (for the results and for the score): so does `llava_med`, from a seed.
    """
    draw = random.Random(seed).randrange
    found = Scores([], [], {})
    results: dict[str, int] = {}
    outputs: dict[str, str] = {}
    for identifier in dict.fromkeys(wanted):
        problem, answer = problems[identifier], answers.get(identifier)
        if answer is None and compat == "llava_med":
            continue
        text = FAILED if answer is None else str(answer["text"])
        prompt = "Unknown" if answer is None else str(answer.get("prompt", ""))
        letter = FAILED if answer is None else parsed_letter(text, compat)
        count = len(problem["choices"])
        place = LETTERS.find(letter) if len(letter) == 1 else -1
        place = place if place < count else -1
        scored = results[identifier] = place
        if place < 0 and compat == "llava_med":
            results[identifier], scored = draw(count), draw(count)
        outputs[identifier] = text
        rows = found.correct if scored == problem["answer"] else found.incorrect
        rows.append({
            "question_id": identifier, "parsed_ans": letter,
            "ground_truth": ascii_uppercase[problem["answer"]], "question": prompt, "pred": text,
            "is_multimodal": _has_picture(problem, prompt, compat),
        })  # fmt: skip
    right, count = len(found.correct), len(results)
    found.result.update(
        acc=right / count * 100 if count else 0.0, correct=right, count=count, results=results,
        outputs=outputs,
    )  # fmt: skip
    return found


def _has_picture(problem: Any, prompt: str, compat: Compat) -> bool:
    """The published code looks into the prompt, where LLaVA-Med v1.5's files have no mark."""
    return bool(problem.get("image")) if compat == "none" else IMAGE in prompt
