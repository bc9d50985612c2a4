"""MedMax's records: documents with a `credential` field.

Records that require credentials are published without image and tokens. They are skipped and
listed, unless `--image_codes` supplies the image codes.
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
    get_value,
    repr_short,
    resolve_image_paths,
)
from medley.datasets.input_files import records_at
from medley.errors import UserError

CREDENTIAL = "credential"
_DOCUMENT_KEYS = ("text", "image_path", "image_tokens")


def read(record: Any, config: ConversionConfig) -> Sample:
    text = get_value(record, "text")
    if record.get(CREDENTIAL) not in (None, "yes", "no"):
        raise RecordError(
            f"{CREDENTIAL} is invalid (got {repr_short(record[CREDENTIAL])}, expected yes or no)."
        )
    row = {name: record[name] for name in _DOCUMENT_KEYS if record.get(name) not in (None, [], "")}
    lacks_images = (
        isinstance(text, str) and IMAGE in text and not {"image_path", "image_tokens"} & set(row)
    )
    if config.image_codes is not None and lacks_images:
        row["image_tokens"] = _open_codes(config.image_codes).get_all(
            get_value(record, config.id_key), text.count(IMAGE)
        )
    elif lacks_images and record.get(CREDENTIAL) == "yes":
        raise RestrictedRecord("The image requires credentials and is missing.")
    try:
        document = resolve_image_paths(Document.from_json(row), config.image_folder)
        return Sample(document, extra_fields(record, *_DOCUMENT_KEYS))
    except DocumentError as error:
        raise RecordError(str(error)) from error


class _ImageCodesById:
    """Image codes by id: the name of the image file without its folder and suffix."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._store = folder, ImageTokenStore(folder)
        self._paths: dict[str, str] = {}
        for path in self._store.paths():
            if self._paths.setdefault(Path(path).stem, path) != path:
                raise UserError(f"{folder}: Duplicate image name {Path(path).stem}.")

    def get_all(self, identifier: Any, count: int) -> list[list[int]]:
        """The codes of a record's images: `ID`, or `ID_0`, `ID_1`, ... for several images."""
        names = [str(identifier)] if count == 1 else [f"{identifier}_{i}" for i in range(count)]
        result = []
        for name in names:
            codes = self._store.get(self._paths[name]) if name in self._paths else None
            if codes is None:
                raise RecordError(f"{self.folder} contains no image codes for {name}.")
            result.append(codes.tolist())
        return result


@lru_cache(1)
def _open_codes(folder: Path) -> _ImageCodesById:
    return _ImageCodesById(folder)


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    row = documents.write(sample, config)
    if "text" not in row:
        raise RecordError(
            "MedMax's text format cannot represent this record: the text contains special tokens, "
            "or there is no assistant turn."
        )
    return {**row, CREDENTIAL: sample.fields.get(CREDENTIAL, "no")}


FORMAT = FormatSpec(lambda config: records_at(config.path), read, write, "jsonl")
