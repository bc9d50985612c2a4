"""Medley: one vocabulary for text and images, one decoder that reads and generates both."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

from medley.version import __version__

# PEFT imports bitsandbytes if it is installed, and bitsandbytes then looks for kernels on a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from medley.data.document import Document, ImagePart, Turn
    from medley.data.vocabulary import Vocabulary
    from medley.generation.config import GenerationOptions
    from medley.inference.loading import load
    from medley.inference.model import Model
    from medley.inference.response import Response, StreamEvent
    from medley.vqgan.image_tokenizer import ImageTokenizer

# The public API. Everything else may change between two releases.
__all__ = [
    "Document", "GenerationOptions", "ImagePart", "ImageTokenizer", "Model", "Response",
    "StreamEvent", "Turn", "Vocabulary", "__version__", "load",
]  # fmt: skip

# Imported on first use: a program that needs no torch starts in 0.04 s instead of 4 s.
_MODULES = {
    "Document": "data.document",
    "GenerationOptions": "generation.config",
    "ImagePart": "data.document",
    "ImageTokenizer": "vqgan.image_tokenizer",
    "Model": "inference.model",
    "Response": "inference.response",
    "StreamEvent": "inference.response",
    "Turn": "data.document",
    "Vocabulary": "data.vocabulary",
    "load": "inference.loading",
}
_DEPRECATED = {"Picture": "ImagePart"}  # alias


def __getattr__(name: str) -> Any:
    if name in _DEPRECATED:
        warnings.warn(
            f"medley.{name} is deprecated, use medley.{_DEPRECATED[name]}",
            DeprecationWarning,
            stacklevel=2,
        )
        name = _DEPRECATED[name]
    if name in _MODULES:
        return getattr(importlib.import_module(f"medley.{_MODULES[name]}"), name)
    try:  # `import medley` is enough for medley.images.to_pixels
        return importlib.import_module(f"medley.{name}")
    except ModuleNotFoundError as error:
        raise AttributeError(f"module 'medley' has no attribute {name!r}") from error
