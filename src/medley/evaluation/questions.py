"""Questions about images in any dataset format, with their gold answers if the file has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from medley.data.document import ContentPart, Document, ImagePart, Turn
from medley.data.vocabulary import IMAGE
from medley.datasets.base import ConversionConfig, RecordError, Remark
from medley.datasets.input_files import records_at
from medley.datasets.llava import CONVERSATION_KEYS, find_images
from medley.datasets.placement import (
    IMAGE_KEYS,
    check_image_count,
    place_images,
    refuse_other_media,
    refuse_placeholder,
    take_system,
)
from medley.datasets.registry import FORMATS, FormatName
from medley.datasets.samples import read_record
from medley.errors import UserError
from medley.utils.files import check_unicode

OPEN, CLOSED = "OPEN", "CLOSED"
_ID_KEYS = ("question_id", "id", "sample_id")
_KINDS = {
    OPEN: OPEN, CLOSED: CLOSED, "YES/NO": CLOSED, "OTHER": OPEN, "NUMBER": OPEN,
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        identifier: id of the record, or its number
        raw_text: the text in the file, with its `<image>`
        prompt: the prompt of a model
        gold: the gold answer
        kind: OPEN, CLOSED, or None if the record does not contain it
        fields: the other fields of the record
    """

    identifier: str | int
    raw_text: str
    prompt: Document
    gold: str | None = None
    kind: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(p for p in self.prompt.turns[0].parts if isinstance(p, str)).strip()

    @property
    def image(self) -> str | None:
        """The path of the first image."""
        images = self.prompt.images
        return str(images[0].path) if images and images[0].path is not None else None


def read_questions(path: Path, name: FormatName, config: ConversionConfig) -> list[Question]:
    """The questions in their order. Raises UserError with the location of an invalid one.

    `llava` covers LLaVA's question files (JSONL with question_id, image and text) and its lists
    (id, image, conversations), with one image or several. Other formats are read as
    `medley convert` reads them.
    """
    questions: list[Question] = []
    records = records_at(path) if name == "llava" else FORMATS[name].records(config)
    for where, _, record in records:
        if isinstance(record, Remark):
            continue
        if isinstance(record, RecordError):
            raise UserError(f"{where}: {record}")
        try:
            check_unicode(where, record)
            if name == "llava":
                questions.append(_from_llava(record, config, len(questions)))
            else:
                questions.append(_from_record(record, name, config, len(questions)))
        except RecordError as error:
            raise UserError(f"{where}: {error}") from error
    if not questions:
        raise UserError(f"{path}: The file contains no questions.")
    return questions


def _from_llava(record: Any, config: ConversionConfig, number: int) -> Question:
    if not isinstance(record, dict):
        raise RecordError("Expected an object.")
    refuse_other_media(record)
    turns = next((record[name] for name in CONVERSATION_KEYS if name in record), None)
    if "text" not in record and turns is None:
        raise RecordError("Expected question_id and text, or id and conversations.")
    texts = list(_turn_texts(record, turns))
    if len(texts) > 2:
        raise RecordError(
            f"Too many turns (got {len(texts)}, expected a question and its answer). Make one "
            "record of each question."
        )
    text, gold = texts[0], texts[1] if len(texts) > 1 else None
    key = next((name for name in _ID_KEYS if name in record), None)
    identifier = number if key is None else record[key]
    if not isinstance(text, str):
        raise RecordError("The question must be a string.")
    if isinstance(gold, bool | list | dict):
        raise RecordError("The answer must be a string.")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise RecordError(f"{key} must be a string or a number (got {identifier!r}).")
    image_key, images = find_images(record, config, [])
    if gold is not None and IMAGE in str(gold):
        raise RecordError(f"The answer contains {IMAGE}, but only text can be scored.")
    system, system_keys = take_system(record)
    parts = _prompt_parts(text, images, record)
    if system is not None:
        refuse_placeholder(system)
        parts = (f"{system}\n", *parts)
    used = {*CONVERSATION_KEYS, *system_keys, "text", key, image_key, "image"}
    fields = {name: value for name, value in record.items() if name not in used}
    return Question(
        identifier, text, Document((Turn("user", parts),)),
        None if gold is None else str(gold), _parse_kind(record.get("answer_type")), fields,
    )  # fmt: skip


def _prompt_parts(
    text: str, images: list[ImagePart], record: dict[str, Any]
) -> tuple[ContentPart, ...]:
    """A question with its images: one image comes first, several are at their placeholders.

    In LLaVA's files `<image>` is before or after the text, or is left out.
    """
    placeholders = text.count(IMAGE)
    if placeholders:
        check_image_count(placeholders, len(images), record, IMAGE_KEYS)
    if len(images) > 1 and placeholders:
        (parts,) = place_images([text.strip()], images, record, IMAGE_KEYS, line_breaks=True)
        return parts
    return (*images, text.replace(IMAGE, "").strip())


def _turn_texts(record: dict[str, Any], turns: Any) -> Iterator[Any]:
    """The question, and the answer if the record has it."""
    if "text" in record:
        yield record["text"]
        return
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"conversations must be a list of turns (got {turns!r}).")
    for number, turn in enumerate(turns):
        expected = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or "value" not in turn:
            raise RecordError(f"Turn {number} has no value.")
        if turn.get("from", expected) != expected:
            raise RecordError(f"Turn {number} must be from {expected} (got {turn['from']!r}).")
        yield turn["value"]


def _from_record(record: Any, name: FormatName, config: ConversionConfig, number: int) -> Question:
    sample = read_record(FORMATS[name], record, config)
    turns = sample.document.turns
    if turns[0].role != "user" or len(turns) > 2:
        raise RecordError(
            f"Expected a question and its answer (got {len(turns)} turns that start with the "
            f"{turns[0].role})."
        )
    text = "\n".join(part if isinstance(part, str) else IMAGE for part in turns[0].parts)
    gold = None
    if len(turns) == 2:
        if any(isinstance(part, ImagePart) for part in turns[1].parts):
            raise RecordError("The answer contains an image, but only text can be scored.")
        gold = "".join(str(part) for part in turns[1].parts)
    if name == "science_qa":  # The gold answer is the letter, whatever the prompt format adds.
        gold = ascii_uppercase[sample.fields["answer"]]
    identifier = sample.fields.get("id")
    identifier = number if identifier is None else identifier
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise RecordError(f"id must be a string or a number (got {identifier!r}).")
    fields = {n: v for n, v in sample.fields.items() if n != "id"}
    kind = _parse_kind(fields.get("answer_type"))
    return Question(identifier, text, Document(turns[:1]), gold, kind, fields)


def _parse_kind(value: Any) -> str | None:
    """OPEN or CLOSED, also from PathVQA's names; None without a value.

    Raises RecordError for any other value.
    """
    if value is None:
        return None
    kind = _KINDS.get(str(value).strip().upper())
    if kind is None:
        raise RecordError(
            f"answer_type is invalid (got {value!r}, expected OPEN, CLOSED, yes/no, number or "
            "other)."
        )
    return kind
