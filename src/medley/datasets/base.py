"""Types and helpers that all dataset formats share.

A format module reads a record into a `Sample` (a document and the record's other fields) and
writes a sample as a record.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from medley.data.document import Document, ImagePart
from medley.errors import UserError
from medley.images.formats import Frames
from medley.utils.image_names import image_name_hint as image_name_hint

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
SPLITS = ("train", "val", "test")
CAPTION_PROMPT = "Please describe this picture."  # MedMax's caption prompt  # alias


class RecordError(UserError):
    """A record that cannot be converted; the message gives the reason.

    Attributes:
        content: the raw value, for records that could not be parsed
        truncated: whether the rest of the file cannot be read
    """

    def __init__(self, reason: str, content: Any = None, truncated: bool = False) -> None:
        super().__init__(reason)
        self.content, self.truncated = content, truncated


class RestrictedRecord(RecordError):
    """A record that is skipped because its image requires credentials."""


class Remark(str):
    """In place of a record: a note on the input, which is counted and printed at the end."""


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Options for reading the records of a dataset.

    Args:
        image_folder: folder that image paths are relative to
        split: published split to read; all for every split
        language: language of SLAKE's questions
        prompt_format: ScienceQA's prompt format, such as QCM-LEPA
        prompt: prompt that is paired with captions
        question_key: column with the questions
        answer_key: column with the answers
        image_key: column with the image paths
        label_columns: columns with the labels, for labels_csv; the known layouts need none
        classes: use only these classes, in this order, for labels_csv
        patient_key: column with the patient ids, for labels_csv
        uncertain: what -1 means in a label column, for labels_csv: ignore leaves the question out,
            class asks for a third answer
        blank: what an empty cell means in one of several label columns, for labels_csv
        encoding: encoding of the CSV file, for labels_csv
        frames: frames to read of files with several (DICOM, NIfTI, TIFF), for image_folder and
            labels_csv
        question_templates: YAML file of the questions about images with labels
    """

    image_folder: Path | None = None
    split: str = "all"
    language: Literal["all", "en", "zh"] = "all"
    prompt_format: str = "QCM-LEPA"
    prompt: str | None = None
    question_key: str = "question"
    answer_key: str = "answer"
    image_key: str = "image"
    label_columns: list[str] | None = None
    classes: list[str] | None = None
    patient_key: str | None = None
    uncertain: Literal["ignore", "negative", "positive", "class"] = "ignore"
    blank: Literal["negative", "ignore"] = "negative"
    encoding: str = "utf-8"
    frames: Frames | None = None
    question_templates: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(DatasetOptions):
    """Options for converting the records of a dataset.

    Args:
        image_folder: folder that image paths are relative to; embedded images are saved there
        caption_key: column with the captions
        dataset: name of the dataset in dataset_info.json
        image_codes: folder of image codes for MedMax's records that require credentials
        id_key: field with the id of these records
        compat: llava reproduces the swapped AL and AE prompt formats of LLaVA's converter
    """

    caption_key: str = "caption"
    dataset: str | None = None
    image_codes: Path | None = None
    id_key: str = "id"
    compat: Literal["none", "llava"] = "none"


@dataclass(frozen=True)
class ConversionConfig(ConversionOptions):
    """The options of a conversion and the path of its input."""

    path: Path


@dataclass(frozen=True)
class Sample:
    """A document, the other fields of its record (JSON values), and notes on how it was read."""

    document: Document
    fields: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


# The location of a record (file and number), its published split ("" for none), and its JSON
# value, or a RecordError if the record could not be parsed, or a Remark in place of a record.
RawRecord = tuple[str, str, Any]


@dataclass(frozen=True)
class FormatSpec:
    """One dataset format.

    `read` and `write` raise RecordError with the reason for a record that cannot be converted.

    Attributes:
        records: input -> raw records
        read: raw record -> sample
        write: sample -> raw record; None for a read-only format
        layout: type of the written file
        columns: columns of a written CSV file
        sidecar_files: name of a written file -> files in the same folder that describe it
        default_image_folder: input -> folder of the published images
        has_splits: whether the dataset is published in several splits
    """

    records: Callable[[ConversionConfig], Iterator[RawRecord]]
    read: Callable[[Any, ConversionConfig], Sample]
    write: Callable[[Sample, ConversionConfig], dict[str, Any]] | None = None
    layout: Literal["json", "jsonl", "csv"] = "json"
    columns: Callable[[ConversionConfig], Sequence[str]] | None = None
    sidecar_files: Callable[[str, ConversionConfig], dict[str, dict[str, Any]]] | None = None
    default_image_folder: Callable[[Path], Path] | None = None
    has_splits: bool = False


# --- fields of records --------------------------------------------------------------------


def get_text(record: Any, key: str, remarks: list[str]) -> str:
    """The text of a field; a number is converted to text and noted in `remarks`.

    Raises RecordError for any other value.
    """
    value = get_value(record, key)
    if type(value) is str:
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RecordError(f"{key!r} is not a string (got {repr_short(value)}).")
    remarks.append("numbers read as text")
    return str(value)


def get_value(record: Any, key: str) -> Any:
    """The value of a field. Raises RecordError if it is missing."""
    if not isinstance(record, dict):
        raise RecordError(f"The record is not an object (got {repr_short(record)}).")
    if key not in record:
        raise RecordError(f"{key!r} is missing.")
    return record[key]


def extra_fields(record: dict[str, Any], *used: str) -> dict[str, Any]:
    """The fields of a record except for the used ones."""
    return {name: value for name, value in record.items() if name not in used}


def repr_short(value: Any) -> str:
    """A value for an error message: its type and at most 60 characters."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# --- image paths --------------------------------------------------------------------------


def resolve_image_path(name: Any, folder: Path | None) -> str:
    """An image path of a record -> its path below a folder.

    Raises RecordError for a path outside of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise RecordError(f"An image path is invalid (got {repr_short(name)}).")
    if _ADDRESS.match(name):
        raise RecordError(
            f"An image path is an address (got {repr_short(name)}).{image_name_hint(name)}"
        )
    if folder is None:
        return name
    joined = name if name.startswith(os.sep) else f"{_to_text(folder)}{os.sep}{name}"
    path = os.path.normpath(joined)
    if not is_below(path, folder):
        raise RecordError(f"The image {name!r} is outside of the folder {folder}.")
    return path


def is_below(path: str, folder: Path) -> bool:
    """Lexical containment check. Symlinks are not resolved, so a link may point outside."""
    working_folder, prefix = _absolute_prefix(folder)
    absolute = path if path.startswith(os.sep) else working_folder + path
    return (os.path.normpath(absolute) if ".." in absolute else absolute).startswith(prefix)


@lru_cache(16)
def _to_text(folder: Path) -> str:
    return os.fspath(folder)


@lru_cache(16)
def _absolute_prefix(folder: Path) -> tuple[str, str]:
    """The working folder, and the prefix of all absolute paths below `folder`."""
    working_folder = str(Path.cwd()).rstrip(os.sep) + os.sep
    return working_folder, os.path.normpath(Path(working_folder) / folder).rstrip(os.sep) + os.sep


def relative_image_name(path: str, folder: Path | None) -> str:
    """Inverse of `resolve_image_path`. Raises RecordError for a path outside of the folder."""
    if folder is None:
        return path
    if not is_below(path, folder):
        raise RecordError(f"The image {path!r} is outside of the folder {folder}.")
    return os.path.relpath(path, folder)


def resolve_image_paths(document: Document, folder: Path | None) -> Document:
    """Resolves the image paths of a document that are not below the folder yet."""
    if folder is None:
        return document

    def resolve(image_part: ImagePart) -> ImagePart:
        if image_part.path is None or is_below(str(image_part.path), folder):
            return image_part
        return replace(image_part, path=resolve_image_path(str(image_part.path), folder))

    return document.map_images(resolve)


def require_path(image_part: ImagePart) -> str:
    """The path of an image. Raises RecordError for an image without a path."""
    if image_part.path is None:
        raise RecordError("An image has image codes but no path; this format requires a path.")
    return str(image_part.path)
