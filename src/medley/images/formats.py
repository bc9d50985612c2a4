"""The formats and sizes of images that are opened: one list for the whole project.

Every image goes through `open_pillow`, whatever its name is. A format that is not in
`ALLOWED_FORMATS` is refused, above all EPS, for which Pillow starts Ghostscript. This module
imports no torch.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image, UnidentifiedImageError

from medley.errors import UserError

Frames = Literal["first", "middle", "all"]  # to read of a file with several
# Formats that Pillow decodes itself. Not included are formats that start another program (EPS,
# WMF), that open a second image of any format (IPTC), or that Pillow only identifies (HDF5, ...).
ALLOWED_FORMATS = (
    "AVIF", "BMP", "DCX", "DDS", "DIB", "FITS", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000",
    "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA",
    "TIFF", "WEBP", "XBM", "XPM",
)  # fmt: skip
MEDICAL_SUFFIXES = (".dcm", ".dicom", ".ima", ".nii", ".nii.gz")
MAX_PIXELS = 178_956_970  # of one image or frame, the limit of Pillow itself
MAX_FRAMES = 1 << 16  # of one file
MAX_DECODED_BYTES = 4 << 30  # of a volume, and of a deflated DICOM file

_CONVERT = "Convert it to PNG."
_PROGRAM = f"is not opened, because reading it starts another program. {_CONVERT}"
_REFUSED = (  # offset, first bytes, explanation
    (0, b"%!PS", f"EPS {_PROGRAM}"),
    (0, b"\xc5\xd0\xd3\xc6", f"EPS {_PROGRAM}"),
    (0, b"\xd7\xcd\xc6\x9a", f"WMF {_PROGRAM}"),
    (40, b" EMF", f"EMF {_PROGRAM}"),
    (0, b"%PDF", "PDF is not an image. Convert its page to PNG."),
    (4, b"ftyphei", f"HEIC is not supported. {_CONVERT}"),
    (4, b"ftyphev", f"HEIC is not supported. {_CONVERT}"),
    (4, b"ftypmif1", f"HEIC is not supported. {_CONVERT}"),
    (0, b"version https://git-lfs", "The file is a Git LFS pointer. Run `git lfs pull`."),
    (0, b"\x1f\x8b", "A gzip file. Decompress it."),
    (0, b"PK\x03\x04", "A zip archive. Extract it."),
)
_PAGES = ((b"<svg", f"SVG is not supported. {_CONVERT}"), (b"<html", "A web page, not an image."))
_UNKNOWN = "Unsupported image format (expected PNG, JPEG, TIFF or another of docs/formats.md)."
_HEAD = 1024  # bytes that identify a refused format


class ImageError(UserError):
    """An image that cannot be read; the message names the file and the reason."""


def open_pillow(data: BinaryIO | str | Path, name: str) -> Image.Image:
    """Opens an image in one of `ALLOWED_FORMATS` and reads its header, for a `with` statement.

    Raises ImageError, which starts with `name`, for another format and for too many pixels, and
    Pillow's errors for a broken header.
    """
    try:
        image = Image.open(data, formats=ALLOWED_FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: {_explain_format(data)}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}") from error
    try:
        check_pixels(image.width, image.height)
    except UserError as error:
        image.close()
        raise ImageError(f"{name}: {error}") from error
    return image


def check_pixels(width: int, height: int) -> None:
    """Raises UserError for an image of more than `MAX_PIXELS`; called before it is decoded."""
    if width * height > MAX_PIXELS:
        raise UserError(
            f"The image has too many pixels (got {width} x {height} = {width * height}, limit "
            f"{MAX_PIXELS}). Save it smaller."
        )


def check_frames(frames: int) -> int:
    """Raises UserError for a file of more than `MAX_FRAMES` frames; returns their number."""
    if frames > MAX_FRAMES:
        raise UserError(
            f"The file has too many frames (got {frames}, limit {MAX_FRAMES}). Split it."
        )
    return frames


def _explain_format(data: BinaryIO | str | Path) -> str:
    """Why a file that Pillow did not identify is refused."""
    if isinstance(data, str | Path):
        with open(data, "rb") as file:
            head = file.read(_HEAD)
    else:
        data.seek(0)
        head = data.read(_HEAD)
    if not head:
        return "The file is empty."
    for offset, magic, explanation in _REFUSED:
        if head[offset:].startswith(magic):
            return explanation
    if head.lstrip().startswith(b"<"):
        for tag, explanation in _PAGES:
            if tag in head.lower():
                return explanation
    return _UNKNOWN


@cache
def suffixes() -> tuple[str, ...]:
    """The suffixes of all files that can be read, in lower case: Pillow's and the medical ones."""
    readable = {s for s, name in Image.registered_extensions().items() if name in ALLOWED_FORMATS}
    return (*sorted(readable), *MEDICAL_SUFFIXES)


def has_image_suffix(name: str) -> bool:
    return name.lower().endswith(suffixes())
