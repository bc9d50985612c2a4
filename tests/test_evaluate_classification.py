"""`medley evaluate classification`: metrics against scikit-learn's own, thresholds, bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as reference

from medley import cli
from medley.data.document import Document, ImagePart, Turn
from medley.errors import UserError
from medley.evaluation.choice_scores import probabilities_of
from medley.evaluation.classification import Task, build_tasks, find_class
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

BINARY = ("normal", "pneumonia")


def make_task(gold: Any, probabilities: Any, positive: int | None = None) -> Task:
    gold, values = np.array(gold), np.array(probabilities, float)
    if values.ndim == 1:
        values = np.stack([1 - values, values], 1)
    classes = tuple(f"c{index}" for index in range(values.shape[1]))
    predicted = np.where(np.isnan(values[:, 0]), -1, np.nan_to_num(values).argmax(1))
    return Task("", classes, positive, (), gold, predicted, values, np.arange(len(gold)))


def random_task(classes: int, count: int, seed: int, ties: bool = False) -> Task:
    random = np.random.default_rng(seed)
    gold = random.integers(0, classes, count)
    logits = random.normal(size=(count, classes)) + 1.2 * np.eye(classes)[gold]
    values = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if ties:
        values = np.round(values, 1)
        values[:, 0] += 1 - values.sum(1)
        values = np.clip(values, 0, 1) / np.clip(values, 0, 1).sum(1, keepdims=True)
    return make_task(gold, values, 1 if classes == 2 else None)


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


# --- command ----------------------------------------------------------------------------------


class Files:
    """Question and answer files of a test and a validation split."""

    def __init__(self, folder: Path, classes: Sequence[str] = BINARY, count: int = 30) -> None:
        self.folder, self.classes = folder, classes
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self.golds: dict[str, list[dict[str, Any]]] = {}
        for number, split in enumerate(("test", "val")):
            task = random_task(len(classes), count, number)
            self.golds[split], self.answers[split] = [], []
            for row, values in enumerate(task.probabilities):
                self.golds[split].append({
                    "text": f"<image>Which?<reserved08706>{classes[task.gold[row]]}",
                    "image_path": f"{split}{row}.png", "id": f"{split}-{row}",
                    "choices": list(classes), "patient_id": f"{row // 2}", "sex": "FM"[row % 2],
                })  # fmt: skip
                choices = [
                    {"text": name, "logprob": float(np.log(value)), "probability": float(value)}
                    for name, value in zip(classes, values, strict=True)
                ]
                text = classes[int(values.argmax())]
                self.answers[split].append(
                    {"question_id": f"{split}-{row}", "text": text, "choices": choices}
                )

    def run(self, *flags: Any, validation: bool = False) -> int:
        paths = {}
        for split in ("test", "val"):
            for kind, rows in (("gt", self.golds[split]), ("pred", self.answers[split])):
                path = self.folder / f"{split}_{kind}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                paths[f"{split}_{kind}"] = path
        words = ["evaluate", "classification", "--gt", paths["test_gt"], "--format", "documents",
                 "--pred", paths["test_pred"], "--output", self.folder / "scores.json",
                 "--resamples", 20]  # fmt: skip
        if validation:
            words += ["--val_gt", paths["val_gt"], "--val_pred", paths["val_pred"]]
        return cli.main([str(word) for word in [*words, *flags]])

    def scores(self) -> dict[str, Any]:
        scores: dict[str, Any] = json.loads((self.folder / "scores.json").read_text())
        return scores


def test_a_binary_classification_from_files_to_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = Files(tmp_path)
    assert files.run("--group_by", "sex", validation=True) == 0
    printed = capsys.readouterr().out
    scores = files.scores()
    (task,) = scores["tasks"]
    assert task["positive"] == "pneumonia"
    threshold = task["thresholds"]["pneumonia"]
    truth = ["pneumonia" in row["text"] for row in files.golds["test"]]
    values = [row["choices"][1]["probability"] for row in files.answers["test"]]
    decided = [value >= threshold for value in values]
    expected = reference.accuracy_score(truth, decided)
    assert scores["scores"]["accuracy"]["value"] == pytest.approx(expected)
    auc = scores["scores"]["AUROC"]
    assert auc["value"] == pytest.approx(reference.roc_auc_score(truth, values))
    assert auc["low"] < auc["value"] < auc["high"]
    assert f"AUROC                    {auc['value']:7.3f}" in printed
    assert "Thresholds by youden on the validation split" in printed
    matrix = reference.confusion_matrix(truth, decided)
    assert task["confusion"] == {
        name: dict(zip(BINARY, map(int, row), strict=True))
        for name, row in zip(BINARY, matrix, strict=True)
    }
    assert set(scores["groups"]) == {"sex: F", "sex: M"}
    assert scores["groups"]["sex: F"]["n"] == 15
    assert scores["resampled"] == "patients"
    assert scores["majority accuracy"] == max(sum(truth), 30 - sum(truth)) / 30
    report = (tmp_path / "scores.json.html").read_text()
    for text in ("ROC curve", "Reliability diagram", "Confusion matrix", "By sex", "<polyline",
                 "95% interval", "Research only"):  # fmt: skip
        assert text in report
    lines = (tmp_path / "scores.json.examples.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    assert len(examples) == 30
    assert sum(one["scores"]["correct"] for one in examples) / 30 == pytest.approx(expected)
    run = str(tmp_path / "scores.json")
    assert cli.main(["evaluate", "report", run, run, "--output", f"{run}.same.json"]) == 0


def test_several_classes_and_findings(tmp_path: Path) -> None:
    files = Files(tmp_path, ("a", "b", "c"), 60)
    assert files.run(validation=True) == 0
    (task,) = files.scores()["tasks"]
    assert task["positive"] is None
    assert set(task["by class"]) == set(task["thresholds"]) == {"a", "b", "c"}
    golds = np.array([row["text"][-1] for row in files.golds["test"]])
    values = np.array([[c["probability"] for c in row["choices"]] for row in files.answers["test"]])
    expected = reference.roc_auc_score(golds, values, multi_class="ovr")
    assert files.scores()["scores"]["AUROC"]["value"] == pytest.approx(expected)
    files = Files(tmp_path, ("no", "yes"), 60)
    for split in ("test", "val"):
        for row, gold in enumerate(files.golds[split]):
            gold["finding"] = ("edema", "mass", "nodule")[row % 3]
    assert files.run(validation=True) == 0
    scores = files.scores()
    assert [task["finding"] for task in scores["tasks"]] == ["edema", "mass", "nodule"]
    single = [task["scores"]["AUROC"]["value"] for task in scores["tasks"]]
    assert scores["scores"]["AUROC"]["value"] == pytest.approx(np.mean(single))
    assert scores["scores"]["AUROC"]["n"] == 60


def test_text_missing_and_surplus_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = Files(tmp_path)
    with_choices = files.answers["test"]
    files.answers["test"] = [
        {name: row[name] for name in ("question_id", "text")} for row in with_choices
    ]
    assert files.run() == 0
    scores = files.scores()["scores"]
    assert scores["AUROC"]["value"] is None
    assert scores["accuracy"]["value"] > 0.5
    assert "The answers have no probabilities" in capsys.readouterr().out
    assert "<polyline" not in (tmp_path / "scores.json.html").read_text()
    files.answers["test"] = with_choices[3:]
    assert files.run() == 0
    own = files.scores()
    assert own["missing answers"] == 3
    assert (own["scores"]["accuracy"]["n"], own["scores"]["AUROC"]["n"]) == (30, 27)
    assert own["tasks"][0]["confusion"]["normal"].keys() == {*BINARY, "neither"}
    assert "3 questions have no answer and count as wrong" in capsys.readouterr().out
    assert files.run("--skip_missing") == 0
    assert files.scores()["scores"]["accuracy"]["n"] == 27
    capsys.readouterr()
    for rows, message in (
        ([*with_choices, with_choices[0]], "1 ids have more answers than questions"),
        ([*with_choices, {"question_id": "x", "text": "normal"}], "more answers than questions"),
        ([], "answers none of the questions"),
        ([{"question_id": "test-0"}], "Expected question_id and text"),
    ):  # fmt: skip
        files.answers["test"] = rows
        assert files.run() == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("medley")]
        assert message in line


def test_splits_without_positives_and_other_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = Files(tmp_path)

    def error(*flags: Any, validation: bool = False) -> str:
        assert files.run(*flags, validation=validation) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("medley")]
        return line

    assert "--group_by organ: No record has this field" in error("--group_by", "organ")
    assert "Set both --val_gt and --val_pred" in error("--val_gt", files.folder / "val_gt.jsonl")
    assert "--positive x: Not a class" in error("--positive", "x")
    for row in files.golds["val"]:
        row["text"] = "<image>Which?<reserved08706>normal"
    assert "The validation split has no example of 'pneumonia'" in error(validation=True)
    for row in files.golds["val"]:
        row["choices"] = ["normal", "mass"]
    files.answers["val"] = [{**row, "choices": None} for row in files.answers["val"]]
    assert "The questions are not those of" in error(validation=True)
    for row in files.golds["test"]:
        row["text"] = "<image>Which?<reserved08706>normal"
    assert files.run() == 0
    printed = capsys.readouterr().out
    assert "No example of 'pneumonia': its AUROC is undefined" in printed
    assert files.scores()["scores"]["AUROC"] == {
        "value": None, "undefined": "no example of 'pneumonia'", "n": 30,
    }  # fmt: skip
