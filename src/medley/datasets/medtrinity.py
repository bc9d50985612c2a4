"""MedTrinity-25M: images with captions, as a metadata folder, Parquet, or `datasets` on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RawRecord,
    Sample,
    extra_fields,
    get_text,
    relative_image_name,
    resolve_image_path,
)
from medley.datasets.embedded_images import require_images
from medley.datasets.input_files import table_files
from medley.datasets.pairs import from_caption, to_caption
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.utils.files import read_json

_IMAGE_KEYS = ("file_name", "image")
METADATA = "metadata.jsonl"
_STATE, _DICT = "state.json", "dataset_dict.json"  # written by datasets.save_to_disk


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    for file in _find_files(config.path):
        yield from records_of(file)


def _find_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / _DICT).is_file():
        names = read_json(path / _DICT).get("splits", [])
        return [
            file for name in names for file in _find_files(Path(resolve_image_path(name, path)))
        ]
    if (path / _STATE).is_file():
        try:
            names = [entry["filename"] for entry in read_json(path / _STATE)["_data_files"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path / _STATE}: The list of data files is missing.") from error
        return [Path(resolve_image_path(name, path)) for name in names]
    files = [path / METADATA] if (path / METADATA).is_file() else []
    files = files or table_files(path)
    if not files:
        raise UserError(
            f"{path}: The folder contains no {METADATA}, {_STATE}, Parquet or Arrow files."
        )
    return files


def read(record: Any, config: ConversionConfig) -> Sample:
    remarks: list[str] = []
    caption = get_text(record, "caption", remarks)
    images = require_images(record, _IMAGE_KEYS, record.get("id"), config, remarks)
    fields = {"source": "medtrinity", "task": "Image Captioning"}
    fields |= extra_fields(record, "caption", "image", "file_name")
    document = from_caption(images, caption, config, record, _IMAGE_KEYS)
    return Sample(document, fields, tuple(remarks))


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    path, caption = to_caption(sample.document, config)
    record = {"file_name": relative_image_name(path, config.image_folder), "caption": caption}
    return {**record, **extra_fields(sample.fields, *record)}


FORMAT = FormatSpec(
    records, read, write, "jsonl",
    default_image_folder=lambda path: path if path.is_dir() else path.parent,
)  # fmt: skip
