"""`medley convert --from medmnist`: all published sets, other files, bad input."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classification_data import (
    SPLITS,
    converted,
    refused,
    run,
    texts,
    write_npz,
)
from PIL import Image

from medley.datasets import medmnist
from medley.datasets.base import ConversionConfig
from medley.evaluation.questions import read_questions

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
        "'breastmnist': {'task': 'a new task', 'label': {'0': 'x', '1': 'y'}}, "
        "'othermnist': {'task': 'a new task', 'label': {'0': 'x', '1': 'y'}}, "
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
    assert "othermnist" not in sets
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
