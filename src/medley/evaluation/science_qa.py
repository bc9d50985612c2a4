"""ScienceQA answers: the letter in a text, as LLaVA's scorer finds it or our way; the scores."""

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
from medley.datasets.science_qa import PROBLEMS, SPLITS, problem_image_folder
from medley.errors import UserError
from medley.evaluation.choice_letters import find_letter
from medley.evaluation.confidence import proportion_interval
from medley.evaluation.examples import Example, ScoredExample
from medley.evaluation.predictions import missing_ids
from medley.evaluation.report import Table, confusion_table, metrics_table
from medley.utils.files import read_json

Compat = Literal["none", "llava", "llava_med"]

FAILED = "FAILED"
LETTERS = "ABCDE"  # of the published scorers
# As published: the unescaped period matches any character, which must be present.
_PUBLISHED = re.compile(r"The answer is ([A-Z]).")


def parse_letter(text: str, compat: Compat = "none", choices: Sequence[str] = ()) -> str:
    """The letter of an answer, or FAILED.

    Our own rules are in `choice_letters.py`. A published scorer wants the letter alone, before a
    period and text, or once after "The answer is".
    """
    if compat == "llava_med":
        matches = _PUBLISHED.findall(text)
        return str(matches[0]) if len(matches) == 1 else FAILED
    if compat == "llava":
        if text in LETTERS and len(text) == 1:
            return text
        if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
            return text[0]
        matches = _PUBLISHED.findall(text)
        return str(matches[0]) if len(matches) == 1 else FAILED
    return find_letter(text, choices) or FAILED


def parse_last_letter(text: str) -> str:
    """The letter of the last line that has one; the lines before it are reasons."""
    letters = (parse_letter(line) for line in reversed(text.splitlines()) if line.strip())
    return next((letter for letter in letters if letter != FAILED), FAILED)


# --- problems ---------------------------------------------------------------------------------


def read_problems(folder: Path, split: str) -> tuple[dict[str, Any], list[str]]:
    """All problems by id, and the ids of a split. Raises UserError for an invalid problem."""
    problems, splits = read_json(folder / PROBLEMS), read_json(folder / SPLITS)
    if not isinstance(problems, dict) or not isinstance(splits, dict):
        raise UserError(f"{folder}: {PROBLEMS} and {SPLITS} must be objects.")
    if not isinstance(splits.get(split), list):
        raise UserError(f"--split {split}: Unknown split (expected one of {', '.join(splits)}).")
    wanted = [str(identifier) for identifier in splits[split]]
    if unknown := missing_ids(wanted, problems):
        raise UserError(f"{folder / PROBLEMS}: Problem {unknown[0]} is missing.")
    for identifier in wanted:
        where = f"{folder / PROBLEMS}: problem {identifier}"
        check_problem(where, problems[identifier])
    return problems, wanted


def check_problem(where: str, problem: Any) -> None:
    """Raises UserError for a problem without choices or without a valid answer index."""
    choices = problem.get("choices") if isinstance(problem, dict) else None
    answer = problem.get("answer") if isinstance(problem, dict) else None
    limit = len(ascii_uppercase)
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices[:limit]):
        raise UserError(f"{where}: choices must be a list of strings.")
    if type(answer) is not int or not 0 <= answer < min(len(choices), limit):
        raise UserError(
            f"{where}: answer is invalid (got {answer!r}, expected 0 to {len(choices) - 1})."
        )


# --- scores -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScienceQaScores:
    """Correct and incorrect rows as LLaVA writes them, and the content of its result file."""

    correct: list[dict[str, Any]]
    incorrect: list[dict[str, Any]]
    result: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [*self.correct, *self.incorrect]

    @property
    def unparsed(self) -> int:
        """The number of answers without a letter."""
        return sum(row["parsed_ans"] == FAILED and row["pred"] != FAILED for row in self.rows)

    def summary(self) -> str:
        """The line that LLaVA prints, without image accuracy if there are no images.

        LLaVA divides by zero there.
        """
        n, correct = self.result["count"], self.result["correct"]
        line = f"Total: {n}, Correct: {correct}, Accuracy: {self.result['acc']:.2f}%"
        multimodal = sum(row["is_multimodal"] for row in self.rows)
        if multimodal:
            correct_multimodal = sum(row["is_multimodal"] for row in self.correct)
            line += f", IMG-Accuracy: {100 * correct_multimodal / multimodal:.2f}%"
        return line

    def confusion_matrix(self) -> dict[str, dict[str, int]]:
        """Gold letter -> answered letter -> count."""
        pairs = Counter((row["ground_truth"], row["parsed_ans"]) for row in self.rows)
        columns = sorted({letter for pair in pairs for letter in pair})
        return {
            gold: {letter: pairs[gold, letter] for letter in columns}
            for gold in sorted({gold for gold, _ in pairs})
        }

    def tables(self, problems: Mapping[str, Any]) -> list[Table]:
        """Accuracies with intervals, and the confusion matrix; none without scored problems."""
        n = self.result["count"]
        if not n:
            return []
        metrics = {"accuracy": self.accuracy()}
        multimodal = [row for row in self.rows if row["is_multimodal"]]
        if multimodal:
            hits = sum(row["is_multimodal"] for row in self.correct)
            metrics["accuracy with an image"] = proportion_interval(
                hits, len(multimodal)
            ).as_percent()
        chance = sum(1 / len(problems[row["question_id"]]["choices"]) for row in self.rows) / n
        text = f"Chance level: {100 * chance:.1f} percent."
        return [
            metrics_table("All problems", metrics, text=text),
            confusion_table(self.confusion_matrix()),
        ]

    def accuracy(self) -> dict[str, float]:
        """The accuracy in percent with its 95% interval."""
        return proportion_interval(self.result["correct"], self.result["count"]).as_percent()

    def to_examples(
        self,
        problems: Mapping[str, Any],
        folder: Path | None,
        notes: Mapping[str, str] | None = None,
    ) -> list[ScoredExample]:
        """Examples for a report, in the order of the results; `notes` are by problem id.

        Raises RecordError for an image outside of the folder.
        """
        correct = {row["question_id"] for row in self.correct}
        rows = {row["question_id"]: row for row in self.rows}
        scored = []
        for identifier in self.result["results"]:
            problem, row = problems[identifier], rows[identifier]
            choices = "\n".join(
                f"({letter}) {text}"
                for letter, text in zip(ascii_uppercase, problem["choices"])  # noqa: B905
            )
            image = None
            if problem.get("image") and folder is not None:
                image_folder = problem_image_folder(folder, problem)
                image = resolve_image_path(f"{identifier}/{problem['image']}", image_folder)
            example = Example(
                identifier, f"{problem.get('question', '')}\n{choices}", row["ground_truth"],
                row["pred"], str(problem.get("subject", "")), image,
            )  # fmt: skip
            value = float(identifier in correct)
            note = (notes or {}).get(identifier, "")
            scored.append(ScoredExample(example, {"correct": value, "accuracy": value}, note))
        return scored


def score_answers(
    problems: Mapping[str, Any],
    wanted: Sequence[str],
    answers: Mapping[str, Any],
    compat: Compat = "none",
    seed: int = 0,
) -> ScienceQaScores:
    """Scores of the problems of a split.

    A problem without an answer counts as wrong; LLaVA-Med leaves it out. A letter beyond the
    choices has the index -1 in the results. LLaVA-Med instead samples a random choice, and another
    one for the score; `llava_med` reproduces that with a seed.
    """
    sample_choice = random.Random(seed).randrange
    scores = ScienceQaScores([], [], {})
    results: dict[str, int] = {}
    outputs: dict[str, str] = {}
    for identifier in dict.fromkeys(wanted):
        problem, answer = problems[identifier], answers.get(identifier)
        if answer is None and compat == "llava_med":
            continue
        text = FAILED if answer is None else str(answer["text"])
        prompt = "Unknown" if answer is None else str(answer.get("prompt", ""))
        choices = problem["choices"]
        letter = FAILED if answer is None else parse_letter(text, compat, choices)
        count = len(choices)
        letters = ascii_uppercase if compat == "none" else LETTERS
        index = letters.find(letter) if len(letter) == 1 else -1
        index = index if index < count else -1
        scored_index = results[identifier] = index
        if index < 0 and compat == "llava_med":
            results[identifier], scored_index = sample_choice(count), sample_choice(count)
        outputs[identifier] = text
        rows = scores.correct if scored_index == problem["answer"] else scores.incorrect
        rows.append({
            "question_id": identifier, "parsed_ans": letter,
            "ground_truth": ascii_uppercase[problem["answer"]], "question": prompt, "pred": text,
            "is_multimodal": _is_multimodal(problem, prompt, compat),
        })  # fmt: skip
    correct, count = len(scores.correct), len(results)
    scores.result.update(
        acc=correct / count * 100 if count else 0.0, correct=correct, count=count, results=results,
        outputs=outputs,
    )  # fmt: skip
    return scores


def _is_multimodal(problem: Any, prompt: str, compat: Compat) -> bool:
    """The published code searches the prompt for `<image>`, which LLaVA-Med v1.5's files lack."""
    return bool(problem.get("image")) if compat == "none" else IMAGE in prompt
