"""`medley evaluate classification`: from files to the report, bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classification_tasks import BINARY, random_task
from sklearn import metrics as reference

from medley import cli


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
