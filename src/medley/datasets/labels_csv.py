"""A CSV file of image paths and labels: one column of classes or lists, or columns of findings.

This covers CheXpert (Irvin et al. 2019: train.csv and valid.csv; 1, 0, -1 or blank in a column for
each finding) and NIH ChestX-ray14 (Wang et al. 2017: Data_Entry_2017.csv, lists such as
`Edema|Mass`, and the splits of train_val_list.txt and test_list.txt).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RawRecord,
    RecordError,
    Remark,
    resolve_image_path,
)
from medley.datasets.classification import (
    NEGATIVE,
    POSITIVE,
    LabeledImage,
    LabelSet,
    check_classes,
    read,
)
from medley.datasets.input_files import SPLIT_NAMES, split_of
from medley.datasets.label_columns import (
    Columns,
    Kind,
    detect_kind,
    find_columns,
    is_blank,
    is_positive,
    read_finding,
    split_list,
    text_of,
)
from medley.datasets.labeled_files import frame_names
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.utils.unicode_names import existing_name

_MAX_CLASSES = 1000
_NIH_LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}


def image_folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


@dataclass(frozen=True)
class _Table:
    """A CSV file, its columns, and the split of its images.

    Attributes:
        path: the file
        columns: its columns
        split: split by the file's name, "" for none
        listed: name of an image -> its split, by NIH's lists; empty without lists
    """

    path: Path
    columns: Columns
    split: str
    listed: dict[str, str]

    def rows(self, config: ConversionConfig) -> Iterator[tuple[str, Any]]:
        """(location, row or RecordError)"""
        for where, _, row in records_of(self.path, encoding=config.encoding):
            yield where, row

    def split_of(self, row: dict[str, Any]) -> str:
        """Raises RecordError for an unknown split."""
        if self.columns.split is not None:
            value = text_of(row, self.columns.split)
            if value.lower() not in SPLIT_NAMES:
                raise RecordError(
                    f"{self.columns.split!r} is not a split (got {value!r}, expected train, val "
                    "or test)."
                )
            return SPLIT_NAMES[value.lower()]
        if self.listed:
            name = text_of(row, self.columns.image).rpartition("/")[2]
            if name not in self.listed:
                raise RecordError(f"The image {name!r} is in neither of {', '.join(_NIH_LISTS)}.")
            return self.listed[name]
        return self.split


@dataclass
class _Survey:
    """What a first reading of all tables finds.

    Attributes:
        values: split -> label column -> value -> number of rows
    """

    values: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)

    def add(self, split: str, columns: Columns, row: dict[str, Any]) -> None:
        own = self.values.setdefault(split, {name: Counter() for name in columns.labels})
        for name in columns.labels:
            own[name][text_of(row, name)] += 1

    def distinct(self, kind: Kind = "findings") -> list[str]:
        """The values of all label columns that are not blank."""
        found = {v for own in self.values.values() for counter in own.values() for v in counter}
        return sorted((value for value in found if not is_blank(value, kind)), key=_natural)


def _natural(text: str) -> tuple[int, float, str]:
    """Sorts numbers by value, before other texts."""
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    tables = [_open_table(path, config) for path in _find_files(config.path)]
    if len({table.columns.labels for table in tables}) > 1:
        raise UserError(f"{config.path}: The files have different label columns.")
    survey = _read_survey(tables, config)
    kind = detect_kind(tables[0].columns, survey.distinct())
    classes = _classes(config, kind, tables[0].columns, survey)
    yield from _check_examples(config, kind, classes, survey)
    labels = LabelSet(
        tables[0].path.stem, "labels_csv", "one_label" if kind == "classes" else "each_label",
        classes, kind == "findings" and config.uncertain == "class",
    )  # fmt: skip
    images = _Images(config.image_folder or image_folder(config.path))
    for table in tables:
        for where, row in table.rows(config):
            if isinstance(row, RecordError):
                yield where, table.split, row
                continue
            try:
                split = table.split_of(row)
                if config.split not in ("all", split):
                    continue
                for record in _row_records(row, table.columns, kind, labels, images, config):
                    yield where, split, record
            except RecordError as error:
                yield where, "", RecordError(str(error), content=row)


def _row_records(
    row: dict[str, Any],
    columns: Columns,
    kind: Kind,
    labels: LabelSet,
    images: _Images,
    config: ConversionConfig,
) -> Iterator[Any]:
    name = text_of(row, columns.image)
    path = images.find(name)
    values, remarks = _read_labels(row, columns, kind, labels.classes, config)
    yield from remarks
    frames, patient = frame_names(path, config.frames)
    for frame in frames:
        identifier = name + frame.removeprefix(path)
        own = LabeledImage(
            identifier, frame, values, columns.patient_of(row) or patient, columns.others(row)
        )
        yield from own.to_records(labels)


def _read_labels(
    row: dict[str, Any],
    columns: Columns,
    kind: Kind,
    classes: tuple[str, ...],
    config: ConversionConfig,
) -> tuple[dict[str, str], list[Remark]]:
    """Class -> positive, negative or uncertain; and notes. Raises RecordError for a bad label."""
    if kind == "findings":
        found = {name: read_finding(text_of(row, name), name, config) for name in classes}
        labels = {name: value for name, (value, _) in found.items() if value is not None}
        return labels, [remark for _, remark in found.values() if remark is not None]
    (column,) = columns.labels
    text = text_of(row, column)
    if kind == "list":
        if is_blank(text) and config.blank == "ignore":
            return {}, [Remark("blank labels left out (--blank ignore)")]
        own = [] if is_blank(text) else split_list(text)
        note = [Remark("blank labels read as negative (--blank negative)")] * is_blank(text)
        return {name: POSITIVE if name in own else NEGATIVE for name in classes}, note
    if is_blank(text, kind):
        raise RecordError(f"The label in {column!r} is blank.")
    if text not in classes:
        return {}, [Remark("images of other classes left out (--classes)")]
    return {text: POSITIVE}, []


# --- files --------------------------------------------------------------------------------


def _find_files(path: Path) -> list[Path]:
    """The file, or the files of a folder. Raises UserError if it is unclear which."""
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".csv", ".tsv"))
    by_split = [file for file in files if file.stem.lower() in SPLIT_NAMES]
    nih = [file for file in files if file.name.lower().startswith("data_entry")]
    chosen = by_split or nih or files
    if not chosen or (len(chosen) > 1 and not by_split):
        found = ", ".join(file.name for file in chosen) or "no CSV file"
        raise UserError(
            f"{path}: Expected one CSV file, or train.csv, valid.csv and test.csv (got {found}). "
            "Name a file with --input."
        )
    order = ("train", "val", "test")
    return sorted(chosen, key=lambda file: order.index(split_of(file, file) or "train"))


def _open_table(path: Path, config: ConversionConfig) -> _Table:
    """Finds the columns by the first row. Raises UserError for a file without one."""
    first = next(
        (row for _, _, row in records_of(path, encoding=config.encoding) if isinstance(row, dict)),
        None,
    )
    if first is None:
        raise UserError(f"{path}: The file has no valid rows.")
    columns = find_columns(path, list(first), config)
    lists = {path.with_name(name): split for name, split in _NIH_LISTS.items()}
    listed = {}
    if columns.image.lower() == "image index" and all(file.is_file() for file in lists):
        listed = {name: split for file, split in lists.items() for name in _lines(file)}
    return _Table(path, columns, split_of(path, path), listed)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8-sig").split()


def _read_survey(tables: list[_Table], config: ConversionConfig) -> _Survey:
    """Reads all rows. Raises UserError for a split without rows."""
    survey = _Survey()
    for table in tables:
        for _, row in table.rows(config):
            if isinstance(row, RecordError):
                continue
            try:
                survey.add(table.split_of(row), table.columns, row)
            except RecordError:
                continue  # `records` yields it
    if config.split != "all" and config.split not in survey.values:
        found = ", ".join(filter(None, survey.values)) or "none"
        raise UserError(f"--split {config.split}: {config.path} has no such split (got {found}).")
    return survey


class _Images:
    """Finds the image files that a table names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, name: str) -> str:
        """The path of an image; one below the folder also for a missing image.

        Raises RecordError for an invalid name, and for a bare name of several files.
        """
        path = resolve_image_path(name, self.folder)
        if _exists(path):
            return path
        first, slash, rest = name.partition("/")
        if slash and first == self.folder.resolve().name:  # CheXpert's paths begin above the CSV
            return resolve_image_path(rest, self.folder)
        if not slash and len(found := self._by_name.get(name.partition("#")[0], [])):
            if len(found) > 1:
                raise RecordError(f"Several files have the name {name!r} ({found[0]}, {found[1]}).")
            return found[0] + name[len(name.partition("#")[0]) :]
        return path

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """Name of a file -> paths below the folder: NIH's images are in images_001/images, ..."""
        names: dict[str, list[str]] = {}
        for folder, _, files in os.walk(self.folder):
            for name in files:
                names.setdefault(name, []).append(os.path.join(folder, name))  # noqa: PTH118
        return names


def _exists(path: str) -> bool:
    names = (path, path.partition("#")[0])
    return any(Path(existing_name(name)).is_file() for name in names)


# --- classes ------------------------------------------------------------------------------


def _classes(
    config: ConversionConfig, kind: Kind, columns: Columns, survey: _Survey
) -> tuple[str, ...]:
    """The classes in their order. Raises UserError for too few, too many or unknown ones."""
    if kind == "findings":
        found = list(columns.labels)
    elif kind == "list":
        found = sorted({name for value in survey.distinct() for name in split_list(value)})
    else:
        found = survey.distinct(kind)
    where = f"{config.path}: {', '.join(columns.labels[:1])}"
    if not survey.distinct(kind):
        raise UserError(f"{where}: No image has a label.")
    if unknown := [name for name in config.classes or [] if name not in found]:
        raise UserError(
            f"--classes: {config.path} has no class {unknown[0]!r} (got {', '.join(found[:30])})."
        )
    chosen = tuple(dict.fromkeys(config.classes or found))
    if kind == "classes":
        check_classes(where, chosen)
    if not chosen:
        raise UserError(f"{where}: No image has a finding.")
    if len(chosen) > _MAX_CLASSES:
        raise UserError(
            f"{where}: Too many classes (got {len(chosen)}, limit {_MAX_CLASSES}). Name the column "
            "of the labels with --label_columns."
        )
    return chosen


def _check_examples(
    config: ConversionConfig, kind: Kind, classes: tuple[str, ...], survey: _Survey
) -> Iterator[RawRecord]:
    """A class without an example in a split is a remark; in train it is an error for classes."""
    for split, own in survey.values.items():
        if kind == "findings":
            present = {name for name, counter in own.items() if any(map(is_positive, counter))}
        else:
            values = [value for counter in own.values() for value in counter]
            present = {name for value in values for name in (split_list(value) or [value])}
        absent = ", ".join(name for name in classes if name not in present)
        if absent and kind == "classes" and split == "train":
            raise UserError(
                f"{config.path}: A class has no example in train (got none of {absent}). Add "
                "examples, or choose the classes with --classes."
            )
        if absent and config.split in ("all", split):
            text = f"{split or 'the file'} has no positive example of {absent}"
            yield str(config.path), split, Remark(text)


FORMAT = FormatSpec(records, read, has_splits=True, default_image_folder=image_folder)
