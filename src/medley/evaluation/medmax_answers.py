"""A model's answers to MedMax's suite: generated, saved with their images, and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medley.data.document import Document, ImagePart, Turn
from medley.errors import UserError
from medley.evaluation.medmax_scores import GeneratedAnswer
from medley.evaluation.medmax_suite import MedmaxRecord, Processor, prompt_for
from medley.generation import GenerationOptions
from medley.inference.batch import generate_all, read_existing, save_images
from medley.inference.model import Model
from medley.inference.response import Response
from medley.utils.jsonl import append_jsonl

ANSWERS_FILE, IMAGES_FOLDER = "answers.jsonl", "images"
_DEPRECATED_FOLDER = "pictures"  # alias


def read_answers(folder: Path) -> dict[int, GeneratedAnswer]:
    """The answers of an earlier run by record number. Raises UserError for an invalid row."""
    path = folder / ANSWERS_FILE
    return dict(_parse_row(folder, row) for row in read_existing(path, "row"))


def _parse_row(folder: Path, row: dict[str, Any]) -> tuple[int, GeneratedAnswer]:
    key = _DEPRECATED_FOLDER if _DEPRECATED_FOLDER in row else IMAGES_FOLDER
    try:
        images = tuple(str(folder / key / name) for name in row[key])
        return int(row["row"]), GeneratedAnswer(str(row["text"]), images)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / ANSWERS_FILE}: Invalid row ({error}).") from error


def generate_answers(
    model: Model,
    records: Sequence[MedmaxRecord],
    folder: Path,
    processor: Processor,
    options_of: Callable[[MedmaxRecord], GenerationOptions],
    batch_size: int,
) -> Iterator[tuple[int, GeneratedAnswer]]:
    """Yields (record number, answer) on completion; answers without an error are saved first."""
    by_number = {record.number: record for record in records}
    requests = (
        (record.number, make_prompt(processor, record), options_of(record)) for record in records
    )
    raw_prompt = processor != "sft"
    for number, response in generate_all(model, requests, raw_prompt, batch_size):
        yield number, save_answer(folder, by_number[number], response)


def make_prompt(processor: Processor, record: MedmaxRecord) -> Document:
    path = record.prompt_image
    image_part = None if path is None else ImagePart(path=path)
    return Document((Turn("user", tuple(prompt_for(processor, record, image_part))),))


def save_answer(folder: Path, record: MedmaxRecord, response: Response | str) -> GeneratedAnswer:
    """Saves a response's images and its row of answers.jsonl; an error is not saved."""
    if isinstance(response, str):
        return GeneratedAnswer("", error=response)
    paths = save_images(folder / IMAGES_FOLDER, f"{record.number:06d}", response)
    texts = [part.strip() for part in response.parts if isinstance(part, str)]
    text = " ".join(text for text in texts if text)
    append_jsonl(
        folder / ANSWERS_FILE,
        {"row": record.number, "task": record.name, "text": text,
         "images": [path.name for path in paths]},
    )  # fmt: skip
    return GeneratedAnswer(text, tuple(map(str, paths)))
