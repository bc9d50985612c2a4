"""PathVQA (He et al. 2020): pickled lists of questions beside a folder of pictures, or Parquet with
the pictures inside. Only read: nobody should be given a pickle."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    Found,
    RecordError,
    Sample,
    extra_fields,
    question_and_answer,
    repr_short,
    resolve_image_path,
    text_of,
    value_of,
)
from medley.datasets.medtrinity import kept_picture
from medley.datasets.readers import records_of, split_files
from medley.errors import UserError

FILES = {
    split: (f"qas/{split}/{split}_qa.pkl", f"qas/{split}_qa.pkl", f"{split}_qa.pkl")
    for split in ("train", "val", "test")
}
_LARGEST = 1 << 28  # bytes of a pickle: it is read whole


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dictionaries, texts and numbers only: nothing that a pickle could have called."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it would call {module}.{name}")


def read_pickle(path: Path) -> Any:
    """What a pickle of plain values holds. Raises UserError for one that asks for more."""
    if path.stat().st_size > _LARGEST:
        raise UserError(f"{path}: {path.stat().st_size} bytes, the limit is {_LARGEST}")
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        raise UserError(f"{path}: not a pickle of plain values ({error})") from error


def records(choices: ConversionConfig) -> Iterator[Found]:
    alone = choices.path.suffix.lower() == ".parquet"
    if alone or (choices.path.is_dir() and not (choices.path / "qas").is_dir()):
        parquet = [choices.path] if alone else sorted(choices.path.glob("**/*.parquet"))
        wanted = {"val": "validation"}.get(choices.split, choices.split)
        for path in [p for p in parquet if choices.split == "all" or p.name.startswith(wanted)]:
            split = path.name.partition("-")[0]
            for place, _, record in records_of(path):
                name = f"{path.stem}-{place.rpartition(' ')[2]}"  # these records have no id
                yield place, {"validation": "val"}.get(split, split), {**record, "id": name}
        if parquet:
            return
    for split, path in split_files(choices, FILES, "PathVQA"):
        found = read_pickle(path)
        if not isinstance(found, list):
            raise UserError(f"{path}: holds {repr_short(found)}, expected a list of questions")
        for number, record in enumerate(found):
            if isinstance(record, dict) and isinstance(record.get("image"), str):
                record = {"id": f"{split}_{number}", **record, "split": split}
            yield f"{path}: record {number}", split, record


def read(record: Any, choices: ConversionConfig) -> Sample:
    remarks: list[str] = []
    question = text_of(record, "question", remarks).strip()
    answer = text_of(record, "answer", remarks).strip()
    image = value_of(record, "image")
    if isinstance(image, dict):
        path = kept_picture(image, str(value_of(record, "id")), choices)
    elif isinstance(image, str):
        name = image if image.endswith(".jpg") else f"{image}.jpg"
        path = resolve_image_path(f"{record.get('split', '')}/{name}", choices.image_folder)
    else:
        raise RecordError(f"'image' is {repr_short(image)}, expected a name")
    closed = answer.lower() in ("yes", "no")  # the paper's own division
    fields = {"source": "pathvqa", "task": "VQA", "answer_type": "CLOSED" if closed else "OPEN"}
    fields |= extra_fields(record, "question", "answer", "image", "split")
    return Sample(question_and_answer(path, question, answer), fields, tuple(remarks))


def image_folder(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "images"


FORMAT = FormatSpec(records, read, splits=True, images_in=image_folder)
