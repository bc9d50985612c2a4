"""PathVQA (He et al. 2020): pickled lists of questions and an image folder, or Parquet with images.

The format is read-only, because pickle files are unsafe to distribute.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from medley.datasets.base import (
    SPLITS,
    ConversionConfig,
    FormatSpec,
    RawRecord,
    Sample,
    extra_fields,
    get_text,
    get_value,
    repr_short,
)
from medley.datasets.embedded_images import require_images
from medley.datasets.input_files import ROW_ID, split_files, table_records
from medley.datasets.pairs import from_qa
from medley.errors import UserError
from medley.utils.files import refuse_lfs_pointer

FILES = {
    split: (f"qas/{split}/{split}_qa.pkl", f"qas/{split}_qa.pkl", f"{split}_qa.pkl")
    for split in SPLITS
}
_MAX_PICKLE = 1 << 28  # bytes; a pickle is read into memory


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, texts and numbers; refuses everything that would call code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it would call {module}.{name}")


def read_pickle(path: Path) -> Any:
    """The content of a pickle of plain values. Raises UserError for any other pickle."""
    if path.stat().st_size > _MAX_PICKLE:
        raise UserError(
            f"{path}: The file is too large (got {path.stat().st_size} bytes, limit {_MAX_PICKLE})."
        )
    refuse_lfs_pointer(path)
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except Exception as error:  # an invalid pickle can raise any exception
        raise UserError(f"{path}: The file is not a pickle of plain values ({error}).") from error


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    tables = table_records(config, FILES)
    if tables is not None:  # the copies on hubs
        yield from tables
        return
    for split, path in split_files(config, FILES, "PathVQA"):
        questions = read_pickle(path)
        if not isinstance(questions, list):
            raise UserError(
                f"{path}: The pickle is not a list of questions (got {repr_short(questions)})."
            )
        for number, record in enumerate(questions):
            if isinstance(record, dict) and isinstance(record.get("image"), str):
                record = {"id": f"{split}_{number}", **record, "split": split}
            yield f"{path}: record {number}", split, record


def read(record: Any, config: ConversionConfig) -> Sample:
    remarks: list[str] = []
    question = get_text(record, "question", remarks).strip()
    answer = get_text(record, "answer", remarks).strip()
    image = get_value(record, "image")
    if isinstance(image, str):
        name = image if ROW_ID in record or image.endswith(".jpg") else f"{image}.jpg"
        image = f"{record.get('split', '')}/{name}" if ROW_ID not in record else name
    images = require_images({"image": image}, ["image"], record.get("id"), config, remarks)
    closed = answer.lower() in ("yes", "no")  # the definition in the paper
    fields = {"source": "pathvqa", "task": "VQA", "answer_type": "CLOSED" if closed else "OPEN"}
    fields |= extra_fields(record, "question", "answer", "image", "split", ROW_ID)
    document = from_qa(images, question, answer, record, ["image"])
    return Sample(document, fields, tuple(remarks))


def image_folder(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "images"


FORMAT = FormatSpec(records, read, has_splits=True, default_image_folder=image_folder)
