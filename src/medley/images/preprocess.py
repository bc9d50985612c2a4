"""Any picture file -> RGB -> the square of pixels that the VQGAN reads.

The steps are Chameleon's: transparency blended on white, the short side scaled to the size
with LANCZOS, a centre crop, x / 255 * 2 - 1. Pictures of more than 8 bits are windowed, where
Chameleon saturates them to white: DICOM as its header says (`medical`), others from
their smallest to their largest value.

A file of several frames (DICOM, NIfTI, TIFF) needs one chosen: `scan.dcm#12` is a name for
its frame 12, counted from 0. Animations (GIF, WebP, APNG) give their first picture.
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
PREPROCESSING_VERSION = "1"  # part of the token-space fingerprint: pixels decide codes
LONGEST = 200  # sides of a picture whose middle is cut out: more would take too much memory
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_FRAME_IN_NAME = re.compile(r"(.+)#(\d+)")
# x / 255 * 2 - 1 for every x, in double precision first: in float32 the last bit differs.
_SCALED = torch.from_numpy((np.arange(256) / 255.0 * 2.0 - 1.0).astype(np.float32))


class ImageError(UserError):
    """A picture that cannot be read; the message names the file and the reason."""


def open_image(
    path: str | Path, frame: Frame | None = None, exif_orientation: bool = False
) -> Image.Image:
    """Reads a picture file as RGB. Raises ImageError for a missing, broken or huge one.

    `frame` is one of a file that holds several; `exif_orientation` turns a photograph as its
    camera says (Chameleon does not).
    """
    name = str(path)
    match = _FRAME_IN_NAME.fullmatch(name)
    try:
        if match and not Path(name).exists():
            name, frame = match[1], int(match[2])
        with open(name, "rb") as data:
            return read_image(data, name, frame, exif_orientation)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such picture") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be opened ({error.strerror})") from error
    except ImageError:
        raise
    except ValueError as error:  # a NUL in a name
        raise ImageError(f"{str(path)!r}: cannot be opened ({error})") from error


def read_image(
    data: BinaryIO, name: str, frame: Frame | None = None, exif_orientation: bool = False
) -> Image.Image:
    """A picture in an open file, called `name` in errors and known by that name's suffix."""
    try:
        kind = medical.kind_of(data, name)
        if kind is not None:
            frames = medical.count_frames(data, kind)
            return medical.read_frame(data, kind, _choose(frame, frames, name), name)
        with Image.open(data) as image:
            image.seek(_choose(frame, _pages(image), name))
            image.load()
            return to_rgb(ImageOps.exif_transpose(image) if exif_orientation else image)
    except ImageError:
        raise
    except UserError as error:
        raise ImageError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture in a format that is known") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: broken picture ({reason})") from error


def count_frames(data: BinaryIO, name: str) -> int:
    """Frames that a picture file holds; 1 for an animation, whose first picture is read."""
    kind = medical.kind_of(data, name)
    if kind is not None:
        return medical.count_frames(data, kind)
    with Image.open(data) as image:
        return _pages(image)


def _pages(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1)) if image.format == "TIFF" else 1


def _choose(frame: Frame | None, frames: int, name: str) -> int:
    """The number of a frame, checked. Raises ImageError where none was chosen of several."""
    if frame is None:
        if frames > 1:
            raise ImageError(
                f"{name}: holds {frames} frames; choose with --frames first|middle|all, or name "
                f"one: {name}#0 to {name}#{frames - 1}"
            )
        return 0
    number = {"first": 0, "middle": frames // 2}.get(str(frame))
    if number is None:
        number = int(frame)
    if not 0 <= number < frames:
        raise ImageError(f"{name}: has no frame {number}, it holds {frames} (counted from 0)")
    return number


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode -> RGB, transparency on white, deep grey values windowed."""
    if image.mode == "RGB":
        return image
    if image.mode in _DEEP_MODES:
        return Image.fromarray(medical.rescale_to_uint8(np.asarray(image))).convert("RGB")
    rgba = np.asarray(image.convert("RGBA"))
    if (rgba[..., 3] == 255).all():
        return image.convert("RGB")
    alpha = rgba[..., 3:] / 255.0
    blended = (1 - alpha) * 255 + alpha * rgba[..., :3]
    return Image.fromarray(blended.astype(np.uint8))  # truncated, not rounded, as Chameleon does


def resize_square(image: Image.Image, size: int, fit: Fit = "crop") -> Image.Image:
    """An RGB picture -> `size` x `size`: its middle, or all of it on black (`pad`)."""
    side = min(image.size) if fit == "crop" else max(image.size)
    width, height = (max(1, round(size / side * length)) for length in image.size)
    if fit == "crop" and max(width, height) > LONGEST * size:
        raise ImageError(
            f"a picture of {image.width} x {image.height} is too long for --fit crop "
            f"(at most {LONGEST} times as long as wide); use --fit pad"
        )
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return scaled.crop((left, top, left + size, top + size))


def to_uint8_square(image: Image.Image, size: int, fit: Fit = "crop") -> Tensor:
    """A picture of any mode -> uint8 (size, size, 3), a quarter of what its pixels take."""
    return torch.from_numpy(np.array(resize_square(to_rgb(image), size, fit)))


def bytes_to_pixels(squares: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return _SCALED.to(squares.device)[squares.int()].permute(0, 3, 1, 2)


def to_pixels(image: Image.Image, size: int, fit: Fit = "crop") -> Tensor:
    """A picture of any mode -> float32 (3, size, size) in [-1, 1]."""
    return bytes_to_pixels(to_uint8_square(image, size, fit)[None])[0].contiguous()


def to_pil(pixels: Tensor) -> Image.Image:
    """Float (3, H, W), about [-1, 1] -> picture; clamped and truncated as Chameleon does."""
    unit = (pixels.detach().float().cpu().clamp(-1, 1) + 1) / 2
    array = (unit.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return Image.fromarray(array)


def content_hash(image: Image.Image) -> str:
    """SHA-256 of an RGB picture's size and bytes: the same picture under any name."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()
