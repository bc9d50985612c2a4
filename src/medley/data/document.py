"""Documents: conversations of interleaved text and images, and their exact token sequence.

The ids of a document are `<s>`, the user turn, the end-of-turn token, the assistant turn, and so
on, and `</s>`. A document with a single assistant turn has no end-of-turn token; training uses all
of its tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from medley.data.vocabulary import END_TURN, IMAGE, TextTokenizer, Vocabulary
from medley.errors import UserError

ROLES = ("user", "assistant")


class DocumentError(UserError):
    """A document that cannot be converted to a token sequence; the message gives the reason."""


@dataclass(frozen=True)
class ImagePart:
    """An image, given by its path, as pixels, or as image codes in raster order."""

    path: str | Path | None = None
    image: Image.Image | None = None
    codes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.path is None and self.image is None and self.codes is None:
            raise DocumentError("An ImagePart needs a path, an image or codes.")


ContentPart = str | ImagePart


@dataclass(frozen=True)
class Turn:
    """A turn. `trained` is false for a message of weight 0, which training leaves out."""

    role: str
    parts: tuple[ContentPart, ...]
    trained: bool = True

    def __post_init__(self) -> None:
        parts = (self.parts,) if isinstance(self.parts, str) else tuple(self.parts)
        object.__setattr__(self, "parts", parts)
        if self.role not in ROLES:
            raise DocumentError(
                f"Unsupported role {self.role!r} (expected {' or '.join(ROLES)}; a system message "
                "must be the first message, and tools are unsupported)."
            )


@dataclass(frozen=True)
class Document:
    """Alternating turns that start with the user's, or a single assistant turn."""

    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(self.turns))
        roles = [turn.role for turn in self.turns]
        if not roles:
            raise DocumentError("A document needs at least one turn.")
        expected = [ROLES[i % 2] for i in range(len(roles))]
        if roles not in (expected, ["assistant"]):
            raise DocumentError(
                f"Turns must alternate and start with the user (got {', '.join(roles)})."
            )

    @cached_property
    def images(self) -> list[ImagePart]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, ImagePart)]

    @cached_property
    def untrained_turns(self) -> tuple[int, ...]:
        """The numbers of the turns that training leaves out, from 0."""
        return tuple(number for number, turn in enumerate(self.turns) if not turn.trained)

    def map_images(self, function: Callable[[ImagePart], ImagePart]) -> Document:
        """Returns the document with `function` applied to each image."""
        return Document(
            tuple(
                replace(
                    turn,
                    parts=tuple(function(p) if isinstance(p, ImagePart) else p for p in turn.parts),
                )
                for turn in self.turns
            )
        )

    @property
    def pictures(self) -> list[ImagePart]:  # alias
        """Deprecated name of `images`."""
        _warn_deprecated("pictures", "images")  # alias
        return self.images

    def map_pictures(self, change: Callable[[ImagePart], ImagePart]) -> Document:  # alias
        """Deprecated name of `map_images`."""
        _warn_deprecated("map_pictures", "map_images")  # alias
        return self.map_images(change)

    def to_ids(self, tokenizer: TextTokenizer) -> list[int]:
        """Token ids. Every image must have its codes. Inverse of `from_ids`."""
        vocabulary = tokenizer.vocabulary
        ids = [vocabulary.bos]
        for number, turn in enumerate(self.turns):
            if number:
                ids.append(vocabulary.end_turn)
            ids += parts_to_ids(turn.parts, tokenizer)
        return [*ids, vocabulary.eos]

    @classmethod
    def from_ids(cls, ids: Sequence[int], tokenizer: TextTokenizer) -> Document:
        """Ids of one document -> document. Raises DocumentError for an incomplete sequence."""
        vocabulary = tokenizer.vocabulary
        if len(ids) < 2 or ids[0] != vocabulary.bos or ids[-1] != vocabulary.eos:
            raise DocumentError("The ids of a document must start with <s> and end with </s>.")
        segments: list[list[int]] = [[]]
        for token in ids[1:-1]:
            if token == vocabulary.end_turn:
                segments.append([])
            else:
                segments[-1].append(token)
        if len(segments) == 1:
            return cls((Turn("assistant", tuple(ids_to_parts(segments[0], tokenizer))),))
        return cls(
            tuple(
                Turn(ROLES[i % 2], tuple(ids_to_parts(segment, tokenizer)))
                for i, segment in enumerate(segments)
            )
        )

    @classmethod
    def from_json(cls, row: Any) -> Document:
        """One line of a documents file -> document (see `document_json.read_document`)."""
        from medley.data.document_json import read_document  # here: it imports Document

        return read_document(row).document

    def to_json(self) -> dict[str, Any]:
        """One line of a documents file, the inverse of `from_json`.

        The line has `text` if its special tokens represent all turns, else `messages`. In `text`,
        adjacent texts are joined, and empty texts are left out. In `messages`, a text with a typed
        `<image>` is marked as `literal`, and a turn that is not trained on has the weight 0. Raises
        DocumentError if some images have only a path and others only codes.
        """
        typed = ["\0".join(_text_runs(turn)) for turn in self.turns]
        if (
            _implies_roles([turn.role for turn in self.turns])
            and not self.untrained_turns
            and not any(map(_contains_special_token, typed))
        ):
            row: dict[str, Any] = {"text": END_TURN.join(map(_turn_text, self.turns))}
        else:
            row = {"messages": [_turn_message(turn) for turn in self.turns]}
        paths = [image.path for image in self.images if image.path is not None]
        codes = [image.codes for image in self.images if image.codes is not None]
        if len(self.images) not in (len(paths), len(codes)):
            raise DocumentError(
                f"{len(paths)} of {len(self.images)} images have a path and {len(codes)} have "
                "image codes. Either all images need a path, or all need codes."
            )
        if paths and len(paths) == len(self.images):
            row["image_path"] = str(paths[0]) if len(paths) == 1 else [str(p) for p in paths]
        if codes and len(codes) == len(self.images):
            row["image_tokens"] = list(codes[0]) if len(codes) == 1 else [list(c) for c in codes]
        return row


def _warn_deprecated(old: str, new: str) -> None:
    message = f"Document.{old} is deprecated, use Document.{new}."
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def _contains_special_token(text: str) -> bool:
    return IMAGE in text or END_TURN in text


def _implies_roles(roles: list[str]) -> bool:
    """Whether the number of turns determines their roles: a single turn is the assistant's."""
    return roles == ["assistant"] or len(roles) > 1


def _text_runs(turn: Turn) -> list[str]:
    """The texts between the images of a turn, adjacent texts joined."""
    joined = [""]
    for part in turn.parts:
        if isinstance(part, str):
            joined[-1] += part
        else:
            joined.append("")
    return joined


def _turn_text(turn: Turn) -> str:
    return "".join(part if isinstance(part, str) else IMAGE for part in turn.parts)


def _turn_message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": list(map(_content_part, turn.parts))}
    return message if turn.trained else {**message, "weight": 0}


def _content_part(part: ContentPart) -> dict[str, Any]:
    if isinstance(part, ImagePart):
        return {"type": "image"}
    return {"type": "text", "text": part, **({"literal": True} if IMAGE in part else {})}


def shorten(value: object, length: int = 200) -> str:
    """A value as text for a message; a data URL would fill pages."""
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}..."


# --- parts <-> ids ------------------------------------------------------------------------


def parts_to_ids(parts: Sequence[ContentPart], tokenizer: TextTokenizer) -> list[int]:
    """Parts of one turn -> ids. Each text is encoded on its own."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, str):
            ids += tokenizer.encode(part)
        elif part.codes is None:
            raise DocumentError(f"The image {shorten(part.path or part.image)} has no image codes.")
        elif not part.codes:
            raise DocumentError("An image has an empty list of image codes.")
        else:
            ids += tokenizer.vocabulary.image_token_ids(part.codes)
    return ids


def ids_to_parts(ids: Sequence[int], tokenizer: TextTokenizer) -> list[ContentPart]:
    """Ids of one turn -> parts. Raises DocumentError for an incomplete image."""
    vocabulary = tokenizer.vocabulary
    parts: list[ContentPart] = []
    text: list[int] = []
    codes: list[int] | None = None  # of an image whose end was not reached yet
    for position, token in enumerate(ids):
        if codes is not None:
            if token == vocabulary.end_image:
                parts.append(ImagePart(codes=tuple(codes)))
                codes = None
            elif token in vocabulary.image_codes:
                codes.append(vocabulary.token_to_image_code(token))
            else:
                raise DocumentError(
                    f"Token {token} at position {position} is inside an image but is not an image "
                    "token."
                )
        elif token == vocabulary.begin_image:
            if text:
                parts.append(tokenizer.decode(text))
                text = []
            codes = []
        elif token in vocabulary.text_tokens:
            text.append(token)
        else:
            raise DocumentError(
                f"Token {token} at position {position} is not a text token and not inside an image."
            )
    if codes is not None:
        raise DocumentError("An image has a begin token but no end token.")
    return [*parts, tokenizer.decode(text)] if text else parts


def turn_spans(ids: Sequence[int], vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """Half-open ranges of positions of a document's turns, each with the token that ends it."""
    turn_ends = [position for position, token in enumerate(ids) if token == vocabulary.end_turn]
    edges = [0, *turn_ends, len(ids) - 1]
    return [(start + 1, end + 1) for start, end in pairwise(edges)]


def assistant_spans(
    ids: Sequence[int], vocabulary: Vocabulary, untrained_turns: Collection[int] = ()
) -> list[tuple[int, int]]:
    """Half-open ranges of positions in a document's ids that training uses by default.

    Each range is an assistant turn with the token that ends it, without those in
    `untrained_turns`. A document without an end-of-turn token has one range: everything except
    `<s>`.
    """
    spans = turn_spans(ids, vocabulary)
    first = 0 if len(spans) == 1 else 1  # a single turn is the assistant's
    return [
        spans[number] for number in range(first, len(spans), 2) if number not in untrained_turns
    ]
