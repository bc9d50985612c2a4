"""The VQGAN: pictures to codes and back, exact and fast, and how it is trained."""

from medley.vqgan.model import VQGAN, VQGANConfig

__all__ = ["VQGAN", "VQGANConfig"]
