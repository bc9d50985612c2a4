"""Medley: one vocabulary for words and pictures, one decoder that reads and writes both."""

from medley.document import Document, Picture, Turn
from medley.generation import GenerationOptions
from medley.image_tokenizer import ImageTokenizer
from medley.loading import Model, load
from medley.version import __version__
from medley.vocabulary import Vocabulary

__all__ = [
    "Document",
    "GenerationOptions",
    "ImageTokenizer",
    "Model",
    "Picture",
    "Turn",
    "Vocabulary",
    "__version__",
    "load",
]
