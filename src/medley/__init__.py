"""Medley: one vocabulary for words and pictures, one decoder that reads and writes both."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from medley.version import __version__

# PEFT imports bitsandbytes where it is installed, which then asks for kernels from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from medley.data.document import Document, ImagePart, Turn
    from medley.data.vocabulary import Vocabulary
    from medley.generation import GenerationOptions
    from medley.inference.loading import load
    from medley.inference.model import Model
    from medley.vqgan.image_tokenizer import ImageTokenizer

__all__ = [
    "Document",
    "GenerationOptions",
    "ImagePart",
    "ImageTokenizer",
    "Model",
    "Turn",
    "Vocabulary",
    "__version__",
    "load",
]  # fmt: skip

# Imported when they are asked for: a program that needs no torch starts in a second, not four.
_HOMES = {
    "Document": "data.document",
    "ImagePart": "data.document",
    "Turn": "data.document",
    "GenerationOptions": "generation.config",
    "ImageTokenizer": "vqgan.image_tokenizer",
    "Model": "inference.model",
    "load": "inference.loading",
    "Vocabulary": "data.vocabulary",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"medley.{_HOMES[name]}"), name)
    try:  # medley.images, as DESIGN of the library has it, without importing it first
        return importlib.import_module(f"medley.{name}")
    except ModuleNotFoundError as error:
        raise AttributeError(f"module 'medley' has no attribute {name!r}") from error
