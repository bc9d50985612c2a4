"""Any picture file -> RGB -> the square of pixels that the VQGAN reads.

The steps are Chameleon's: transparency blended on white, the short side scaled to the size
with LANCZOS, a centre crop, x / 255 * 2 - 1. Pictures of more than 8 bits are windowed from
their smallest to their largest value, where Chameleon saturates them to white.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from medley.errors import UserError

Fit = Literal["crop", "pad"]
PREPROCESSING_VERSION = "1"  # part of the token-space fingerprint: pixels decide codes
LONGEST = 200  # sides of a picture whose middle is cut out: more would take too much memory
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


class ImageError(UserError):
    """A picture that cannot be read; the message names the file and the reason."""


def open_image(path: str | Path) -> Image.Image:
    """Reads a picture file as RGB. Raises ImageError for a missing, broken or huge one."""
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such picture") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a picture in a format that is known") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error}") from error
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        raise ImageError(f"{path}: broken picture ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode -> RGB, transparency on white, deep grey values windowed."""
    if image.mode == "RGB":
        return image
    if image.mode in _DEEP_MODES:
        return Image.fromarray(_window(np.asarray(image))).convert("RGB")
    rgba = np.asarray(image.convert("RGBA"))
    if (rgba[..., 3] == 255).all():
        return image.convert("RGB")
    alpha = rgba[..., 3:] / 255.0
    blended = (1 - alpha) * 255 + alpha * rgba[..., :3]
    return Image.fromarray(blended.astype(np.uint8))  # truncated, not rounded, as Chameleon does


def _window(grey: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Grey values of any depth -> uint8, smallest to black, largest to white."""
    values = grey.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(grey.shape, np.uint8)
    low, high = values[finite].min(), values[finite].max()
    if low == high:  # nothing to spread: place the one value in the range of 16 bits
        low, high = 0.0, max(65535.0, high)
    scaled = (np.where(finite, values, low) - low) / (high - low)
    rounded: NDArray[np.uint8] = (scaled * 255).round().clip(0, 255).astype(np.uint8)
    return rounded


def to_square(image: Image.Image, size: int, fit: Fit = "crop") -> Image.Image:
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


def to_pixels(image: Image.Image, size: int, fit: Fit = "crop") -> Tensor:
    """A picture of any mode -> float32 (3, size, size) in [-1, 1]."""
    square = np.asarray(to_square(to_rgb(image), size, fit))
    # In double precision first: x / 255 * 2 - 1 in float32 differs in the last bit.
    scaled = (square / 255.0 * 2.0 - 1.0).astype(np.float32)
    return torch.from_numpy(scaled).permute(2, 0, 1).contiguous()


def from_pixels(pixels: Tensor) -> Image.Image:
    """Float (3, H, W), about [-1, 1] -> picture; clamped and truncated as Chameleon does."""
    unit = (pixels.detach().float().cpu().clamp(-1, 1) + 1) / 2
    array = (unit.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return Image.fromarray(array)


def content_hash(image: Image.Image) -> str:
    """SHA-256 of an RGB picture's size and bytes: the same picture under any name."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()
