"""Images with labels in folders of classes, question templates, splits by patient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from classification_data import (
    converted,
    refused,
    run,
    texts,
    write_dicom,
    write_image,
    write_nifti,
    write_npz,
)
from PIL import Image

from medley.datasets import medmnist
from medley.datasets.labeled_files import frame_names
from medley.images.image_source import ImageSource
from medley.utils.config_files import MAX_YAML_BYTES

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
    assert "Too few classes (got only 'PNEUMONIA', expected 2 or more). Make one" in error(one)
    assert "Too few classes (got none" in error(one / "PNEUMONIA")
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


def test_frames_of_a_labeled_file_are_those_of_an_image_list(tmp_path: Path) -> None:
    (tmp_path / "broken.dcm").write_bytes(b"no image")
    write_image(tmp_path / "one.png")
    write_nifti(tmp_path / "volume.nii.gz", 3)
    write_dicom(tmp_path / "cine", "P", frames=4)
    page = Image.new("L", (8, 8))
    page.save(tmp_path / "pages.tiff", save_all=True, append_images=[page])
    for path in map(str, sorted(tmp_path.iterdir())):
        frames, patient = frame_names(path, "all")
        assert frames == [source.name for source in ImageSource(path, path).frames()]
        assert patient == ("P" if path.endswith("cine") else None)


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
    for content in ("a: [", "- 1", "", "a: &a [1]\nb: *a", "names: {a: 1, a: 2}", "[" * 10_000,
                    "#" * (MAX_YAML_BYTES + 1)):  # fmt: skip
        file.write_text(content)
        assert run("image_folder", folder, tmp_path / "out", *flags) == 2
        assert str(file) in refused(capsys)
    assert run("image_folder", folder, tmp_path / "out", *flags[:1], tmp_path / "none.yaml") == 2
    assert "File not found" in refused(capsys)
