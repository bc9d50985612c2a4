"""Responses, and the events of a streamed response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from medley.data.vocabulary import Vocabulary
from medley.utils.deprecation import DeprecatedName


@dataclass(frozen=True)
class Response:
    """Text and images in their order, and the generated token ids.

    `finish_reason` is "end", "stop" or "length"; `note` explains why an image is missing.
    """

    parts: list[str | Image.Image]
    finish_reason: str
    note: str | None
    ids: list[int]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[Image.Image]:
        return [part for part in self.parts if isinstance(part, Image.Image)]


@dataclass(frozen=True)
class StreamEvent:
    """One event of a streamed response.

    It is a piece of text, the progress of an image (0 to 1, with a preview if requested), a
    complete image with its image codes, or, as the last event, the complete response.
    """

    text: str | None = None
    progress: float | None = None
    preview: Image.Image | None = None
    image: Image.Image | None = None
    codes: tuple[int, ...] = ()
    response: Response | None = None

    answer = DeprecatedName("response")  # alias


def strip_terminators(ids: Sequence[int], vocabulary: Vocabulary, finish_reason: str) -> list[int]:
    """Ids of a response without the token that ended it and without a truncated last image."""
    stripped = list(ids)
    if finish_reason in ("end", "stop") and ids[-1] != vocabulary.end_image:
        stripped = stripped[:-1]
    if vocabulary.begin_image in stripped:
        last = len(stripped) - 1 - stripped[::-1].index(vocabulary.begin_image)
        if vocabulary.end_image not in stripped[last:]:
            return stripped[:last]
    return stripped
