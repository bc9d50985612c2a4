"""ScienceQA's answers: the letter that a text names, as LLaVA's scorer finds it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from medley.vocabulary import IMAGE

FAILED = "FAILED"
LETTERS = "ABCDE"
# As published: the period is any character, and one has to follow.
_PUBLISHED = re.compile(r"The answer is ([A-Z]).")
_OURS = re.compile(r"\bthe answer is:? \(?([A-Z])\b", re.IGNORECASE)
_ALONE = re.compile(r"\(?([A-Z])\)?(?:[.:)\s].*)?", re.DOTALL)


def parsed_letter(text: str, as_published: bool) -> str:
    """The letter of an answer: alone, before a period and words, or the only one that "The answer
    is" names. FAILED where there is none."""
    if as_published:
        if text in LETTERS and len(text) == 1:
            return text
        if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
            return text[0]
        found = _PUBLISHED.findall(text)
        return str(found[0]) if len(found) == 1 else FAILED
    named = {str(letter).upper() for letter in _OURS.findall(text)}
    if named:
        return named.pop() if len(named) == 1 else FAILED
    alone = _ALONE.fullmatch(text.strip())
    return alone[1] if alone else FAILED


def score(
    problems: Mapping[str, Any],
    wanted: Sequence[str],
    answers: Mapping[str, Any],
    as_published: bool,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """(rows that are right and wrong, the result file) of the problems of a split.

    A problem without an answer is wrong. The published code gives -1 for a letter beyond the
    choices.
    """
    rows: dict[str, list[dict[str, Any]]] = {"correct": [], "incorrect": []}
    results: dict[str, int] = {}
    outputs: dict[str, str] = {}
    for identifier in wanted:
        problem, answer = problems[identifier], answers.get(identifier)
        text = FAILED if answer is None else str(answer["text"])
        prompt = "Unknown" if answer is None else str(answer.get("prompt", ""))
        letter = FAILED if answer is None else parsed_letter(text, as_published)
        place = LETTERS.find(letter) if len(letter) == 1 else -1
        place = place if place < len(problem["choices"]) else -1
        results[identifier], outputs[identifier] = place, text
        is_right = place == problem["answer"]
        rows["correct" if is_right else "incorrect"].append({
            "question_id": identifier, "parsed_ans": letter,
            "ground_truth": LETTERS[problem["answer"]], "question": prompt, "pred": text,
            "is_multimodal": IMAGE in prompt,
        })  # fmt: skip
    right, count = len(rows["correct"]), len(wanted)
    accuracy = right / count * 100 if count else 0.0
    result = {
        "acc": accuracy, "correct": right, "count": count, "results": results, "outputs": outputs,
    }  # fmt: skip
    return rows, result
