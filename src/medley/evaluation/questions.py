"""Questions about pictures, with their right answers where the file has them, of any format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from medley.data.document import Document, ImagePart, Turn
from medley.data.vocabulary import IMAGE
from medley.datasets.base import resolve_image_path
from medley.datasets.conversion import read_record
from medley.datasets.llava import TURNS
from medley.datasets.readers import records_of
from medley.datasets.registry import FORMATS, ConversionConfig, Name, RecordError
from medley.errors import UserError
from medley.utils.files import check_unicode

OPEN, CLOSED = "OPEN", "CLOSED"


@dataclass(frozen=True)
class Question:
    """`asked` is the text as it stands in the file, with its `<image>`; `prompt` what a model is
    asked. `kind` is OPEN, CLOSED, or None where the record does not say; `fields` is the rest of
    the record."""

    identifier: str | int
    asked: str
    prompt: Document
    gold: str | None = None
    kind: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(p for p in self.prompt.turns[0].parts if isinstance(p, str)).strip()

    @property
    def image(self) -> str | None:
        found = self.prompt.pictures
        return str(found[0].path) if found and found[0].path is not None else None


def read_questions(path: Path, form: Name, choices: ConversionConfig) -> list[Question]:
    """Questions in their order. Raises UserError with the place of a bad one.

    `llava` takes LLaVA's question files (JSONL of question_id, image, text) and its lists (id,
    image, conversations). Records of any other format are read as the converter reads them.
    """
    found = []
    records = records_of(path) if form == "llava" else FORMATS[form].records(choices)
    for place, _, record in records:
        if isinstance(record, RecordError):
            raise UserError(f"{place}: {record}")
        try:
            check_unicode(place, record)
            if form == "llava":
                found.append(_of_llava(record, choices.image_folder))
            else:
                found.append(_of_sample(record, form, choices, len(found)))
        except RecordError as error:
            raise UserError(f"{place}: {error}") from error
    if not found:
        raise UserError(f"{path}: no questions in it")
    return found


def _of_llava(record: Any, folder: Path | None) -> Question:
    if not isinstance(record, dict):
        raise RecordError("expected an object")
    key = next((name for name in ("question_id", "id") if name in record), None)
    turns = next((record[name] for name in TURNS if name in record), None)
    if key is None or ("text" not in record and turns is None):
        raise RecordError("expected question_id and text, or id and conversations")
    said = list(_said(record, turns))
    if len(said) > 2:
        raise RecordError(
            f"{len(said)} turns, expected a question and its answer: answers have one for each "
            "record, so give each question its own"
        )
    asked, gold = said[0], said[1] if len(said) > 1 else None
    identifier, image = record[key], record.get("image")
    if not isinstance(asked, str):
        raise RecordError("the question is no text")
    if isinstance(gold, bool | list | dict):
        raise RecordError("the answer is no text")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise RecordError(f"{key} is {identifier!r}, expected text or a number")
    if not isinstance(image, str | None):
        raise RecordError(f"image is {image!r}, expected a path")
    # The picture's place in LLaVA's files is before or behind the words; here it comes first.
    words = asked.replace(IMAGE, "").strip()
    picture = [ImagePart(path=resolve_image_path(image, folder))] if image else []
    fields = {n: v for n, v in record.items() if n not in (*TURNS, "text", key, "image")}
    return Question(
        identifier, asked, Document((Turn("user", (*picture, words)),)),
        None if gold is None else str(gold), _kind(record.get("answer_type")), fields,
    )  # fmt: skip


def _said(record: dict[str, Any], turns: Any) -> Iterator[Any]:
    """The question, and its answer where there is one."""
    if "text" in record:
        yield record["text"]
        return
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"conversations is {turns!r}, expected a list of turns")
    for number, turn in enumerate(turns):
        expected = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or "value" not in turn:
            raise RecordError(f"turn {number} has no value")
        if turn.get("from", expected) != expected:
            raise RecordError(f"turn {number} is from {turn['from']!r}, expected {expected}")
        yield turn["value"]


def _of_sample(record: Any, form: Name, choices: ConversionConfig, number: int) -> Question:
    sample = read_record(FORMATS[form], record, choices)
    turns = sample.document.turns
    if turns[0].role != "user" or len(turns) > 2:
        raise RecordError(
            f"{len(turns)} turns, the first of the {turns[0].role}: expected a question and its "
            "answer"
        )
    asked = "\n".join(part if isinstance(part, str) else IMAGE for part in turns[0].parts)
    gold = None
    if len(turns) == 2:
        if any(isinstance(part, ImagePart) for part in turns[1].parts):
            raise RecordError("a picture in the answer: only words are compared")
        gold = "".join(str(part) for part in turns[1].parts)
    if form == "science_qa":  # the letter alone is right, whatever a prompt format adds to it
        gold = ascii_uppercase[sample.fields["answer"]]
    identifier = sample.fields.get("id", number)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise RecordError(f"id is {identifier!r}, expected text or a number")
    fields = {n: v for n, v in sample.fields.items() if n != "id"}
    return Question(
        identifier, asked, Document(turns[:1]), gold, _kind(fields.get("answer_type")), fields
    )


_KINDS = {
    OPEN: OPEN, CLOSED: CLOSED, "YES/NO": CLOSED, "OTHER": OPEN, "NUMBER": OPEN,
}  # fmt: skip


def _kind(value: Any) -> str | None:
    """OPEN or CLOSED, also by PathVQA's names; None where nothing is said. Raises RecordError for
    anything else."""
    if value is None:
        return None
    kind = _KINDS.get(str(value).strip().upper())
    if kind is None:
        raise RecordError(
            f"answer_type is {value!r}, expected OPEN or CLOSED (or yes/no, number, other)"
        )
    return kind
