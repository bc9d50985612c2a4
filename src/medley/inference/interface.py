"""What a chat session and a stream decoder need of a model, without importing `Model`."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from medley.data.document import Document, ImagePart
from medley.data.vocabulary import TextTokenizer, Vocabulary
from medley.generation import Engine, GenerationOptions, GenerationOutput, Request
from medley.inference.response import Response, StreamEvent
from medley.vqgan.image_tokenizer import ImageTokenizer

Prompt = Sequence["str | Path | Image.Image | ImagePart"]


class GeneratingModel(Protocol):
    """The part of `Model` that generates; its docstrings are there."""

    engine: Engine
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode_prompt(self, prompt: Prompt | Document, raw_prompt: bool = ...) -> list[int]: ...

    def check_image_generation(self, options: GenerationOptions) -> None: ...

    def stream_request(
        self, request: Request, preview_every: int = ...
    ) -> Generator[StreamEvent, None, None]: ...

    def to_response(
        self, output: GenerationOutput, images: Sequence[Image.Image] = ...
    ) -> Response: ...

    def preview(self, codes: Sequence[int]) -> Image.Image: ...
