"""Images of a record: paths, and images that are embedded as Parquet and Arrow files have them."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medley.data.document import ImagePart
from medley.datasets.base import (
    ConversionConfig,
    RecordError,
    get_value,
    repr_short,
    resolve_image_path,
)
from medley.errors import UserError
from medley.images.formats import ImageError, open_pillow
from medley.utils.temporary_files import disk_errors, temporary_path

_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tif", "WEBP": ".webp", "BMP": ".bmp",
             "GIF": ".gif", "MPO": ".jpg"}  # fmt: skip
_MAX_NAME = 180  # bytes; file systems allow 255, temporary names need some of them
_UNSAFE = re.compile(r"[/\\\0-\x1f\x7f#]|^\.|^-|[\ud800-\udfff]")
_RENAMED = "embedded images saved under a made-up name"


def read_images(
    value: Any, identifier: Any, config: ConversionConfig, remarks: list[str]
) -> list[ImagePart]:
    """The images of a record's field: a path, bytes, `{bytes, path}`, or a list of these.

    Embedded images are saved in the image folder, named after `identifier`, else after their own
    path, else after their content. Raises RecordError for an image that cannot be saved.
    """
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        return [_read_image(value, identifier, config, remarks)]
    names = [identifier] * len(value)
    if len(value) > 1 and identifier is not None:
        names = [f"{identifier}_{number}" for number in range(len(value))]
    return [_read_image(item, n, config, remarks) for item, n in zip(value, names, strict=True)]


def has_bytes(value: Any) -> bool:
    """Whether a JSON value contains bytes, which JSON cannot represent."""
    if isinstance(value, dict | list):
        return any(map(has_bytes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes)


def require_images(
    record: dict[str, Any],
    keys: Sequence[str],
    identifier: Any,
    config: ConversionConfig,
    remarks: list[str],
) -> list[ImagePart]:
    """The images of the first field that embeds some, else of the first one that is not empty.

    Raises RecordError for a record without an image.
    """
    present = [key for key in keys if key in record]
    if not present:
        get_value(record, keys[0])
    values = [record[key] for key in present]
    embedded = [value for value in values if isinstance(value, dict | bytes | list) and value]
    for value in (*embedded, *values):
        if images := read_images(value, identifier, config, remarks):
            return images
    raise RecordError(f"{present[0]!r} names no image (got {repr_short(values[0])}).")


def _read_image(
    value: Any, identifier: Any, config: ConversionConfig, remarks: list[str]
) -> ImagePart:
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        value = value["path"]  # written by `datasets` without decoding
    if isinstance(value, dict | bytes):
        return ImagePart(path=save_embedded_image(value, identifier, config, remarks))
    return ImagePart(path=resolve_image_path(value, config.image_folder))


def save_embedded_image(
    image: dict[str, Any] | bytes, identifier: Any, config: ConversionConfig, remarks: list[str]
) -> str:
    """Saves the bytes of an embedded image, unchanged, in the image folder. Returns the path.

    Raises RecordError for bytes that are not an image.
    """
    folder = config.image_folder
    if folder is None:
        raise UserError(
            "The images are embedded in the records. Name a folder for them with --image_folder."
        )
    data = image if isinstance(image, bytes) else image.get("bytes")
    if not isinstance(data, bytes) or not data:
        raise RecordError(f"The embedded image has no bytes (got {repr_short(image)}).")
    suffix = _detect_suffix(data)
    own_path = image.get("path") if isinstance(image, dict) else None
    digest = hashlib.sha256(data).hexdigest()[:16]
    name = digest
    if identifier is not None and not isinstance(identifier, dict | list | bytes | bool):
        name = _safe_name(str(identifier), remarks)
    elif isinstance(own_path, str) and own_path:
        name = _safe_name(Path(own_path.replace("\\", "/")).stem, remarks)
    path = folder / f"{name}{suffix}"
    if path.exists() and not _contains(path, data):
        path = folder / f"{name}-{digest}{suffix}"  # another image has this name
        remarks.append(_RENAMED)
    if not path.exists():
        # Without a sync, which takes most of the time: the images can be written again.
        with disk_errors(path), temporary_path(path) as temporary:
            temporary.write_bytes(data)
            temporary.replace(path)
    return str(path)


def _contains(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _safe_name(name: str, remarks: list[str]) -> str:
    """The name, or one of its safe characters and its hash if it is no good name for a file."""
    normalized = unicodedata.normalize("NFC", name)
    is_safe = normalized.strip() == normalized and not _UNSAFE.search(normalized)
    if is_safe and 0 < len(normalized.encode()) <= _MAX_NAME:
        return normalized
    remarks.append(_RENAMED)
    encoded = name.encode("utf-8", "surrogatepass")
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:60].strip("._-")
    return f"{readable or 'image'}-{hashlib.sha256(encoded).hexdigest()[:12]}"


def _detect_suffix(data: bytes) -> str:
    if data[128:132] == b"DICM":
        return ".dcm"
    try:
        with open_pillow(io.BytesIO(data), "embedded image") as opened:
            return _SUFFIXES.get(opened.format or "", f".{(opened.format or 'img').lower()}")
    except ImageError as error:
        raise RecordError(str(error)) from error
    except Exception as error:  # decoders raise arbitrary exceptions for broken headers
        reason = " ".join(str(error).split())
        raise RecordError(f"The embedded image cannot be read ({reason}).") from error
