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
    RecordError,
    Sample,
    extra_fields,
    from_qa,
    get_text,
    get_value,
    repr_short,
    resolve_image_path,
)
from medley.datasets.embedded_images import save_embedded_image
from medley.datasets.readers import records_of, split_files
from medley.errors import UserError

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
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except Exception as error:  # an invalid pickle can raise any exception
        raise UserError(f"{path}: The file is not a pickle of plain values ({error}).") from error


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    is_parquet = config.path.suffix.lower() == ".parquet"
    if is_parquet or (config.path.is_dir() and not (config.path / "qas").is_dir()):
        files = [config.path] if is_parquet else sorted(config.path.glob("**/*.parquet"))
        prefix = {"val": "validation"}.get(config.split, config.split)
        for path in [p for p in files if config.split == "all" or p.name.startswith(prefix)]:
            split = path.name.partition("-")[0]
            for where, _, record in records_of(path):
                name = f"{path.stem}-{where.rpartition(' ')[2]}"  # the records have no id
                yield where, {"validation": "val"}.get(split, split), {**record, "id": name}
        if files:
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
    if isinstance(image, dict):
        path = save_embedded_image(image, str(get_value(record, "id")), config)
    elif isinstance(image, str):
        name = image if image.endswith(".jpg") else f"{image}.jpg"
        path = resolve_image_path(f"{record.get('split', '')}/{name}", config.image_folder)
    else:
        raise RecordError(f"'image' is not a name (got {repr_short(image)}).")
    closed = answer.lower() in ("yes", "no")  # the definition in the paper
    fields = {"source": "pathvqa", "task": "VQA", "answer_type": "CLOSED" if closed else "OPEN"}
    fields |= extra_fields(record, "question", "answer", "image", "split")
    return Sample(from_qa(path, question, answer), fields, tuple(remarks))


def image_folder(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "images"


FORMAT = FormatSpec(records, read, has_splits=True, default_image_folder=image_folder)
