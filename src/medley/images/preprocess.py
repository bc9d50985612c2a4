"""Any image file -> RGB -> the square of pixels that the VQGAN reads.

The steps are Chameleon's: transparency is blended on white, the short side is resized with LANCZOS,
the center is cropped, and pixels become x / 255 * 2 - 1. Images of more than 8 bits are windowed,
whereas Chameleon saturates them to white. DICOM images are windowed by their header (`medical`),
others from their smallest to their largest value.

In a file with several frames (DICOM, NIfTI, TIFF), one frame must be selected: `scan.dcm#12` is
frame 12, counted from 0. Of an animation (GIF, WebP, APNG), the first image is read.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from medley.errors import UserError
from medley.images import medical
from medley.images.formats import ALLOWED_FORMATS as ALLOWED_FORMATS
from medley.images.formats import ImageError as ImageError
from medley.images.formats import check_frames, check_pixels, open_pillow
from medley.utils.image_names import image_name_hint, is_data_url
from medley.utils.unicode_names import existing_name

Fit = Literal["crop", "pad"]
Frame = int | Literal["first", "middle"]
PREPROCESSING_VERSION = "1"  # part of the token-space fingerprint, because pixels determine codes
MAX_ASPECT_RATIO = 200  # of an image to crop; a higher ratio would need too much memory
_HIGH_DEPTH_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_ORIENTATION = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # Pillow's names
_NAME_WITH_FRAME = re.compile(r"(.+)#(\d+)")
# x / 255 * 2 - 1 for every x, computed in double precision: float32 differs in the last bit.
_UINT8_TO_PIXEL = torch.from_numpy((np.arange(256) / 255.0 * 2.0 - 1.0).astype(np.float32))


@dataclass(frozen=True)
class Preprocessing:
    """How images become squares. It belongs to a checkpoint; the defaults are Chameleon's.

    Attributes:
        fit: crop the image to its center, or pad it
        exif_orientation: rotate a photograph as its EXIF tag specifies
    """

    fit: Fit = "crop"
    exif_orientation: bool = False

    def describe(self) -> dict[str, str | bool]:
        """The fields of a manifest and of `vqgan.yaml`."""
        return {"fit": self.fit, "exif_orientation": self.exif_orientation}


CHAMELEON_PREPROCESSING = Preprocessing()


def open_image(
    path: str | Path, frame: Frame | None = None, exif_orientation: bool = False
) -> Image.Image:
    """Reads an image file as RGB.

    Args:
        path: file, `FILE#12` for frame 12, or a data URL
        frame: frame of a file that has several
        exif_orientation: rotate a photograph as its EXIF tag specifies (Chameleon does not)

    Raises ImageError for a missing, broken or too large file.
    """
    name = str(path)
    if is_data_url(name):
        return read_image(io.BytesIO(decode_data_url(name)), "data URL", frame, exif_orientation)
    try:
        name = existing_name(name)
        match = _NAME_WITH_FRAME.fullmatch(name)
        if match and not Path(name).exists():
            name, frame = existing_name(match[1]), int(match[2])
        with open(name, "rb") as data:
            return read_image(data, name, frame, exif_orientation)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: Image not found.{image_name_hint(name)}") from error
    except OSError as error:
        raise ImageError(f"{path}: Cannot open the image ({error.strerror}).") from error
    except ImageError:
        raise
    except ValueError as error:  # a NUL character in the name
        raise ImageError(f"{str(path)!r}: Cannot open the image ({error}).") from error


def decode_data_url(url: str) -> bytes:
    """The content of a data URL in base64. Raises ImageError for another one."""
    header, _, body = url.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError("not in base64")
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise ImageError(
            f"{url[:40]}...: Invalid data URL ({error}, expected data:image/...;base64,...)."
        ) from error


def read_image(
    data: BinaryIO, name: str, frame: Frame | None = None, exif_orientation: bool = False
) -> Image.Image:
    """Reads an image from an open file. `name` determines its format and is used in errors."""
    try:
        kind = medical.detect_format(data, name)
        if kind is not None:
            frames = medical.count_frames(data, kind)
            return medical.read_frame(data, kind, _frame_number(frame, frames, name), name)
        with open_pillow(data, name) as image:
            image.seek(_frame_number(frame, _count_tiff_pages(image), name))
            check_pixels(image.width, image.height)  # of this frame
            image.load()
            return to_rgb(apply_exif_orientation(image) if exif_orientation else image)
    except ImageError:
        raise
    except (UserError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise arbitrary exceptions for broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: Broken image ({reason}).") from error


def count_frames(data: BinaryIO, name: str) -> int:
    """Number of frames in an image file; 1 for an animation, of which the first image is read."""
    kind = medical.detect_format(data, name)
    if kind is not None:
        return medical.count_frames(data, kind)
    with open_pillow(data, name) as image:
        return _count_tiff_pages(image)


def _count_tiff_pages(image: Image.Image) -> int:
    """Pages of a TIFF; 1 for other formats.

    Pillow's own count takes quadratic time, so that a crafted file could occupy it for hours.
    """
    if image.format != "TIFF":
        return 1
    pages = 1
    try:
        while True:
            image.seek(pages)
            pages = check_frames(pages + 1)
    except EOFError:
        image.seek(0)
        return pages


def apply_exif_orientation(image: Image.Image) -> Image.Image:
    """The image as its EXIF tag specifies, without the tag. An invalid tag is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # corrupt EXIF data raises arbitrary exceptions in its parser
        return image


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
    """An image of any mode -> RGB, transparency on white, high bit depths windowed.

    The result keeps the EXIF data, so that an image tokenizer can obey its orientation.
    """
    if image.mode == "RGB":
        return image
    rgb = _convert_to_rgb(image)
    rgb.info |= {name: image.info[name] for name in _ORIENTATION if name in image.info}
    return rgb


def _convert_to_rgb(image: Image.Image) -> Image.Image:
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
