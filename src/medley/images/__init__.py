"""Image files to pixels, and lists of images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medley.images.formats import ImageError
    from medley.images.preprocess import (
        Fit,
        Frame,
        Preprocessing,
        content_hash,
        count_frames,
        open_image,
        read_image,
        resize_square,
        to_pil,
        to_pixels,
        to_rgb,
        to_uint8_square,
        uint8_to_pixels,
    )

__all__ = [
    "Fit", "Frame", "ImageError", "Preprocessing", "content_hash", "count_frames", "open_image",
    "read_image", "resize_square", "to_pil", "to_pixels", "to_rgb", "to_uint8_square",
    "uint8_to_pixels",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imported on first use: `medley.images.formats` needs no torch."""
    if name in __all__:
        return getattr(importlib.import_module("medley.images.preprocess"), name)
    raise AttributeError(f"module 'medley.images' has no attribute {name!r}")
