"""The VQGAN: encodes images to image codes, decodes image codes to images, and its training."""

from medley.vqgan.model import VQGAN, VQGANConfig

__all__ = ["VQGAN", "VQGANConfig"]
