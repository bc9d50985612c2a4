"""PMC-VQA (Zhang et al. 2023): questions with four choices each, as CSV."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    Found,
    RecordError,
    Sample,
    extra_fields,
    question_and_answer,
    relative_image_name,
    repr_short,
    resolve_image_path,
    text_of,
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


def records(choices: ConversionConfig) -> Iterator[Found]:
    for split, path in split_files(choices, FILES, "PMC-VQA"):
        yield from records_of(path, split)


def read(record: Any, choices: ConversionConfig) -> Sample:
    """The choices follow the question, a line each; the answer is the letter of the right one."""
    remarks: list[str] = []
    offered = [_LABEL.sub("", text_of(record, f"Choice {x}", remarks)).strip() for x in LETTERS]
    label = _label(record, offered)
    question = "\n".join(
        [text_of(record, "Question", remarks).strip()]
        + [f"{letter}: {text}" for letter, text in zip(LETTERS, offered, strict=True)]
    )
    path = resolve_image_path(text_of(record, "Figure_path", remarks).strip(), choices.image_folder)
    fields = {
        "source": "pmc_vqa", "task": "VQA", "answer_type": "CLOSED", "choices": offered,
    }  # fmt: skip
    fields |= extra_fields(record, *COLUMNS, "split")
    return Sample(question_and_answer(path, question, label), fields, tuple(remarks))


def _label(record: dict[str, Any], offered: Sequence[str]) -> str:
    for key in ("Answer_label", "Answer"):
        if str(record.get(key, "")).strip() in LETTERS:
            return str(record[key]).strip()
    answer = _LABEL.sub("", str(record.get("Answer", ""))).strip()
    if answer not in offered:
        raise RecordError(f"the answer {repr_short(answer)} is none of its choices")
    return LETTERS[offered.index(answer)]


def write(sample: Sample, choices: ConversionConfig) -> dict[str, Any]:
    path, asked, label = to_qa(sample.document)
    offered = sample.fields.get("choices")
    if not isinstance(offered, list) or len(offered) != len(LETTERS) or label not in LETTERS:
        raise RecordError("not a question with four 'choices' and a letter for its answer")
    lines = [f"{letter}: {text}" for letter, text in zip(LETTERS, offered, strict=True)]
    question = asked.removesuffix("\n" + "\n".join(lines))
    if path is None or question == asked:
        raise RecordError("no picture, or its choices do not follow its question")
    cells = [f" {letter}:{text} " for letter, text in zip(LETTERS, offered, strict=True)]
    answer = offered[LETTERS.index(label)]
    values = [relative_image_name(path, choices.image_folder), question, answer, *cells, label]
    return dict(zip(COLUMNS, values, strict=True))


def image_folder(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    names = ("images", "figures", "images_2")
    return next((folder / n for n in names if (folder / n).is_dir()), folder / names[0])


FORMAT = FormatSpec(
    records, read, write, "csv", columns=lambda choices: COLUMNS, images_in=image_folder,
    splits=True,
)  # fmt: skip
