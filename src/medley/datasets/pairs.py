"""Question-answer pairs and captions as documents."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from medley.data.document import ContentPart, Document, ImagePart, Turn
from medley.data.vocabulary import IMAGE
from medley.datasets.base import (
    CAPTION_PROMPT,
    ConversionConfig,
    RecordError,
    repr_short,
    require_path,
)
from medley.datasets.placement import place_images, refuse_placeholder


def from_qa(
    images: Sequence[ImagePart],
    question: str,
    answer: str,
    record: Any,
    read_keys: Collection[str] = (),
) -> Document:
    """A document with one user turn (images and question) and one assistant turn (answer).

    The images come first unless the question has their placeholders. Raises RecordError for
    placeholders without an image; `record` and `read_keys` are for its message.
    """
    if IMAGE not in question + answer:
        return Document((Turn("user", (*images, question)), Turn("assistant", (answer,))))
    asked, answered = place_images([question, answer], images, record, read_keys, line_breaks=True)
    return Document((Turn("user", asked), Turn("assistant", answered)))


def to_qa(document: Document) -> tuple[str | None, str, str]:
    """Inverse of `from_qa`: image path, question, answer.

    Raises RecordError for a document that is not a single question and its answer.
    """
    if [turn.role for turn in document.turns] != ["user", "assistant"]:
        raise RecordError(
            f"The document has {len(document.turns)} turns; this format holds one question and one "
            "answer."
        )
    if document.untrained_turns:
        raise RecordError("A turn has the weight 0, which this format cannot represent.")
    question, answer = document.turns
    image_part = single_image(document.images)
    parts = question.parts[1:] if image_part is not None else question.parts
    if image_part is not None and question.parts[0] is not image_part:
        raise RecordError("The image is not before the question, as this format requires.")
    path = None if image_part is None else require_path(image_part)
    return path, join_text(parts), join_text(answer.parts)


def from_caption(
    images: Sequence[ImagePart],
    caption: str,
    config: ConversionConfig,
    record: Any,
    read_keys: Collection[str],
) -> Document:
    """A document with a caption prompt, an image and its caption.

    With an empty prompt (`--prompt ""`), one assistant turn holds the image and the caption, and
    both are trained on.
    """
    prompt = CAPTION_PROMPT if config.prompt is None else config.prompt
    if prompt:
        return from_qa(images, prompt, caption, record, read_keys)
    parts: tuple[ContentPart, ...] = (*images, caption)
    if IMAGE in caption:
        (parts,) = place_images([caption], images, record, read_keys, line_breaks=True)
    return Document((Turn("assistant", parts),))


def to_caption(document: Document, config: ConversionConfig) -> tuple[str, str]:
    """Inverse of `from_caption`: image path, caption.

    Raises RecordError for a document that is not an image and its caption, or that has another
    prompt.
    """
    prompt = CAPTION_PROMPT if config.prompt is None else config.prompt
    if prompt:
        path, question, caption = to_qa(document)
        if question != prompt:
            raise RecordError(
                f"The prompt is not the caption prompt (got {repr_short(question)}). Set --prompt "
                "to it."
            )
    else:
        first, *rest = document.turns[0].parts or ("",)
        if len(document.turns) > 1 or document.turns[0].role != "assistant":
            raise RecordError(
                f"The document has {len(document.turns)} turns; this format holds one caption."
            )
        path, caption = None, ""
        if isinstance(first, ImagePart) and all(isinstance(part, str) for part in rest):
            path, caption = require_path(first), join_text(rest)
    if path is None:
        raise RecordError("The document is not an image and its caption, as this format requires.")
    return path, caption


def single_image(image_parts: Sequence[ImagePart]) -> ImagePart | None:
    """The only image, or None. Raises RecordError for several images."""
    if len(image_parts) > 1:
        raise RecordError(
            f"The record has too many images for this format (got {len(image_parts)}, expected at "
            "most 1)."
        )
    return image_parts[0] if image_parts else None


def join_text(parts: Sequence[ContentPart]) -> str:
    assert all(isinstance(part, str) for part in parts)
    text = "".join(str(part) for part in parts)
    refuse_placeholder(text)
    return text
