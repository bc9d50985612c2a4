"""What all formats speak: a document with what else its record said, and what was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from medley.data.document import ContentPart, Document, ImagePart, Turn
from medley.data.vocabulary import IMAGE
from medley.errors import UserError

SPLITS = ("train", "val", "test")
CAPTION_PROMPT = "Please describe this picture."  # MedMax's question for a caption


class RecordError(UserError):
    """A record that cannot be converted; the message says why.

    `content` is what stands there, where it is no record; after a `torn` one nothing more of its
    file can be read.
    """

    def __init__(self, reason: str, content: Any = None, torn: bool = False) -> None:
        super().__init__(reason)
        self.content, self.torn = content, torn


class RestrictedRecord(RecordError):
    """A record that is left out on purpose until its owner has the rights to its picture."""


@dataclass(frozen=True)
class ConversionConfig:
    """What a conversion was asked for; a format reads what concerns it.

    `image_folder` is where pictures are named from, and where embedded ones are written to.
    """

    path: Path
    image_folder: Path | None = None
    prompt: str | None = None
    split: str = "all"
    language: Literal["all", "en", "zh"] = "all"
    prompt_format: str = "QCM-LEPA"
    dataset: str | None = None
    question_key: str = "question"
    answer_key: str = "answer"
    image_key: str = "image"
    caption_key: str = "caption"
    image_codes: Path | None = None
    id_key: str = "id"
    compat: Literal["none", "llava"] = "none"


@dataclass(frozen=True)
class Sample:
    """A document, the other values of its record (JSON), and remarks about how it was read."""

    document: Document
    fields: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


# Where a record stands (file and number), its published split ("" for none), and what stands
# there: a RecordError where it could not even be read.
Found = tuple[str, str, Any]


@dataclass(frozen=True)
class FormatSpec:
    """One data set format. `write` is None for one that is only read.

    `records` yields what stands in the files; `read` makes one record a sample, `write` a sample
    one record (for a layout of CSV: its `columns`); both raise RecordError, with the reason.
    `beside` gives files, by name, to stand beside the written one.
    """

    records: Callable[[ConversionConfig], Iterator[Found]]
    read: Callable[[Any, ConversionConfig], Sample]
    write: Callable[[Sample, ConversionConfig], dict[str, Any]] | None = None
    layout: Literal["json", "jsonl", "csv"] = "json"
    columns: Callable[[ConversionConfig], Sequence[str]] | None = None
    beside: Callable[[str, ConversionConfig], dict[str, Any]] | None = None
    images_in: Callable[[Path], Path] | None = None  # the usual folder of its pictures
    splits: bool = False  # whether it is published in several, so that --split means something


# --- values of records --------------------------------------------------------------------


def text_of(record: Any, key: str, remarks: list[str]) -> str:
    """A text, or a number, which is made one. Raises RecordError for what is neither."""
    value = value_of(record, key)
    if type(value) is str:
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RecordError(f"{key!r} is {repr_short(value)}, expected text")
    remarks.append("numbers read as text")
    return str(value)


def value_of(record: Any, key: str) -> Any:
    if not isinstance(record, dict):
        raise RecordError(f"{repr_short(record)}, expected an object")
    if key not in record:
        raise RecordError(f"{key!r} is missing")
    return record[key]


def extra_fields(record: dict[str, Any], *taken: str) -> dict[str, Any]:
    """The values that were not taken, to be kept."""
    return {name: value for name, value in record.items() if name not in taken}


def repr_short(value: Any) -> str:
    """A value in an error: short, with its kind."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# --- pictures -----------------------------------------------------------------------------


def resolve_image_path(name: Any, folder: Path | None) -> str:
    """A picture's place below a folder. Raises RecordError for one that leads out of it."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise RecordError(f"a picture is named {repr_short(name)}, expected a path")
    if folder is None:
        return name
    own = name if name.startswith(os.sep) else f"{_text(folder)}{os.sep}{name}"
    path = os.path.normpath(own)
    if not is_below(path, folder):
        raise RecordError(f"the picture {name!r} lies outside of the folder {folder}")
    return path


def is_below(path: str, folder: Path) -> bool:
    """Whether a path lies below a folder, by their names: whoever made a link meant it."""
    here, above = _above(folder)
    whole = path if path.startswith(os.sep) else here + path
    return (os.path.normpath(whole) if ".." in whole else whole).startswith(above)


@lru_cache(16)
def _text(folder: Path) -> str:
    return os.fspath(folder)


@lru_cache(16)
def _above(folder: Path) -> tuple[str, str]:
    """The working folder, and what the whole path of everything below a folder begins with."""
    here = str(Path.cwd()).rstrip(os.sep) + os.sep
    return here, os.path.normpath(Path(here) / folder).rstrip(os.sep) + os.sep


def relative_image_name(path: str, folder: Path | None) -> str:
    """The inverse of `resolve_image_path`. Raises RecordError for a path that is not below the folder."""
    if folder is None:
        return path
    if not is_below(path, folder):
        raise RecordError(f"the picture {path!r} lies outside of the folder {folder}")
    return os.path.relpath(path, folder)


def resolve_image_paths(document: Document, folder: Path | None) -> Document:
    """A document whose pictures are named from the folder, or lie below it already."""
    if folder is None:
        return document

    def below(picture: ImagePart) -> ImagePart:
        if picture.path is None or is_below(str(picture.path), folder):
            return picture
        return replace(picture, path=resolve_image_path(str(picture.path), folder))

    return document.map_images(below)


def require_path(picture: ImagePart) -> str:
    if picture.path is None:
        raise RecordError("a picture has codes and no path: this format has no place for them")
    return str(picture.path)


def single_image(pictures: Sequence[ImagePart]) -> ImagePart | None:
    if len(pictures) > 1:
        raise RecordError(f"{len(pictures)} pictures, this format holds one")
    return pictures[0] if pictures else None


# --- one question, one answer -------------------------------------------------------------


def question_and_answer(picture: str | None, question: str, answer: str) -> Document:
    """The usual document of a visual question: the picture, then the question; the answer."""
    parts: list[ContentPart] = [ImagePart(path=picture)] if picture is not None else []
    return Document((Turn("user", (*parts, question)), Turn("assistant", (answer,))))


def to_qa(document: Document) -> tuple[str | None, str, str]:
    """The inverse: path of the picture, question, answer.

    Raises RecordError for a document that is more than one question and its answer.
    """
    if [turn.role for turn in document.turns] != ["user", "assistant"]:
        raise RecordError(f"{len(document.turns)} turns, this format holds one question and answer")
    asked, answered = document.turns
    picture = single_image(document.pictures)
    parts = asked.parts[1:] if picture is not None else asked.parts
    if picture is not None and asked.parts[0] is not picture:
        raise RecordError("the picture does not stand before the question, which this format needs")
    path = None if picture is None else require_path(picture)
    return path, join_text(parts), join_text(answered.parts)


def from_caption(picture: str, caption: str, choices: ConversionConfig) -> Document:
    """A question about a picture and its caption; without a question (`--prompt ""`) the caption
    stands behind the picture, and both are learned."""
    prompt = CAPTION_PROMPT if choices.prompt is None else choices.prompt
    if prompt:
        return question_and_answer(picture, prompt, caption)
    return Document((Turn("assistant", (ImagePart(path=picture), caption)),))


def to_caption(document: Document, choices: ConversionConfig) -> tuple[str, str]:
    """The inverse: path of the picture, caption.

    Raises RecordError for any other document, and for another question.
    """
    prompt = CAPTION_PROMPT if choices.prompt is None else choices.prompt
    if prompt:
        path, question, caption = to_qa(document)
        if question != prompt:
            raise RecordError(
                f"asks {repr_short(question)}, and this format holds captions (--prompt)"
            )
    else:
        first, *rest = document.turns[0].parts or ("",)
        if len(document.turns) > 1 or document.turns[0].role != "assistant":
            raise RecordError(f"{len(document.turns)} turns, this format holds captions")
        path, caption = None, ""
        if isinstance(first, ImagePart) and all(isinstance(part, str) for part in rest):
            path, caption = require_path(first), join_text(rest)
    if path is None:
        raise RecordError("not a picture and its caption, which is what this format holds")
    return path, caption


def join_text(parts: Sequence[ContentPart]) -> str:
    assert all(isinstance(part, str) for part in parts)
    return "".join(str(part) for part in parts)


def split_at_placeholders(text: str, count: int) -> list[ContentPart | None]:
    """Text cut at its `<image>` marks, with None for each; where a record has no pictures
    (`count` 0), the mark is text that somebody typed."""
    if not count:
        return [text] if text else []
    pieces: list[ContentPart | None] = []
    for number, piece in enumerate(text.split(IMAGE)):
        pieces += [None] if number else []
        pieces += [piece] if piece else []
    return pieces
