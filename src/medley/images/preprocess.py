"""Any image file -> RGB -> the square of pixels that the VQGAN reads.

The steps are Chameleon's: transparency is blended on white, the short side is resized with LANCZOS,
the center is cropped, and pixels become x / 255 * 2 - 1. Images of more than 8 bits are windowed,
whereas Chameleon saturates them to white. DICOM images are windowed by their header (`medical`),
others from their smallest to their largest value.

In a file with several frames (DICOM, NIfTI, TIFF), one frame must be selected: `scan.dcm#12` is
frame 12, counted from 0. Of an animation (GIF, WebP, APNG), the first image is read.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from medley.errors import UserError
from medley.images import medical

Fit = Literal["crop", "pad"]
Frame = int | Literal["first", "middle"]
PREPROCESSING_VERSION = "1"  # part of the token-space fingerprint, because pixels determine codes
MAX_ASPECT_RATIO = 200  # of an image to crop; a higher ratio would need too much memory
_HIGH_DEPTH_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_NAME_WITH_FRAME = re.compile(r"(.+)#(\d+)")
# x / 255 * 2 - 1 for every x, computed in double precision: float32 differs in the last bit.
_UINT8_TO_PIXEL = torch.from_numpy((np.arange(256) / 255.0 * 2.0 - 1.0).astype(np.float32))


class ImageError(UserError):
    """An image that cannot be read; the message names the file and the reason."""


def open_image(
    path: str | Path, frame: Frame | None = None, exif_orientation: bool = False
) -> Image.Image:
    """Reads an image file as RGB.

    Args:
        path: file, or `FILE#12` for frame 12
        frame: frame of a file that has several
        exif_orientation: rotate a photograph as its EXIF tag specifies (Chameleon does not)

    Raises ImageError for a missing, broken or too large file.
    """
    name = str(path)
    match = _NAME_WITH_FRAME.fullmatch(name)
    try:
        if match and not Path(name).exists():
            name, frame = match[1], int(match[2])
        with open(name, "rb") as data:
            return read_image(data, name, frame, exif_orientation)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: Image not found.") from error
    except OSError as error:
        raise ImageError(f"{path}: Cannot open the image ({error.strerror}).") from error
    except ImageError:
        raise
    except ValueError as error:  # a NUL character in the name
        raise ImageError(f"{str(path)!r}: Cannot open the image ({error}).") from error


def read_image(
    data: BinaryIO, name: str, frame: Frame | None = None, exif_orientation: bool = False
) -> Image.Image:
    """Reads an image from an open file. `name` determines its format and is used in errors."""
    try:
        kind = medical.detect_format(data, name)
        if kind is not None:
            frames = medical.count_frames(data, kind)
            return medical.read_frame(data, kind, _frame_number(frame, frames, name), name)
        with Image.open(data) as image:
            image.seek(_frame_number(frame, _count_tiff_pages(image), name))
            image.load()
            return to_rgb(ImageOps.exif_transpose(image) if exif_orientation else image)
    except ImageError:
        raise
    except UserError as error:
        raise ImageError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: Not an image in a supported format.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise arbitrary exceptions for broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: Broken image ({reason}).") from error


def count_frames(data: BinaryIO, name: str) -> int:
    """Number of frames in an image file; 1 for an animation, of which the first image is read."""
    kind = medical.detect_format(data, name)
    if kind is not None:
        return medical.count_frames(data, kind)
    with Image.open(data) as image:
        return _count_tiff_pages(image)


def _count_tiff_pages(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1)) if image.format == "TIFF" else 1


def _frame_number(frame: Frame | None, frames: int, name: str) -> int:
    """The number of the selected frame. Raises ImageError if none of several is selected."""
    if frame is None:
        if frames > 1:
            raise ImageError(
                f"{name}: The file has {frames} frames. Select with --frames first|middle|all, or "
                f"by name: {name}#0 to {name}#{frames - 1}."
            )
        return 0
    number = {"first": 0, "middle": frames // 2}.get(str(frame))
    if number is None:
        number = int(frame)
    if not 0 <= number < frames:
        raise ImageError(f"{name}: Frame {number} does not exist (expected 0 to {frames - 1}).")
    return number


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode -> RGB, transparency on white, high bit depths windowed."""
    if image.mode == "RGB":
        return image
    if image.mode in _HIGH_DEPTH_MODES:
        return Image.fromarray(medical.rescale_to_uint8(np.asarray(image))).convert("RGB")
    rgba = np.asarray(image.convert("RGBA"))
    if (rgba[..., 3] == 255).all():
        return image.convert("RGB")
    alpha = rgba[..., 3:] / 255.0
    blended = (1 - alpha) * 255 + alpha * rgba[..., :3]
    return Image.fromarray(blended.astype(np.uint8))  # truncated, not rounded, as in Chameleon


def resize_square(image: Image.Image, size: int, fit: Fit = "crop") -> Image.Image:
    """An RGB image -> `size` x `size`: its center (`crop`), or all of it on black (`pad`)."""
    side = min(image.size) if fit == "crop" else max(image.size)
    width, height = (max(1, round(size / side * length)) for length in image.size)
    if fit == "crop" and max(width, height) > MAX_ASPECT_RATIO * size:
        raise ImageError(
            f"The aspect ratio of an image is too high for --fit crop (got {image.width} x "
            f"{image.height}, expected at most {MAX_ASPECT_RATIO} to 1). Use --fit pad."
        )
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def to_uint8_square(image: Image.Image, size: int, fit: Fit = "crop") -> Tensor:
    """An image of any mode -> uint8 (size, size, 3), a quarter of the memory of its pixels."""
    return torch.from_numpy(np.array(resize_square(to_rgb(image), size, fit)))


def uint8_to_pixels(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], in channels-last memory format."""
    return _UINT8_TO_PIXEL.to(images.device)[images.int()].permute(0, 3, 1, 2)


def to_pixels(image: Image.Image, size: int, fit: Fit = "crop") -> Tensor:
    """An image of any mode -> float32 (3, size, size) in [-1, 1]."""
    return uint8_to_pixels(to_uint8_square(image, size, fit)[None])[0].contiguous()


def to_pil(pixels: Tensor) -> Image.Image:
    """Float (3, H, W), about [-1, 1] -> image; clamped and truncated, as in Chameleon."""
    unit = (pixels.detach().float().cpu().clamp(-1, 1) + 1) / 2
    array = (unit.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return Image.fromarray(array)


def content_hash(image: Image.Image) -> str:
    """SHA-256 of an RGB image's size and bytes, which identifies it under any file name."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()
