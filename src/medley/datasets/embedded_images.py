"""Images that are embedded in records, as Parquet and Arrow files have them."""

from __future__ import annotations

import io
import re
from typing import Any

from PIL import Image

from medley.datasets.base import ConversionConfig, RecordError, repr_short
from medley.errors import UserError
from medley.utils.files import atomic_file

_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tif", "WEBP": ".webp", "BMP": ".bmp"}


def save_embedded_image(image: dict[str, Any], identifier: Any, config: ConversionConfig) -> str:
    """Saves the bytes of an embedded image, unchanged, in the image folder. Returns the path.

    The file is named after the record's id. Raises RecordError for an id that is not a safe file
    name, and for bytes that are not an image.
    """
    folder = config.image_folder
    if folder is None:
        raise UserError(
            "The images are embedded in the records. Name a folder for them with --image_folder."
        )
    identifier = str(identifier) if isinstance(identifier, int) else identifier
    is_safe = isinstance(identifier, str) and _SAFE_NAME.fullmatch(identifier)
    if not is_safe or identifier.startswith("."):
        raise RecordError(f"The id is not a valid file name (got {repr_short(identifier)}).")
    data = image.get("bytes")
    if not isinstance(data, bytes):
        raise RecordError("The embedded image has no bytes.")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            suffix = _SUFFIXES.get(opened.format or "", ".img")
    except (OSError, Image.DecompressionBombError) as error:
        raise RecordError(f"The format of the embedded image is unsupported ({error}).") from error
    path = folder / f"{identifier}{suffix}"
    if path.is_file():
        if path.read_bytes() != data:
            raise RecordError(f"{path} exists already and contains another image.")
    else:
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    return str(path)
