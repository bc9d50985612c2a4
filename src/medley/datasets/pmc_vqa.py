"""PMC-VQA (Zhang et al. 2023): multiple-choice questions with four choices, as CSV."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RawRecord,
    RecordError,
    Sample,
    extra_fields,
    get_text,
    relative_image_name,
    repr_short,
)
from medley.datasets.embedded_images import require_images
from medley.datasets.input_files import ROW_ID, split_files, table_records
from medley.datasets.pairs import from_qa, to_qa
from medley.datasets.readers import records_of

FILES = {
    "train": ("train.csv", "train_2.csv", "train2.csv"),
    "test": ("test_clean.csv", "test.csv", "test_2.csv", "test2.csv"),
}
LETTERS = ("A", "B", "C", "D")
_IMAGE_KEYS = ("Figure_path", "image")
_LABEL = re.compile(r"^\s*([A-D])\s*[:.)]\s*")
COLUMNS = (
    "Figure_path", "Question", "Answer", *(f"Choice {letter}" for letter in LETTERS), "Answer_label"
)  # fmt: skip


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    tables = table_records(config, FILES)
    if tables is not None:  # the copies on hubs
        yield from tables
        return
    for split, path in split_files(config, FILES, "PMC-VQA"):
        yield from records_of(path, split)


def read(record: Any, config: ConversionConfig) -> Sample:
    """The choices follow the question, one per line; the answer is the letter of the right one."""
    remarks: list[str] = []
    choices = [_LABEL.sub("", get_text(record, f"Choice {x}", remarks)).strip() for x in LETTERS]
    letter = _answer_letter(record, choices)
    question = "\n".join([get_text(record, "Question", remarks).strip(), *_choice_lines(choices)])
    if isinstance(record.get("Figure_path"), str):
        record = {**record, "Figure_path": record["Figure_path"].strip()}
    images = require_images(record, _IMAGE_KEYS, record.get("id"), config, remarks)
    fields = {
        "source": "pmc_vqa", "task": "VQA", "answer_type": "CLOSED", "choices": choices,
    }  # fmt: skip
    fields |= extra_fields(record, *COLUMNS, *_IMAGE_KEYS, "split", ROW_ID)
    document = from_qa(images, question, letter, record, _IMAGE_KEYS)
    return Sample(document, fields, tuple(remarks))


def _choice_lines(choices: Sequence[str]) -> list[str]:
    return [f"{letter}: {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]


def _answer_letter(record: dict[str, Any], choices: Sequence[str]) -> str:
    for key in ("Answer_label", "Answer"):
        if str(record.get(key, "")).strip() in LETTERS:
            return str(record[key]).strip()
    answer = _LABEL.sub("", str(record.get("Answer", ""))).strip()
    if answer not in choices:
        raise RecordError(f"The answer is not one of the choices (got {repr_short(answer)}).")
    return LETTERS[choices.index(answer)]


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    path, text, letter = to_qa(sample.document)
    choices = sample.fields.get("choices")
    if not isinstance(choices, list) or len(choices) != len(LETTERS) or letter not in LETTERS:
        raise RecordError(
            "The record is not a question with four 'choices' and a letter as its answer."
        )
    question = text.removesuffix("\n" + "\n".join(_choice_lines(choices)))
    if path is None or question == text:
        raise RecordError("The image is missing, or the choices do not follow the question.")
    cells = [f" {x}:{choice} " for x, choice in zip(LETTERS, choices, strict=True)]
    answer = choices[LETTERS.index(letter)]
    values = [relative_image_name(path, config.image_folder), question, answer, *cells, letter]
    return dict(zip(COLUMNS, values, strict=True))


def image_folder(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    names = ("images", "figures", "images_2")
    return next((folder / n for n in names if (folder / n).is_dir()), folder / names[0])


FORMAT = FormatSpec(
    records, read, write, "csv", columns=lambda config: COLUMNS,
    default_image_folder=image_folder, has_splits=True,
)  # fmt: skip
