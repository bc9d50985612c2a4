"""Classification metrics against scikit-learn's own, thresholds, predictions of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from classification_tasks import BINARY, make_task, random_task
from numpy.typing import NDArray
from sklearn import metrics as reference

from medley.data.document import Document, ImagePart, Turn
from medley.errors import UserError
from medley.evaluation.choice_scores import probabilities_of
from medley.evaluation.classification import build_tasks, find_class
from medley.evaluation.classification_metrics import (
    bootstrap,
    choose_threshold,
    class_metrics,
    compute_metrics,
    decide,
)
from medley.evaluation.classification_report import group_masks, reliability_points, roc_points
from medley.evaluation.predictions import Prediction
from medley.evaluation.questions import Question


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_binary_metrics_equal_scikit_learn(seed: int, ties: bool) -> None:
    task = random_task(2, 150, seed, ties)
    truth, values = task.gold == 1, task.probabilities[:, 1]
    for thresholds, decided in ((None, task.predicted), ({1: 0.6}, (values >= 0.6).astype(int))):
        own = compute_metrics(task, thresholds)
        expected = {
            "accuracy": reference.accuracy_score(task.gold, decided),
            "balanced accuracy": reference.balanced_accuracy_score(task.gold, decided),
            "F1": reference.f1_score(task.gold, decided),
            "sensitivity": reference.recall_score(task.gold, decided),
            "specificity": reference.recall_score(task.gold, decided, pos_label=0),
            "AUROC": reference.roc_auc_score(truth, values),
            "average precision": reference.average_precision_score(truth, values),
            "Brier score": reference.brier_score_loss(truth, values),
            "ECE": calibration_error(truth, values),
        }
        assert own == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}


def calibration_error(truth: NDArray[Any], values: NDArray[Any]) -> float:
    """The definition: the weighted gap of each of ten equal bins."""
    bins = np.minimum((values * 10 + 1e-12).astype(int), 9)
    own = [bins == index for index in range(10) if (bins == index).any()]
    return float(sum(m.mean() * abs(truth[m].mean() - values[m].mean()) for m in own))


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_several_classes_equal_scikit_learn(classes: int, seed: int) -> None:
    task = random_task(classes, 200, seed)
    own = compute_metrics(task)
    one_hot = np.eye(classes)[task.gold]
    correct = task.gold == task.predicted
    expected = {
        "accuracy": reference.accuracy_score(task.gold, task.predicted),
        "balanced accuracy": reference.balanced_accuracy_score(task.gold, task.predicted),
        "F1": reference.f1_score(task.gold, task.predicted, average="macro"),
        "AUROC": reference.roc_auc_score(task.gold, task.probabilities, multi_class="ovr"),
        "average precision": reference.average_precision_score(one_hot, task.probabilities),
        "Brier score": ((task.probabilities - one_hot) ** 2).sum(1).mean(),
        "ECE": calibration_error(correct, task.probabilities.max(1)),
    }
    assert own == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    for index in range(classes):
        one = class_metrics(task, index)
        truth, decided = task.gold == index, task.predicted == index
        assert one["AUROC"] == pytest.approx(
            reference.roc_auc_score(truth, task.probabilities[:, index])
        )
        assert one["specificity"] == pytest.approx(
            reference.recall_score(truth, decided, pos_label=False)
        )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("criterion", ["youden", "accuracy", "f1"])
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_best_one_of_the_validation_split(
    criterion: Any, seed: int, ties: bool
) -> None:
    task = random_task(2, 80, seed, ties)
    chosen = choose_threshold(task, 1, criterion)

    def quality(threshold: float) -> float:
        decided = (task.probabilities[:, 1] >= threshold).astype(int)
        if criterion == "accuracy":
            return float(reference.accuracy_score(task.gold, decided))
        if criterion == "f1":
            return float(reference.f1_score(task.gold, decided, zero_division=0.0))
        return float(reference.balanced_accuracy_score(task.gold, decided))

    candidates = [*np.unique(task.probabilities[:, 1]), 2.0]
    assert quality(chosen) == pytest.approx(max(map(quality, candidates)))
    assert not np.isclose(task.probabilities[:, 1], chosen, rtol=0, atol=1e-9).any()
    assert (decide(task, {1: chosen}) == (task.probabilities[:, 1] >= chosen)).all()


def test_thresholds_at_the_ends() -> None:
    never = make_task([0, 0, 0, 1], [0.9, 1.0, 1.0, 0.2], 1)
    threshold = choose_threshold(never, 1, "accuracy")
    assert not (decide(never, {1: threshold}) == 1).any()
    always = make_task([1, 1, 1, 0], [0.1, 0.2, 0.0, 0.9], 1)
    threshold = choose_threshold(always, 1, "accuracy")
    assert (decide(always, {1: threshold}) == 1).all()
    split = make_task([0, 0, 1, 1], [0.2, 0.4, 0.8, 0.9], 1)
    assert choose_threshold(split, 1, "youden") == pytest.approx(0.6)
    for gold, message in (([1, 1], "other than 'c1'"), ([0, 0], "of 'c1'")):
        with pytest.raises(UserError, match=f"no example {message}"):
            choose_threshold(make_task(gold, [0.2, 0.9], 1), 1, "youden")
    with pytest.raises(UserError, match="no probabilities"):
        choose_threshold(make_task([0, 1], [np.nan, np.nan], 1), 1, "youden")


def test_metrics_of_one_class_are_undefined_with_a_reason() -> None:
    only_negative = compute_metrics(make_task([0, 0, 0], [0.2, 0.7, 0.1], 1))
    for name in ("AUROC", "average precision", "sensitivity", "F1"):
        assert only_negative[name] == "no example of 'c1'"
    assert only_negative["accuracy"] == only_negative["specificity"] == pytest.approx(2 / 3)
    assert only_negative["balanced accuracy"] == pytest.approx(2 / 3)
    assert only_negative["Brier score"] == pytest.approx((0.04 + 0.49 + 0.01) / 3)
    only_positive = compute_metrics(make_task([1, 1], [0.2, 0.7], 1))
    assert only_positive["AUROC"] == "no example other than 'c1'"
    assert only_positive["specificity"] == "no example of 'c0'"
    three = compute_metrics(make_task([0, 1, 1, 0], np.eye(3)[[0, 1, 1, 2]]))
    assert three["AUROC"] == pytest.approx((0.75 + 1.0) / 2)
    assert three["balanced accuracy"] == 0.75
    text = compute_metrics(make_task([0, 1], [np.nan, np.nan], 1))
    assert text["AUROC"] == text["ECE"] == "the answers have no probabilities"
    assert text["accuracy"] == 0.0


def test_intervals_resample_patients() -> None:
    count = 120
    task = random_task(2, count, 3)
    alone, _ = bootstrap([task], {}, 60, 0)
    assert alone == bootstrap([task], {}, 60, 0)[0]
    accuracy = alone["accuracy"]
    width = 2 * 1.96 * (accuracy["value"] * (1 - accuracy["value"]) / count) ** 0.5
    assert accuracy["high"] - accuracy["low"] == pytest.approx(width, rel=0.4)
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    repeated = task.take(np.repeat(np.arange(count), 9))  # nine images of each patient
    together = bootstrap([repeated], {}, 60, 0)[0]["accuracy"]
    assert together["high"] - together["low"] == pytest.approx(width, rel=0.4)
    assert together["n"] == 9 * count
    rare = make_task([1, *[0] * 9], np.linspace(0.9, 0.1, 10), 1)
    assert 20 < bootstrap([rare], {}, 60, 0)[0]["AUROC"]["resamples"] < 55


def test_means_over_findings_leave_undefined_ones_out() -> None:
    first, second = random_task(2, 60, 0), make_task([0, 0, 0], [0.2, 0.4, 0.6], 1)
    overall, (one, two) = bootstrap([first, replace(second, name="mass")], {}, 30, 0)
    assert overall["AUROC"]["value"] == one["AUROC"]["value"]
    assert two["AUROC"]["undefined"] == "no example of 'c1'"
    both = (one["accuracy"]["value"] + two["accuracy"]["value"]) / 2
    assert overall["accuracy"]["value"] == pytest.approx(both)
    assert overall["accuracy"]["n"] == 63


def test_curves() -> None:
    task = random_task(2, 900, 0)
    truth, values = task.gold == 1, task.probabilities[:, 1]
    points = roc_points(truth, values)
    assert points[0] == (0.0, 0.0)
    assert points[-1] == (1.0, 1.0)
    x, y = np.array(points).T
    assert np.trapezoid(y, x) == pytest.approx(reference.roc_auc_score(truth, values), abs=5e-3)
    assert roc_points(truth[truth], values[truth]) == []
    assert reliability_points(np.array([True, False, True]), np.array([0.05, 0.05, 0.95])) == [
        (pytest.approx(0.05), 0.5), (pytest.approx(0.95), 1.0),
    ]  # fmt: skip


# --- rows -------------------------------------------------------------------------------------


def prediction(*choices: Any, text: str = "") -> Prediction:
    return Prediction(text, "", "a.jsonl:1", list(choices) or None)


def test_probabilities_are_read_in_the_order_of_the_classes() -> None:
    rows = ({"text": "Pneumonia ", "probability": 0.75}, {"text": "normal", "probability": 0.25})
    assert probabilities_of(prediction(*rows), BINARY) == pytest.approx([0.25, 0.75])
    rows = ({"text": "pneumonia", "logprob": -700.0}, {"text": "normal", "logprob": -701.0})
    expected = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    assert probabilities_of(prediction(*rows), BINARY) == pytest.approx(expected)
    assert probabilities_of(prediction(), BINARY) is None


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([{"text": "normal", "probability": 1.0}], "two or more different texts"),
        ([{"text": "normal", "probability": 0.5}, {"text": "Normal ", "probability": 0.5}],
         "two or more different texts"),
        ([{"text": "normal", "probability": 0.5}, {"text": " ", "probability": 0.5}],
         "Each choice needs a text"),
        ([{"text": "normal", "probability": 0.5}, {"text": "mass", "probability": 0.5}],
         "are not those of the question (got normal, mass, expected normal, pneumonia)"),
        ([{"text": "normal", "probability": 0.5}, {"text": "pneumonia", "probability": 0.7}],
         "must be 0 or more and sum to 1 (got 0.5, 0.7)"),
        ([{"text": "normal", "probability": -0.5}, {"text": "pneumonia", "probability": 1.5}],
         "must be 0 or more"),
        ([{"text": "normal", "probability": None}, {"text": "pneumonia", "probability": 1.0}],
         "probability of 'normal' must be a number (got None)"),
        ([{"text": "normal", "logprob": "x"}, {"text": "pneumonia", "logprob": -1}],
         "logprob of 'normal' must be a number (got 'x')"),
        ([{"text": "normal", "logprob": float("nan")}, {"text": "pneumonia", "logprob": -1}],
         "must be a number (got nan)"),
        ([{"text": "normal"}, {"text": "pneumonia"}], "needs a logprob or a probability"),
        (["normal", "pneumonia"], "must be a list of objects"),
        ({"normal": 1}, "must be a list of objects"),
    ],
)  # fmt: skip
def test_bad_choices_are_refused(choices: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        probabilities_of(Prediction("", "", "a.jsonl:1", choices), BINARY)
    assert str(error.value).startswith("a.jsonl:1: choices")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "classes", "expected"),
    [
        ("pneumonia", BINARY, 1), ("Pneumonia.", BINARY, 1), ("It shows pneumonia.", BINARY, 1),
        ("", BINARY, -1), ("normal or pneumonia", BINARY, -1), ("a cat", BINARY, -1),
        ("no pneumonia", BINARY, -1), ("Yes, there is.", ("no", "yes"), 1),
        ("yes and no", ("no", "yes"), -1),
        ("bacterial pneumonia", ("pneumonia", "bacterial pneumonia"), 1),
        ("It is bacterial pneumonia", ("pneumonia", "bacterial pneumonia"), 1),
        ("3", ("0", "1", "2", "3"), 3),
    ],
)  # fmt: skip
def test_a_class_is_found_in_text(text: str, classes: Sequence[str], expected: int) -> None:
    assert find_class(text, classes) == expected


def question(number: int, gold: str, **fields: Any) -> Question:
    prompt = Document((Turn("user", (ImagePart(path=f"{number}.png"), "Which?")),))
    return Question(number, "<image>Which?", prompt, gold, "CLOSED", fields)


def test_tasks_have_the_choices_of_their_questions() -> None:
    choices = list(BINARY)
    questions = [question(0, "normal", choices=choices), question(1, "Pneumonia", choices=choices)]
    (task,) = build_tasks(questions, [prediction(text="normal"), None])
    assert (task.classes, task.positive) == (BINARY, 1)
    assert (task.gold.tolist(), task.predicted.tolist()) == ([0, 1], [0, -1])
    assert build_tasks(questions, [prediction(text="normal")] * 2, "Normal")[0].positive == 0
    assert len(build_tasks(questions, [prediction(text="normal"), None], None, True)[0]) == 1
    plain = [question(0, "yes"), question(1, "no"), question(2, "yes")]
    (task,) = build_tasks(plain, [prediction(text="yes")] * 3)
    assert (task.classes, task.positive) == (("no", "yes"), 1)
    for bad, message in (
        ([question(0, "x", choices=choices)], "not a choice (got 'x', expected normal"),
        ([question(0, "normal", choices=["normal"])], "two or more different choices"),
        ([question(0, "normal", choices=["normal", "NORMAL"])], "two or more different choices"),
        ([*questions, question(2, "a", choices=["a", "b"])], "have different choices"),
        ([question(0, "normal", choices="ab")], "must be a list of texts"),
        ([question(0, "yes")], "two or more different choices"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            build_tasks(bad, [prediction(text="a")] * len(bad))
    with pytest.raises(UserError, match="--positive x: Not a class"):
        build_tasks(questions, [None, None], "x")


def test_groups_of_a_field() -> None:
    questions = [
        question(number, "normal", choices=list(BINARY), age=str(number), sex="FM"[number % 2])
        for number in range(40)
    ]
    questions.append(question(40, "normal", choices=list(BINARY), age=None))
    tasks = build_tasks(questions, [prediction(text="normal")] * 41)
    sexes = group_masks(tasks, "sex")
    assert {name: int(masks[0].sum()) for name, masks in sexes.items()} == {
        "F": 20, "M": 20, "(none)": 1,
    }  # fmt: skip
    ages = group_masks(tasks, "age")
    assert list(ages) == [
        "up to 9.75", "9.75 to 19.5", "19.5 to 29.25", "above 29.25", "(none)",
    ]  # fmt: skip
    assert [int(masks[0].sum()) for masks in ages.values()] == [10, 10, 10, 10, 1]
    with pytest.raises(UserError, match=r"No record has this field \(got age, choices, sex\)"):
        group_masks(tasks, "organ")
