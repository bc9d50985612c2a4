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
    from_qa,
    get_text,
    relative_image_name,
    repr_short,
    resolve_image_path,
    to_qa,
)
from medley.datasets.readers import records_of, split_files

FILES = {
    "train": ("train.csv", "train_2.csv", "train2.csv"),
    "test": ("test_clean.csv", "test.csv", "test_2.csv", "test2.csv"),
}
LETTERS = ("A", "B", "C", "D")
_LABEL = re.compile(r"^\s*([A-D])\s*[:.)]\s*")
COLUMNS = (
    "Figure_path", "Question", "Answer", *(f"Choice {letter}" for letter in LETTERS), "Answer_label"
)  # fmt: skip


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    for split, path in split_files(config, FILES, "PMC-VQA"):
        yield from records_of(path, split)


def read(record: Any, config: ConversionConfig) -> Sample:
    """The choices follow the question, one per line; the answer is the letter of the right one."""
    remarks: list[str] = []
    choices = [_LABEL.sub("", get_text(record, f"Choice {x}", remarks)).strip() for x in LETTERS]
    letter = _answer_letter(record, choices)
    question = "\n".join([get_text(record, "Question", remarks).strip(), *_choice_lines(choices)])
    path = resolve_image_path(get_text(record, "Figure_path", remarks).strip(), config.image_folder)
    fields = {
        "source": "pmc_vqa", "task": "VQA", "answer_type": "CLOSED", "choices": choices,
    }  # fmt: skip
    fields |= extra_fields(record, *COLUMNS, "split")
    return Sample(from_qa(path, question, letter), fields, tuple(remarks))


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
