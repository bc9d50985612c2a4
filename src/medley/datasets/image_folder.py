"""Folders of images, one for each class, as torchvision's ImageFolder reads them.

`ROOT/CLASS/**/IMAGE`, or `ROOT/SPLIT/CLASS/**/IMAGE` with the splits train, val (or validation)
and test. DICOM files are grouped by their PatientID if a split is made.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RawRecord,
    RecordError,
    Remark,
)
from medley.datasets.classification import (
    POSITIVE,
    LabeledImage,
    LabelSet,
    check_classes,
    read,
)
from medley.datasets.input_files import SPLIT_NAMES
from medley.datasets.labeled_files import frame_names, is_image_file
from medley.errors import UserError

_IGNORED = ("__MACOSX",)


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    root = config.path
    if not root.is_dir():
        problem = "Expected a folder, not a file" if root.exists() else "No such folder"
        raise UserError(f"{root}: {problem}.")
    folders = _split_folders(root)
    if config.split != "all" and config.split not in folders:
        found = ", ".join(filter(None, folders)) or "no split folders"
        raise UserError(f"--split {config.split}: {root} has no such split (got {found}).")
    files = {split: _class_files(folder) for split, folder in folders.items()}
    classes = tuple(sorted({name for own in files.values() for name in own}))  # as torchvision
    check_classes(str(root), classes, " Make one folder of images for each class.")
    yield from _check_examples(root, classes, files)
    labels = LabelSet(root.resolve().name, "image_folder", "one_label", classes)
    skipped: Counter[str] = Counter()
    for split, folder in folders.items():
        if config.split not in ("all", split):
            continue
        yield from _stray_images(folder, split)
        for name in classes:
            for path in files[split].get(name, []):
                if is_image_file(path):
                    yield from _image_records(path, name, split, labels, config)
                else:
                    skipped[path.suffix.lower() or "without suffix"] += 1
    for suffix, count in skipped.items():
        for _ in range(count):
            yield str(root), "", Remark(f"files that are not images ({suffix})")


def _image_records(
    path: Path, name: str, split: str, labels: LabelSet, config: ConversionConfig
) -> Iterator[RawRecord]:
    try:
        frames, patient = frame_names(str(path), config.frames)
    except RecordError as error:
        yield str(path), split, RecordError(str(error), content=str(path))
        return
    for frame in frames:
        identifier = os.path.relpath(frame, config.path).replace(os.sep, "/")
        for record in LabeledImage(identifier, frame, {name: POSITIVE}, patient).to_records(labels):
            yield str(path), split, record


def _subfolders(folder: Path) -> list[Path]:
    return sorted(
        entry for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in _IGNORED
    )  # fmt: skip


def _split_folders(root: Path) -> dict[str, Path]:
    """Split -> its folder; "" for a folder without splits. Raises UserError for a mixed layout."""
    folders: dict[str, Path] = {}
    others = []
    for folder in _subfolders(root):
        name = SPLIT_NAMES.get(folder.name.lower())
        if name is None:
            others.append(folder.name)
        elif folders.setdefault(name, folder) is not folder:
            raise UserError(f"{root}: Two folders of the split {name} ({folders[name]}, {folder}).")
    has_images = any(_holds_images(folder) for folder in folders.values())
    if not folders or (others and has_images):  # a class may be named "test"
        return {"": root}
    if others:
        raise UserError(
            f"{root}: Folders of splits and other folders (got {', '.join(folders)} and "
            f"{', '.join(others)}). Move the other folders."
        )
    return {name: folders[name] for name in ("train", "val", "test") if name in folders}


def _holds_images(folder: Path) -> bool:
    """Whether images are in the folder itself, as in that of a class."""
    return any(path.is_file() and is_image_file(path) for path in folder.iterdir())


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """Class -> its files, also those in subfolders, in sorted order."""
    return {own.name: list(_walk(own, ())) for own in _subfolders(folder)}


def _walk(folder: Path, ancestors: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in ancestors:
        raise UserError(f"{folder}: A symbolic link to its own ancestor {real}. Remove the link.")
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _IGNORED:
            continue
        if path.is_dir():
            yield from _walk(path, (*ancestors, real))
        else:
            yield path


def _check_examples(
    root: Path, classes: tuple[str, ...], files: dict[str, dict[str, list[Path]]]
) -> Iterator[RawRecord]:
    """Raises UserError for a class without an image in train, or without splits.

    A class without an image in val or test is a remark.
    """
    for split, own in files.items():
        absent = [name for name in classes if not any(map(is_image_file, own.get(name, [])))]
        if absent and split in ("", "train"):
            where = f" in {split}" if split else ""
            raise UserError(
                f"{root}: A class has no image{where} (got none of {', '.join(absent)}). Add "
                "images, or remove the folder."
            )
        if absent:
            yield str(root), split, Remark(f"{split} has no image of {', '.join(absent)}")


def _stray_images(folder: Path, split: str) -> Iterator[RawRecord]:
    """Images beside the folders of the classes, which have no class."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and is_image_file(path):
            error = "The image is not in the folder of a class."
            yield str(path), split, RecordError(error, content=str(path))


FORMAT = FormatSpec(
    records, read, has_splits=True, default_image_folder=lambda path: path
)  # fmt: skip
