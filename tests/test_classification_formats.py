"""Images with labels: MedMNIST, folders of classes, CSV files of labels; splits by patient."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from classification_data import (
    SPLITS,
    write_dicom,
    write_image,
    write_nifti,
    write_npz,
)
from PIL import Image

from medley import cli
from medley.data.document import Document
from medley.datasets import medmnist
from medley.datasets.base import ConversionConfig
from medley.evaluation.questions import read_questions


def run(source: str, path: Path, output: Path, *words: Any) -> int:
    command = ["convert", "--from", source, "--input", path, "--output", output, *words]
    return cli.main([str(word) for word in command])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def converted(
    source: str, path: Path, output: Path, *words: Any
) -> dict[str, list[dict[str, Any]]]:
    """Split -> rows of a conversion that succeeds."""
    assert run(source, path, output, *words) == 0
    return {file.stem: rows_of(file) for file in sorted(output.glob("*.jsonl"))}


def texts(row: dict[str, Any]) -> tuple[str, str]:
    question, answer = Document.from_json(row).turns
    return "".join(p for p in question.parts if isinstance(p, str)), str(answer.parts[0])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The error: one line, after the progress bars and the rejected records."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medley")]
    assert len(lines) == 1
    return lines[0]


# --- MedMNIST ---------------------------------------------------------------------------------


SUFFIXES = ("", "_64", "_224", "_subset")  # of the names of files


@pytest.mark.parametrize(
    ("name", "suffix"),
    [(n, SUFFIXES[i % 4]) for i, n in enumerate(sorted(medmnist.published_sets()))],
)
def test_every_2d_set_of_medmnist_is_read_with_its_class_names(
    name: str, suffix: str, tmp_path: Path
) -> None:
    published = medmnist.published_sets()[name]
    count = len(published.classes)
    several = published.kind == "each_label"
    labels = np.eye(count, dtype=np.uint8).tolist() if several else list(range(count))
    size = 16 if suffix == "_64" else 8
    channels = 3 if name in ("pathmnist", "dermamnist", "retinamnist", "bloodmnist") else 1
    path = write_npz(tmp_path / f"{name}{suffix}.npz", labels, channels, size)
    splits = converted("medmnist", path, tmp_path / "out", "--image_folder", tmp_path / "images")
    assert set(splits) == set(SPLITS)
    arrays = np.load(path)
    for split, rows in splits.items():
        assert len(rows) == (count * count if several else count)
        for number in range(count):
            row = rows[number * count + number] if several else rows[number]
            question, answer = texts(row)
            assert row["choices"] == (["no", "yes"] if several else list(published.classes))
            assert answer == row["label"] == ("yes" if several else published.classes[number])
            assert question.startswith("Does this" if several else "Which ")
            pixels = np.asarray(Image.open(row["image_path"]))
            assert np.array_equal(pixels, arrays[f"{split}_images"][number])
        if several:
            assert [texts(row)[1] for row in rows[:count]] == ["yes", *["no"] * (count - 1)]
            assert len({row["finding"] for row in rows}) == count
        else:
            assert [row["label_index"] for row in rows] == labels
        assert len({row["id"] for row in rows}) == len(rows)


def test_the_installed_package_has_the_last_word_on_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "medmnist"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not run')")
    (package / "info.py").write_text(
        "import os\nraise SystemExit\nINFO = {'pneumoniamnist': {'task': 'binary-class', "
        "'label': {'0': 'clear', '1': 'pneumonia'}, 'url': f'{os}'}, "
        "'newmnist': {'task': 'ordinal-regression', 'label': {'0': 'low', '1': 'high'}}, "
        "'newmnist3d': {'task': 'binary-class', 'label': {'0': 'a', '1': 'b'}}}"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    medmnist.published_sets.cache_clear()
    try:
        sets = medmnist.published_sets()
    finally:
        medmnist.published_sets.cache_clear()
    assert sets["pneumoniamnist"].classes == ("clear", "pneumonia")
    assert sets["newmnist"] == medmnist.PublishedSet("ordinal", ("low", "high"))
    assert sets["breastmnist"].classes == ("malignant", "normal, benign")
    assert not any(name.endswith("3d") for name in sets)


def test_unknown_files_have_generic_names_and_all_widths_of_pixels(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "mine.npz", [0, 1, 2], dtype=np.uint16)
    rows = converted("medmnist", path, tmp_path / "a", "--image_folder", tmp_path / "i")["train"]
    assert rows[2]["label"] == "class 2"
    pixels = np.asarray(Image.open(rows[2]["image_path"]))
    assert np.array_equal(pixels, np.load(path)["train_images"][2])
    images = np.asfortranarray(np.load(path)["test_images"][..., None].astype(">u2"))
    path = write_npz(
        tmp_path / "mine.npz", [[1, 0], [0, 1], [1, 1]], dtype=np.uint16, test_images=images
    )
    splits = converted("medmnist", path, tmp_path / "b", "--image_folder", tmp_path / "j")
    assert [row["finding"] for row in splits["test"][:2]] == ["class 0", "class 1"]
    pixels = np.asarray(Image.open(splits["test"][5]["image_path"]))
    assert np.array_equal(pixels, images[2, :, :, 0])


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


IMAGES = np.zeros((3, 8, 8), np.uint8)
BAD_NPZ: dict[str, tuple[dict[str, Any], str]] = {
    "missing labels": ({"train_labels": None}, "The array 'train_labels' is missing"),
    "missing images": ({"test_images": None}, "The array 'test_images' is missing"),
    "pickled": (
        {"train_labels": np.array([[Pickled()]] * 3, object)}, "holds pickled Python objects",
    ),
    "too high": ({"val_labels": np.array([[0], [1], [2]])}, "(got 2 in row 2, expected 0 to 1)"),
    "negative": ({"val_labels": np.array([[0], [1], [-1]])}, "(got -1 in row 2, expected 0 to 1)"),
    "fraction": ({"val_labels": np.array([[0], [1], [0.5]])}, "not whole numbers"),
    "NaN": ({"val_labels": np.array([[0], [1], [np.nan]])}, "expected whole numbers"),
    "text": ({"val_labels": np.array([["a"], ["b"], ["a"]])}, "expected whole numbers"),
    "no example": ({"train_labels": np.array([[1], [1], [1]])}, "(got none of normal)"),
    "other length": ({"train_labels": np.array([[0], [1]])}, "does not fit 'train_images'"),
    "several columns": (
        {f"{split}_labels": np.eye(3, dtype=int) for split in SPLITS}, "got 3 columns, expected 1",
    ),
    "3D": ({"train_images": np.zeros((3, 8, 8, 8), np.uint8)}, "3D sets are unsupported"),
    "floats": ({"train_images": IMAGES.astype(float)}, "got float64 of shape (3, 8, 8)"),
    "no images": (
        {"val_images": IMAGES[:0], "val_labels": np.zeros((0, 1), int)}, "has no images",
    ),
    "flat": ({"train_images": IMAGES[0]}, "Unsupported images"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz_files_are_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    replaced, message = BAD_NPZ[case]
    path = write_npz(tmp_path / "pneumoniamnist.npz", [0, 1, 1], **replaced)
    assert run("medmnist", path, tmp_path / "out", "--image_folder", tmp_path / "images") == 2
    assert message in refused(capsys)
    assert not (tmp_path / "out").exists()
    assert not Path("ran").exists()


def test_damaged_npz_files_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_npz(tmp_path / "x.npz", [0, 1, 1])
    whole = path.read_bytes()
    flags = ("--image_folder", tmp_path / "images")

    def error(data: bytes) -> str:
        path.write_bytes(data)
        assert run("medmnist", path, tmp_path / "out", *flags) == 2
        assert not (tmp_path / "out").exists()
        return refused(capsys)

    assert "not an .npz file" in error(whole[:200])
    assert "not an .npz file" in error(b"")
    assert "not an .npz file" in error(whole[: len(whole) // 2])
    middle = whole.index(b"train_images.npy") + 300
    assert "is damaged" in error(whole[:middle] + b"\xff" * 40 + whole[middle + 40 :])
    short = io.BytesIO()
    np.save(short, np.zeros((3, 8, 8), np.uint8))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("train_images.npy", short.getvalue()[:-10])
        archive.writestr("train_labels.npy", b"\x80\x04N.")
    assert "'train_images' is damaged (got" in error(content.getvalue())
    assert run("medmnist", tmp_path / "none.npz", tmp_path / "out", *flags) == 2
    assert "No such file" in refused(capsys)
    assert run("medmnist", tmp_path, tmp_path / "out", *flags) == 2
    assert "Expected an .npz file, not a folder" in refused(capsys)
    path = write_npz(tmp_path / "x.npz", [0, 0])
    assert run("medmnist", path, tmp_path / "out", *flags) == 2
    assert "Too few classes (got only 'class 0', expected 2 or more)" in refused(capsys)
    path = write_npz(tmp_path / "x.npz", [0, 1])
    assert run("medmnist", path, tmp_path / "out") == 2
    assert "Name a folder for them with --image_folder" in refused(capsys)


def test_equal_images_in_two_splits_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_npz(tmp_path / "x.npz", [0, 1, 1])
    images = np.load(path)["train_images"]
    path = write_npz(tmp_path / "x.npz", [0, 1, 1], test_images=images)
    converted("medmnist", path, tmp_path / "out", "--image_folder", tmp_path / "images")
    assert "3 of 3 images of test are also in train" in capsys.readouterr().out


def test_one_split_of_an_npz_file_and_its_questions(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "pneumoniamnist.npz", [0, 1, 1], train_images=None)
    config = ConversionConfig(path, split="test", image_folder=tmp_path / "images")
    questions = read_questions(path, "medmnist", config)
    assert [question.gold for question in questions] == ["normal", "pneumonia", "pneumonia"]
    assert questions[0].fields["choices"] == ["normal", "pneumonia"]
    assert questions[0].kind == "CLOSED"


# --- folders ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "scans"
    number = 0
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for name in ("NORMAL", "PNEUMONIA"):
            for _ in range(count):
                write_image(root / split / name / f"{number}.png", number)
                number += 1
    return root


def test_split_folders_are_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(folder / "train" / "NORMAL" / "site b" / "16.png", 100, bits=16)
    write_image(folder / "test" / "NORMAL" / "copy.png", 0)
    (folder / "train" / "NORMAL" / "notes.txt").write_text("x")
    (folder / "train" / "NORMAL" / ".hidden").write_text("x")
    (folder / "__MACOSX").mkdir()
    (folder / "validation").mkdir()
    assert run("image_folder", folder, tmp_path / "out") == 2
    assert "Two folders of the split val" in refused(capsys)
    (folder / "validation").rmdir()
    splits = converted("image_folder", folder, tmp_path / "out")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 9, "val": 4, "test": 5}
    row = splits["train"][-1]
    assert texts(row) == (
        "Which class does this image belong to: NORMAL or PNEUMONIA?", "PNEUMONIA",
    )  # fmt: skip
    assert row["id"] == "train/PNEUMONIA/7.png"
    assert row["image_path"] == str(folder / "train" / "PNEUMONIA" / "7.png")
    assert any(one["id"] == "train/NORMAL/site b/16.png" for one in splits["train"])
    printed = capsys.readouterr().out
    assert "1 of 5 images of test are also in train" in printed
    assert "files that are not images (.txt): 1 times" in printed
    only = converted("image_folder", folder, tmp_path / "only", "--split", "test")
    assert set(only) == {"test"}
    assert run("image_folder", folder / "train", tmp_path / "x", "--split", "test") == 2
    assert "has no such split (got no split folders)" in refused(capsys)


def test_bad_folders_are_refused_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(path: Path, status: int = 2) -> str:
        assert run("image_folder", path, tmp_path / "out") == status
        assert not (tmp_path / "out").exists()
        return refused(capsys)

    assert "No such folder" in error(tmp_path / "none")
    assert "Expected a folder, not a file" in error(folder / "train" / "NORMAL" / "0.png")
    one = tmp_path / "one"
    write_image(one / "PNEUMONIA" / "0.png")
    assert "Too few class folders (got only 'PNEUMONIA', expected 2 or more" in error(one)
    assert "Too few class folders (got none" in error(one / "PNEUMONIA")
    (one / "NORMAL").mkdir()
    assert "A class has no image (got none of NORMAL)" in error(one)
    (one / "NORMAL" / "notes.txt").write_text("x")
    assert "A class has no image (got none of NORMAL)" in error(one)
    write_image(folder / "test" / "TUMOR" / "0.png")
    assert "A class has no image in train (got none of TUMOR)" in error(folder)
    write_image(folder / "train" / "TUMOR" / "0.png")
    write_image(folder / "train" / "stray.png")
    assert "1 of 19 records are bad" in error(folder, 3)
    (folder / "train" / "stray.png").unlink()
    write_image(folder / "other" / "a.png")
    assert "Folders of splits and other folders (got test, train, val and other)" in error(folder)
    for split in ("val", "test"):
        (folder / split).rename(tmp_path / split)
    assert "Folders of splits and other folders (got train and other)" in error(folder)
    loop = tmp_path / "loop"
    write_image(loop / "a" / "0.png")
    write_image(loop / "b" / "0.png")
    (loop / "b" / "again").symlink_to(loop / "b")
    assert "A symbolic link to its own ancestor" in error(loop)


def test_a_class_may_have_the_name_of_a_split_and_broken_images_are_bad_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("test", "control"):
        write_image(tmp_path / "scans" / name / "0.png", len(name))
    splits = converted("image_folder", tmp_path / "scans", tmp_path / "out")
    assert [row["label"] for row in splits["all"]] == ["control", "test"]
    (tmp_path / "scans" / "test" / "1.png").write_text("no image")
    assert run("image_folder", tmp_path / "scans", tmp_path / "bad") == 3
    assert "1 of 3 records are bad" in refused(capsys)
    flags = ("--on_error", "skip")
    rows = converted("image_folder", tmp_path / "scans", tmp_path / "bad", *flags)
    assert len(rows["all"]) == 2
    assert len(rows["bad"]) == 1


def test_medical_files_are_split_by_patient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "scans"
    for patient in range(12):
        for number in range(3):
            name = f"{patient}_{number}" + (".dcm" if number else "")  # scanners write no suffix
            write_dicom(root / "ab"[number % 2] / name, f"P{patient}", 3 * patient + number)
    write_dicom(root / "a" / "unknown.dcm", None, 99)
    write_nifti(root / "b" / "flat.nii.gz", 1)
    flags = ("--test_fraction", 0.3, "--val_fraction", 0.3)
    splits = converted("image_folder", root, tmp_path / "out", *flags)
    assert set(splits) == {"train", "val", "test"}
    patients = {
        name: {row.get("patient_id") for row in rows} - {None} for name, rows in splits.items()
    }
    assert sum(map(len, patients.values())) == len(set().union(*patients.values())) == 12
    assert sum(map(len, splits.values())) == 38
    assert "the images of each of 12 patients are in one split" in capsys.readouterr().out


def test_frames_of_volumes_stay_in_one_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "scans"
    for number in range(8):
        write_nifti(root / "ab"[number % 2] / f"{number}.nii.gz", 5, number)
    write_dicom(root / "a" / "cine.dcm", "P", 7, frames=4)
    assert run("image_folder", root, tmp_path / "out") == 3
    assert "9 of 9 records are bad" in refused(capsys)
    middle = converted("image_folder", root, tmp_path / "middle", "--frames", "middle")["all"]
    assert sorted(row["image_path"].rpartition("/")[2] for row in middle)[:2] == [
        "0.nii.gz#2", "1.nii.gz#2",
    ]  # fmt: skip
    assert middle[-5]["id"].startswith("a/") or middle[-5]["id"].startswith("b/")
    flags = ("--frames", "all", "--test_fraction", 0.4)
    splits = converted("image_folder", root, tmp_path / "all", *flags)
    files = {
        name: {row["image_path"].partition("#")[0] for row in rows} for name, rows in splits.items()
    }
    assert sum(map(len, splits.values())) == 8 * 5 + 4
    assert not files["train"] & files["test"]


def test_fractions_of_a_split_are_checked(tmp_path: Path, folder: Path) -> None:
    for flags in (
        ["--val_fraction", 0.2], ["--test_fraction", 0.5, "--val_fraction", 0.5],
        ["--test_fraction", 0.5, "--val_fraction", 0],
    ):  # fmt: skip
        assert run("image_folder", folder / "train", tmp_path / "out", *flags) == 2


# --- templates --------------------------------------------------------------------------------


DEFAULT = Path(medmnist.__file__).parent / "questions" / "classification.yaml"


def test_a_template_file_changes_questions_and_names(folder: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT.read_text())
    content["names"] = {"NORMAL": "no finding"}
    content["datasets"] = {"scans": {"question": "{dataset}: {choices}?"}}
    content["one_label"]["answer"] = "It is {label}."
    file = tmp_path / "questions.yaml"
    file.write_text(yaml.safe_dump(content))
    flags = ("--question_templates", file)
    rows = converted("image_folder", folder, tmp_path / "a", *flags)["val"]
    assert texts(rows[0]) == (
        "scans: It is no finding. or It is PNEUMONIA.?", "It is no finding.",
    )  # fmt: skip
    assert rows[0]["label"] == "no finding"
    assert rows[0]["choices"] == ["It is no finding.", "It is PNEUMONIA."]
    path = write_npz(tmp_path / "x.npz", [0, 1])
    file.write_text(yaml.safe_dump({**content, "names": {0: "A, B", "class 1": "C"}}))
    images = ("--image_folder", tmp_path / "images")
    rows = converted("medmnist", path, tmp_path / "b", *images, *flags)["val"]
    assert texts(rows[1])[0].endswith(": It is class 0. or It is C.?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"one_label": {"question": "?", "answer": "yes"}}, "answer of one_label lacks {label}"),
        ({"one_label": {"question": "Which?"}}, "one_label lacks answer"),
        ({"one_label": {"question": "{x}?", "answer": "{label}"}}, "unknown placeholder {x}"),
        ({"one_label": {"question": True, "answer": "{label}"}}, "must be a text (got True)"),
        ({"one_label": "Which?"}, "Expected keys and values (got 'Which?')"),
        ({"questions": {}}, "Unknown key 'questions'"),
        ({"names": {"NORMAL": "x", "PNEUMONIA": "X"}}, "Two answers are equal (got 'x', 'X')"),
        ({"names": {"NORMAL": " "}}, "The name of 'NORMAL' must be a text"),
        ({"names": {"NORMAL": False}}, "Put it in quotes"),
        ({"datasets": {"scans": {"text": "x"}}}, "Unknown key 'text'"),
    ],
)  # fmt: skip
def test_bad_templates_are_refused_in_one_line(
    change: dict[str, Any],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "questions.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(DEFAULT.read_text()), **change}))
    flags = ("--question_templates", file)
    assert run("image_folder", folder, tmp_path / "out", *flags) == 2
    assert message in refused(capsys)
    for content in ("a: [", "- 1", ""):
        file.write_text(content)
        assert run("image_folder", folder, tmp_path / "out", *flags) == 2
        assert str(file) in refused(capsys)
    assert run("image_folder", folder, tmp_path / "out", *flags[:1], tmp_path / "none.yaml") == 2
    assert "File not found" in refused(capsys)
