"""MedTrinity-25M: a picture and its caption, as a folder with metadata, as Parquet, or as the
`datasets` library keeps it on disk."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    Found,
    RecordError,
    Sample,
    extra_fields,
    from_caption,
    relative_image_name,
    repr_short,
    resolve_image_path,
    text_of,
    to_caption,
)
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.utils.files import atomic_file, read_json

METADATA = "metadata.jsonl"
_STATE, _DICT = "state.json", "dataset_dict.json"  # of datasets.save_to_disk
_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tif", "WEBP": ".webp", "BMP": ".bmp"}


def records(choices: ConversionConfig) -> Iterator[Found]:
    for file in _files(choices.path):
        yield from records_of(file)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / _DICT).is_file():
        names = read_json(path / _DICT).get("splits", [])
        return [file for name in names for file in _files(Path(resolve_image_path(name, path)))]
    if (path / _STATE).is_file():
        try:
            listed = [entry["filename"] for entry in read_json(path / _STATE)["_data_files"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path / _STATE}: lists no data files") from error
        return [Path(resolve_image_path(name, path)) for name in listed]
    found = [path / METADATA] if (path / METADATA).is_file() else []
    found = found or sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    if not found:
        raise UserError(f"{path}: neither {METADATA} nor {_STATE} nor Parquet files in it")
    return found


def read(record: Any, choices: ConversionConfig) -> Sample:
    remarks: list[str] = []
    caption = text_of(record, "caption", remarks)
    if isinstance(record.get("image"), dict):
        path = kept_picture(record["image"], record.get("id"), choices)
    else:
        name = record.get("file_name", record.get("image"))
        path = resolve_image_path(name, choices.image_folder)
    fields = {"source": "medtrinity", "task": "Image Captioning"}
    fields |= extra_fields(record, "caption", "image", "file_name")
    return Sample(from_caption(path, caption, choices), fields, tuple(remarks))


def kept_picture(image: dict[str, Any], identifier: Any, choices: ConversionConfig) -> str:
    """Writes a picture that is embedded in a record to the picture folder, as it is, under the
    record's id; gives its path. Raises RecordError for an id that is no safe file name."""
    folder = choices.image_folder
    if folder is None:
        raise UserError("the pictures stand inside of the records: name a folder by --image_folder")
    identifier = str(identifier) if isinstance(identifier, int) else identifier
    is_name = isinstance(identifier, str) and _SAFE.fullmatch(identifier)
    if not is_name or identifier.startswith("."):
        raise RecordError(f"its id is {repr_short(identifier)}: no name for a picture's file")
    data = image.get("bytes")
    if not isinstance(data, bytes):
        raise RecordError("its picture holds no bytes")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            suffix = _SUFFIXES.get(opened.format or "", ".img")
    except (OSError, Image.DecompressionBombError) as error:
        raise RecordError(f"its picture is in no format that is known ({error})") from error
    path = folder / f"{identifier}{suffix}"
    if path.is_file():
        if path.read_bytes() != data:
            raise RecordError(f"{path} is there already and holds another picture")
    else:
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    return str(path)


def write(sample: Sample, choices: ConversionConfig) -> dict[str, Any]:
    path, caption = to_caption(sample.document, choices)
    name = relative_image_name(path, choices.image_folder)
    return {
        "file_name": name,
        "caption": caption,
        **extra_fields(sample.fields, "file_name", "caption"),
    }


FORMAT = FormatSpec(
    records, read, write, "jsonl",
    images_in=lambda path: path if path.is_dir() else path.parent,
)  # fmt: skip
