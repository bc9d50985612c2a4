"""MedMax's rows: a documents line with `credential`.

Rows that need credentials come without picture and tokens; they are left out, and listed, until
their pictures are there as image codes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from medley.data.document import Document, DocumentError
from medley.data.image_token_store import ImageTokenStore
from medley.data.vocabulary import IMAGE
from medley.datasets import documents
from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RecordError,
    RestrictedRecord,
    Sample,
    extra_fields,
    repr_short,
    resolve_image_paths,
    value_of,
)
from medley.datasets.readers import records_of
from medley.errors import UserError

CREDENTIAL = "credential"
_OWN = ("text", "image_path", "image_tokens")


def read(record: Any, choices: ConversionConfig) -> Sample:
    text = value_of(record, "text")
    if record.get(CREDENTIAL) not in (None, "yes", "no"):
        raise RecordError(f"{CREDENTIAL} is {repr_short(record[CREDENTIAL])}, expected yes or no")
    row = {name: record[name] for name in _OWN if record.get(name) not in (None, [], "")}
    lacks = (
        isinstance(text, str) and IMAGE in text and not {"image_path", "image_tokens"} & set(row)
    )
    if choices.image_codes is not None and lacks:
        row["image_tokens"] = codes_by_id(choices.image_codes).get_all(
            value_of(record, choices.id_key), text.count(IMAGE)
        )
    elif lacks and record.get(CREDENTIAL) == "yes":
        raise RestrictedRecord("needs credentials, and its picture is not there")
    try:
        document = resolve_image_paths(Document.from_json(row), choices.image_folder)
        return Sample(document, extra_fields(record, *_OWN))
    except DocumentError as error:
        raise RecordError(str(error)) from error


class _ById:
    """Image codes by the name of their picture without folder and suffix."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._shards = folder, ImageTokenStore(folder)
        self._paths: dict[str, str] = {}
        for path in self._shards.paths():
            if self._paths.setdefault(Path(path).stem, path) != path:
                raise UserError(f"{folder}: two pictures are called {Path(path).stem}")

    def get_all(self, identifier: Any, count: int) -> list[list[int]]:
        """The codes of a record's pictures: `ID`, or `ID_0`, `ID_1` where it has several."""
        names = [str(identifier)] if count == 1 else [f"{identifier}_{i}" for i in range(count)]
        found = []
        for name in names:
            codes = self._shards.get(self._paths[name]) if name in self._paths else None
            if codes is None:
                raise RecordError(f"{self.folder} has no codes of a picture called {name}")
            found.append(codes.tolist())
        return found


@lru_cache(1)
def codes_by_id(folder: Path) -> _ById:
    return _ById(folder)


def write(sample: Sample, choices: ConversionConfig) -> dict[str, Any]:
    row = documents.write(sample, choices)
    if "text" not in row:
        raise RecordError("its words hold marks, or nobody answers: MedMax's text cannot say so")
    return {**row, CREDENTIAL: sample.fields.get(CREDENTIAL, "no")}


FORMAT = FormatSpec(lambda choices: records_of(choices.path), read, write, "jsonl")
