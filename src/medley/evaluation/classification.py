"""Questions with choices and their answers as arrays: gold classes, predictions, probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medley.errors import UserError
from medley.evaluation.choice_scores import choice_texts, normalize_choice, probabilities_of
from medley.evaluation.examples import Example
from medley.evaluation.matching import contains_words, same_answer
from medley.evaluation.predictions import Prediction, to_example
from medley.evaluation.questions import Question
from medley.evaluation.yes_no import NO, YES, find_yes_no

UNCLEAR = "neither"  # an answer that is missing, or that has none of the classes or several
FINDING = "finding"  # field with the class that a yes-no question asks about
PATIENT = "patient_id"


@dataclass(frozen=True)
class Task:
    """Questions with the same classes; N questions, K classes.

    Attributes:
        name: the finding that the questions ask about, "" for none
        classes: the classes
        positive: index of the positive class of two, None for more
        examples: the questions with their answers (N)
        gold: index of the gold class (N)
        predicted: index of the most probable class, or of the class in the answer's text; -1 for
            neither (N)
        probabilities: probability of each class, NaN for an answer without them (N, K)
        clusters: number of the patient, or of the image, or of the question (N)
    """

    name: str
    classes: tuple[str, ...]
    positive: int | None
    examples: tuple[Example, ...]
    gold: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    clusters: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Which answers have probabilities (N)."""
        return ~np.isnan(self.probabilities[:, 0])

    def take(self, indices: NDArray[Any]) -> Task:
        """The questions at indices, which may repeat, or of a mask; without their examples."""
        return replace(
            self, examples=(), gold=self.gold[indices], predicted=self.predicted[indices],
            probabilities=self.probabilities[indices], clusters=self.clusters[indices],
        )  # fmt: skip


def build_tasks(
    questions: Sequence[Question],
    predictions: Sequence[Prediction | None],
    positive: str | None = None,
    skip_missing: bool = False,
) -> list[Task]:
    """One task for each finding, or a single one; questions in their order.

    Args:
        questions: questions with gold answers
        predictions: the row of the answer file of each question
        positive: the positive class of two; by default yes, else the last one
        skip_missing: leave questions without an answer out; they count as wrong otherwise

    Raises:
        UserError: a gold answer is missing or not a choice, or the choices differ
    """
    by_name: dict[str, list[tuple[Question, Prediction | None]]] = {}
    clusters: dict[Any, int] = {}
    for question, prediction in zip(questions, predictions, strict=True):
        _cluster(question, clusters)
        if prediction is not None or not skip_missing:
            name = str(question.fields.get(FINDING, ""))
            by_name.setdefault(name, []).append((question, prediction))
    return [_build_task(name, pairs, positive, clusters) for name, pairs in by_name.items()]


def _cluster(question: Question, clusters: dict[Any, int]) -> int:
    """The number of what is resampled together: the patient, else the image, else the question."""
    patient = question.fields.get(PATIENT)
    if patient is not None:
        key: Any = (PATIENT, str(patient))
    else:
        key = question.image or id(question)
    return clusters.setdefault(key, len(clusters))


def cluster_name(questions: Sequence[Question]) -> str:
    """What the bootstrap resamples."""
    known = sum(question.fields.get(PATIENT) is not None for question in questions)
    if known == len(questions):
        return "patients"
    images = "images" if any(question.image for question in questions) else "questions"
    return f"patients, and {images} of unknown patients" if known else images


def _build_task(
    name: str,
    pairs: Sequence[tuple[Question, Prediction | None]],
    positive: str | None,
    clusters: dict[Any, int],
) -> Task:
    classes = _find_classes(name, pairs)
    gold = np.array([_gold_index(question, classes) for question, _ in pairs])
    probabilities = np.full((len(pairs), len(classes)), np.nan)
    predicted = np.full(len(pairs), -1)
    for row, (_, prediction) in enumerate(pairs):
        if prediction is None:
            continue
        values = probabilities_of(prediction, classes)
        if values is None:
            predicted[row] = find_class(prediction.text, classes)
        else:
            probabilities[row], predicted[row] = values, values.argmax()
    examples = [to_example(q, "" if p is None else p.text) for q, p in pairs]
    own = np.array([_cluster(question, clusters) for question, _ in pairs])
    return Task(
        name, classes, _positive_index(name, classes, positive), tuple(examples), gold, predicted,
        probabilities, own,
    )  # fmt: skip


def _find_classes(
    name: str, pairs: Sequence[tuple[Question, Prediction | None]]
) -> tuple[str, ...]:
    """The choices of the questions, else of the answers, else the gold answers.

    Raises UserError for questions with different choices, and for fewer than two classes.
    """
    where = f"Questions about {name}" if name else "Questions"
    found: list[str] | None = None
    for question, prediction in pairs:
        choices = question.fields.get("choices")
        if choices is None and prediction is not None:
            choices = choice_texts(prediction)
        if choices is None:
            continue
        if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices):
            raise UserError(f"Question {question.identifier}: choices must be a list of texts.")
        if found is None:
            found = choices
        elif set(map(normalize_choice, choices)) != set(map(normalize_choice, found)):
            raise UserError(
                f"{where} have different choices (got {', '.join(found)}; and "
                f"{', '.join(choices)} of question {question.identifier}). Use evaluate vqa."
            )
    if found is None:
        golds = {normalize_choice(q.gold): q.gold.strip() for q, _ in pairs if q.gold is not None}
        found = [golds[key] for key in sorted(golds)]
    if len(set(map(normalize_choice, found))) < max(2, len(found)):
        raise UserError(f"{where} need two or more different choices (got {', '.join(found)}).")
    return tuple(found)


def _gold_index(question: Question, classes: Sequence[str]) -> int:
    if question.gold is None:
        raise UserError(f"Question {question.identifier}: The gold answer is missing.")
    wanted = normalize_choice(question.gold)
    for index, name in enumerate(classes):
        if normalize_choice(name) == wanted:
            return index
    raise UserError(
        f"Question {question.identifier}: The gold answer is not a choice (got {question.gold!r}, "
        f"expected {', '.join(classes)})."
    )


def _positive_index(name: str, classes: Sequence[str], positive: str | None) -> int | None:
    keys = [normalize_choice(one) for one in classes]
    if positive is not None and normalize_choice(positive) not in keys:
        raise UserError(
            f"--positive {positive}: Not a class{f' of {name}' if name else ''} (expected one of "
            f"{', '.join(classes)})."
        )
    if len(classes) != 2:
        return None
    if positive is not None:
        return keys.index(normalize_choice(positive))
    return keys.index(YES) if YES in keys else 1


def find_class(text: str, classes: Sequence[str]) -> int:
    """The class in an answer's text; -1 for none or several.

    This is the class with the same words, else the only one whose words the text contains. Yes
    and no are found by the rules of docs/evaluation-rules.md.
    """
    same = [index for index, name in enumerate(classes) if same_answer(text, name)]
    if len(same) == 1:
        return same[0]
    keys = [normalize_choice(name) for name in classes]
    if set(keys) == {YES, NO}:
        found = find_yes_no(text)
        return -1 if found is None else keys.index(found)
    held = [index for index, name in enumerate(classes) if contains_words(text, name)]
    # "bacterial pneumonia" contains the words of "pneumonia": the longer class wins.
    longest = [
        i for i in held if not any(i != j and contains_words(classes[j], classes[i]) for j in held)
    ]
    return longest[0] if len(longest) == 1 else -1
