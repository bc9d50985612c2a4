"""Image files to pixels, and lists of images."""

from medley.images.preprocess import (
    Fit,
    Frame,
    ImageError,
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
    "Fit", "Frame", "ImageError", "content_hash", "count_frames", "open_image", "read_image",
    "resize_square", "to_pil", "to_pixels", "to_rgb", "to_uint8_square", "uint8_to_pixels",
]  # fmt: skip
