"""CSV files of labels: CheXpert's and NIH ChestX-ray14's layouts, policies, encodings, patients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from classification_data import converted, refused, run, texts, write_csv, write_dicom, write_image

from medley.datasets.base import ConversionConfig
from medley.datasets.input_files import SPLIT_NAMES
from medley.evaluation.questions import read_questions

SOURCE = "labels_csv"


@pytest.fixture
def chexpert(tmp_path: Path) -> Path:
    """CheXpert's files: two splits, paths that begin with the name of the folder."""
    root = tmp_path / "CheXpert-v1.0-small"
    values = [("1.0", "", "-1.0"), ("0.0", "1.0", ""), ("", "-1.0", "0.0"), ("1.0", "1.0", "1.0")]
    number = 0
    for split, patients in (("train", (1, 2)), ("valid", (3, 4))):
        rows = []
        for patient in patients:
            for edema, effusion, fracture in values:
                name = f"{root.name}/{split}/patient{patient:05}/study1/view{number}.jpg"
                write_image(root.parent / name, number)
                rows.append({
                    "Path": name, "Sex": "Female", "Age": "60", "No Finding": "", "Edema": edema,
                    "Pleural Effusion": effusion, "Fracture": fracture,
                })  # fmt: skip
                number += 1
        write_csv(root / f"{split}.csv", rows)
    return root


def test_chexpert_with_each_policy(
    chexpert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = converted(SOURCE, chexpert, tmp_path / "a")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 20, "val": 20}
    row = splits["train"][0]
    assert texts(row) == ("Does this image show Edema?", "yes")
    assert row["choices"] == ["no", "yes"]
    assert (row["finding"], row["label"], row["patient_id"]) == ("Edema", "yes", "patient00001")
    assert (row["Sex"], row["Age"], row["No Finding"]) == ("Female", "60", "")
    assert [r["finding"] for r in splits["train"][:2]] == ["Edema", "Pleural Effusion"]
    assert splits["train"][1]["label"] == "no"
    printed = capsys.readouterr().out
    assert "uncertain labels left out (--uncertain ignore): 8 times" in printed
    assert "blank labels read as negative (--blank negative): 12 times" in printed
    positive = converted(SOURCE, chexpert, tmp_path / "b", "--uncertain", "positive")["train"]
    assert len(positive) == 24
    assert [row["label"] for row in positive[:3]] == ["yes", "no", "yes"]
    negative = converted(SOURCE, chexpert, tmp_path / "c", "--uncertain", "negative")["train"]
    assert [row["label"] for row in negative[:3]] == ["yes", "no", "no"]
    flags = ("--uncertain", "class", "--blank", "ignore", "--label_columns", "Edema", "Fracture")
    three = converted(SOURCE, chexpert, tmp_path / "d", *flags)["train"]
    assert [(row["finding"], row["label"]) for row in three[:3]] == [
        ("Edema", "yes"), ("Fracture", "uncertain"), ("Edema", "no"),
    ]  # fmt: skip
    assert three[0]["choices"] == ["no", "yes", "uncertain"]
    only = converted(SOURCE, chexpert, tmp_path / "e", "--split", "val", "--classes", "Edema")
    assert [row["finding"] for row in only["val"]] == ["Edema"] * 8


def test_a_single_chexpert_file_keeps_its_split_and_findings_without_a_positive(
    chexpert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"Path": f"{chexpert.name}/valid/patient00003/study1/view8.jpg", "No Finding": "1.0",
             "Edema": "0.0", "Fracture": "1.0"}]  # fmt: skip
    path = write_csv(chexpert / "valid.csv", rows)
    splits = converted(SOURCE, path, tmp_path / "out")
    assert [row["finding"] for row in splits["val"]] == ["Edema", "Fracture"]
    assert "val has no positive example of Edema" in capsys.readouterr().out


@pytest.fixture
def nih(tmp_path: Path) -> Path:
    """NIH's files: several image folders, lists of findings, and lists of the splits."""
    root = tmp_path / "nih"
    findings = ("Cardiomegaly", "Cardiomegaly|Emphysema", "No Finding", "Emphysema")
    rows = []
    for number in range(8):
        name = f"0000000{number // 2}_00{number % 2}.png"
        write_image(root / f"images_00{number % 3}" / "images" / name, number)
        rows.append({
            "Image Index": name, "Finding Labels": findings[number % 4], "Follow-up #": "0",
            "Patient ID": str(number // 2), "Patient Age": "58",
        })  # fmt: skip
    write_csv(root / "Data_Entry_2017.csv", rows)
    write_csv(root / "BBox_List_2017.csv", [{"Image Index": "x", "Finding Label": "Mass"}])
    names = [row["Image Index"] for row in rows]
    (root / "train_val_list.txt").write_text("\n".join(names[:6]))
    (root / "test_list.txt").write_text("\n".join(names[6:]) + "\n")
    return root


def test_nih_chest_x_ray14(nih: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = converted(SOURCE, nih, tmp_path / "a")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 12, "test": 4}
    labels = [(row["finding"], row["label"]) for row in splits["train"][:6]]
    assert labels == [
        ("Cardiomegaly", "yes"), ("Emphysema", "no"), ("Cardiomegaly", "yes"),
        ("Emphysema", "yes"), ("Cardiomegaly", "no"), ("Emphysema", "no"),
    ]  # fmt: skip
    assert splits["train"][0]["patient_id"] == "0"
    assert splits["train"][0]["Patient Age"] == "58"
    assert "0 of 2 images of test are also in train" in capsys.readouterr().out
    rows = converted(SOURCE, nih, tmp_path / "b", "--classes", "Emphysema")["train"]
    assert [row["finding"] for row in rows] == ["Emphysema"] * 6
    config = ConversionConfig(nih, split="test", image_folder=nih)
    questions = read_questions(nih, SOURCE, config)
    assert [question.gold for question in questions] == ["no", "no", "no", "yes"]
    (nih / "test_list.txt").write_text("")
    assert run(SOURCE, nih, tmp_path / "c") == 3
    assert "2 of 14 records are bad" in refused(capsys)
    write_image(nih / "images" / "00000000_000.png", 99)
    assert run(SOURCE, nih, tmp_path / "c") == 3
    assert "3 of 13 records are bad" in refused(capsys)


def test_the_patients_of_given_splits_are_compared(
    nih: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (nih / "train_val_list.txt").read_text().split()
    (nih / "train_val_list.txt").write_text("\n".join(names[1:]))
    (nih / "test_list.txt").write_text(
        "\n".join([names[0], "00000003_000.png", "00000003_001.png"])
    )
    converted(SOURCE, nih, tmp_path / "out")
    assert "1 of 2 patients of test are also in train" in capsys.readouterr().out


# --- other files ------------------------------------------------------------------------------


def make_rows(folder: Path, labels: list[str], **more: Any) -> list[dict[str, Any]]:
    rows = []
    for number, label in enumerate(labels):
        write_image(folder / f"{number}.png", number)
        rows.append({"image": f"{number}.png", "label": label, **more})
    return rows


def test_one_column_of_classes(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, ["10", "2", "2", "10"], source="site A", id="x")
    splits = converted(SOURCE, write_csv(tmp_path / "own.csv", rows), tmp_path / "out")
    row = splits["all"][0]
    assert texts(row) == ("Which class does this image belong to: 2 or 10?", "10")
    assert (row["label"], row["label_index"], row["choices"]) == ("10", 1, ["2", "10"])
    assert (row["id"], row["csv_id"], row["csv_source"]) == ("0.png", "x", "site A")
    flags = ("--classes", "10", "2")
    rows = converted(SOURCE, tmp_path / "own.csv", tmp_path / "b", *flags)["all"]
    assert rows[0]["choices"] == ["10", "2"]


def test_one_column_of_a_finding_and_a_split_column(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, ["1", "0", "-1", "1"])
    for row, split in zip(rows, ["train", "Validation", "test", "TEST"], strict=True):
        row |= {"pneumonia": row.pop("label"), "split": split}
    path = write_csv(tmp_path / "own.csv", rows)
    flags = ("--label_columns", "pneumonia", "--uncertain", "positive")
    splits = converted(SOURCE, path, tmp_path / "out", *flags)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1, "val": 1, "test": 2}
    assert texts(splits["test"][0]) == ("Does this image show pneumonia?", "yes")


@pytest.mark.parametrize(
    "classes", [("none", "mild"), ("NA", "EU"), ("None", "na"), ("null", "n/a", "none")]
)
def test_a_class_may_be_named_none(classes: tuple[str, ...], tmp_path: Path) -> None:
    path = write_csv(tmp_path / "own.csv", make_rows(tmp_path, [*classes, *classes]))
    found = converted(SOURCE, path, tmp_path / "out")["all"]
    assert [row["label"] for row in found] == [*classes, *classes]
    assert found[0]["choices"] == sorted(classes)
    rows = make_rows(tmp_path, [*classes, "", "nan", "NaN"])
    flags = ("--on_error", "skip")
    result = converted(SOURCE, write_csv(path, rows), tmp_path / "b", *flags)
    assert [row["label"] for row in result["all"]] == list(classes)
    assert len(result["bad"]) == 3


def test_none_is_blank_in_a_column_of_findings(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, ["1", "0", "none", "NA"])
    path = write_csv(tmp_path / "own.csv", rows)
    found = converted(SOURCE, path, tmp_path / "out", "--blank", "ignore")["all"]
    assert [row["label"] for row in found] == ["yes", "no"]


@pytest.mark.parametrize(
    "names", [("training", "testing"), ("Train", "dev"), ("train", "validation", "TESTING")]
)
def test_files_with_the_names_of_splits(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        rows = make_rows(tmp_path / name, ["x", "y"])
        rows = [{**row, "image": f"{name}/{row['image']}"} for row in rows]
        write_csv(tmp_path / f"{name}.csv", rows)
    splits = converted(SOURCE, tmp_path, tmp_path / "out")
    expected = {SPLIT_NAMES[name.lower()]: name for name in names}
    assert {split: rows[0]["id"] for split, rows in splits.items()} == {
        split: f"{name}/0.png" for split, name in expected.items()
    }
    assert all(len(rows) == 2 for rows in splits.values())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_encodings(encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(tmp_path, ["Lungenentzündung", "gesund"])
    path = write_csv(tmp_path / "own.csv", rows, encoding)
    named = () if encoding.startswith("utf-8") else ("--encoding", encoding)
    splits = converted(SOURCE, path, tmp_path / "out", *named)
    assert splits["all"][0]["label"] == "Lungenentzündung"
    if named:
        assert run(SOURCE, path, tmp_path / "bad") != 0
        assert "iconv" in capsys.readouterr().err
    for name in ("nothing", "base64"):
        assert run(SOURCE, path, tmp_path / "bad", "--encoding", name) == 2
        assert f"--encoding {name}: Unknown encoding" in refused(capsys)


def test_semicolons_dicom_and_patients_by_column_or_header(tmp_path: Path) -> None:
    lines = ["file;diagnosis;subject"]
    for number in range(24):
        write_dicom(tmp_path / f"{number}.dcm", f"P{number % 8}", number)
        lines.append(f"{number}.dcm;{'ab'[number % 2]};{number // 4}")
    path = tmp_path / "own.csv"
    path.write_text("\n".join(lines))
    for output, flags, count in (("a", (), 6), ("b", ("--patient_key", "diagnosis"), 2)):
        if count == 6:
            fractions = ("--test_fraction", 0.5)
            splits = converted(SOURCE, path, tmp_path / output, *flags, *fractions)
            patients = {n: {row["patient_id"] for row in rows} for n, rows in splits.items()}
            assert sum(map(len, patients.values())) == len(set().union(*patients.values())) == count
        else:
            rows = converted(SOURCE, path, tmp_path / output, *flags)["all"]
            assert {row["patient_id"] for row in rows} == {"a", "b"}
    path.write_text("\n".join(line.rpartition(";")[0] for line in lines))
    rows = converted(SOURCE, path, tmp_path / "c")["all"]
    assert {row["patient_id"] for row in rows} == {f"P{number}" for number in range(8)}


BAD: dict[str, tuple[list[dict[str, str]], tuple[str, ...], str, int]] = {
    "no image column": ([{"a": "0.png", "label": "x"}], (), "No column with the image paths", 2),
    "no label column": ([{"image": "0.png", "a": "x"}], (), "(got image, a). Name it with --label_",
                        2),
    "unknown label column": ([{"image": "0.png", "label": "x"}], ("--label_columns", "y"),
                             "No column with the labels (y)", 2),
    "unknown patient column": ([{"image": "0.png", "label": "x"}], ("--patient_key", "y"),
                               "No column with the patients", 2),
    "one class": ([{"image": "0.png", "label": "x"}], (), "Too few classes (got only 'x'", 2),
    "unknown class": ([{"image": "0.png", "label": "x"}], ("--classes", "y"),
                      "has no class 'y' (got x)", 2),
    "missing images": ([{"image": "0.png", "label": "x"}, {"image": "none.png", "label": "y"}], (),
                       "1 of 2 records are bad", 3),
    "blank class": ([{"image": "0.png", "label": "x"}, {"image": "1.png", "label": "y"},
                     {"image": "2.png", "label": ""}], (), "1 of 3 records are bad", 3),
    "blank image": ([{"image": "0.png", "label": "x"}, {"image": "", "label": "y"}], (),
                    "1 of 2 records are bad", 3),
    "outside": ([{"image": "0.png", "label": "x"}, {"image": "../0.png", "label": "y"}], (),
                "1 of 2 records are bad", 3),
    "address": ([{"image": "0.png", "label": "x"}, {"image": "https://a/b.png", "label": "y"}], (),
                "1 of 2 records are bad", 3),
    "bad finding": ([{"image": "0.png", "Edema": "1", "Mass": "2"}],
                    ("--label_columns", "Edema", "Mass"), "1 of 1 records are bad", 3),
    "bad split": ([{"image": "0.png", "label": "x", "split": "train"},
                   {"image": "1.png", "label": "y", "split": "train"},
                   {"image": "2.png", "label": "y", "split": "fold 2"}], (),
                  "1 of 3 records are bad", 3),
    "absent split": ([{"image": "0.png", "label": "x", "split": "train"},
                      {"image": "1.png", "label": "y", "split": "train"}], ("--split", "test"),
                     "has no such split (got train)", 2),
    "class without a training example": (
        [{"image": "0.png", "label": "x", "split": "train"},
         {"image": "1.png", "label": "y", "split": "test"}], (),
        "A class has no example in train (got none of y)", 2),
    "only blanks": ([{"image": "0.png", "label": ""}], (), "No image has a label", 2),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_rows(tmp_path, ["x", "y", "z"])
    rows, flags, message, status = BAD[case]
    path = write_csv(tmp_path / "own.csv", rows)
    assert run(SOURCE, path, tmp_path / "out", *flags) == status
    assert message in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_files_without_rows_and_unclear_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(path: Path) -> str:
        assert run(SOURCE, path, tmp_path / "out") == 2
        return refused(capsys)

    assert "got no CSV file" in error(tmp_path)
    (tmp_path / "a.csv").write_text("image,label\n")
    assert "has no valid rows" in error(tmp_path)
    (tmp_path / "b.csv").write_text("")
    assert "(got a.csv, b.csv). Name a file with --input" in error(tmp_path)
    assert "No such file" in error(tmp_path / "c.csv")


def test_missing_images_are_skipped_and_listed(tmp_path: Path) -> None:
    rows = [*make_rows(tmp_path, ["x", "y"]), {"image": "none.png", "label": "x"}]
    path = write_csv(tmp_path / "own.csv", rows)
    result = converted(SOURCE, path, tmp_path / "out", "--on_error", "skip")
    assert len(result["all"]) == 2
    assert "none.png: No such image" in result["bad"][0]["error"]
