"""Documents: conversations of interleaved text and images, and their exact token sequence.

The ids of a document are `<s>`, the user turn, the end-of-turn token, the assistant turn, and so
on, and `</s>`. A document with a single assistant turn has no end-of-turn token; training uses all
of its tokens.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from medley.data.vocabulary import END_TURN, IMAGE, TextTokenizer, Vocabulary
from medley.errors import UserError

ROLES = ("user", "assistant")
_SPECIAL_IN_TEXT = re.compile(f"({re.escape(IMAGE)}|{re.escape(END_TURN)})")


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
    role: str
    parts: tuple[ContentPart, ...]

    def __post_init__(self) -> None:
        parts = (self.parts,) if isinstance(self.parts, str) else tuple(self.parts)
        object.__setattr__(self, "parts", parts)
        if self.role not in ROLES:
            raise DocumentError(
                f"Unsupported role {self.role!r} (expected {' or '.join(ROLES)}; a system message "
                "must be the first message)."
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

    def map_images(self, function: Callable[[ImagePart], ImagePart]) -> Document:
        """Returns the document with `function` applied to each image."""
        return Document(
            tuple(
                Turn(t.role, tuple(function(p) if isinstance(p, ImagePart) else p for p in t.parts))
                for t in self.turns
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
        """One line of a documents file -> document.

        The line has `text` or `messages`, and `image_path` and `image_tokens` for its images.
        Raises DocumentError that names the missing or inconsistent field.
        """
        if not isinstance(row, dict):
            raise DocumentError(f"The line contains {type(row).__name__} (expected an object).")
        if "messages" in row:
            turns = _turns_from_messages(row["messages"], bool(_images_from_row(row)))
        elif "text" in row:
            turns = _turns_from_text(row["text"])
        else:
            raise DocumentError("The line has neither 'text' nor 'messages'.")
        return cls(tuple(_insert_images(turns, _images_from_row(row))))

    def to_json(self) -> dict[str, Any]:
        """One line of a documents file, the inverse of `from_json`.

        The line has `text` if its special tokens represent all turns, else `messages`. Adjacent
        texts are joined, and empty texts are left out. Raises DocumentError if some images have
        only a path and others only codes.
        """
        typed = ["\0".join(_text_runs(turn)) for turn in self.turns]
        if _implies_roles([turn.role for turn in self.turns]) and not any(
            map(_contains_special_token, typed)
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
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


# Position of an image in a turn, until `_insert_images` replaces it.
_PLACEHOLDER = ImagePart(codes=())


def _turns_from_text(text: Any) -> list[Turn]:
    if not isinstance(text, str):
        raise DocumentError(f"'text' is {type(text).__name__} (expected a string).")
    segments: list[list[ContentPart]] = [[]]
    for piece in _SPECIAL_IN_TEXT.split(text):
        if piece == END_TURN:
            segments.append([])
        elif piece == IMAGE:
            segments[-1].append(_PLACEHOLDER)
        elif piece:
            segments[-1].append(piece)
    if len(segments) == 1:
        return [Turn("assistant", tuple(segments[0]))]
    return [Turn(ROLES[i % 2], tuple(parts)) for i, parts in enumerate(segments)]


def _turns_from_messages(messages: Any, has_images: bool) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise DocumentError("'messages' must be a list with at least one message.")
    turns: list[Turn] = []
    system: list[ContentPart] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DocumentError(f"Message {number} lacks 'role' or 'content'.")
        parts = _parts_from_content(message["content"], number, has_images)
        if message["role"] == "system" and number == 0:  # part of the first user turn
            system = [*parts, "\n"]
        else:
            turns.append(Turn(str(message["role"]), (*system, *parts)))
            system = []
    return turns


def _parts_from_content(content: Any, number: int, has_images: bool) -> list[ContentPart]:
    if isinstance(content, str):
        # As in ShareGPT, <image> in a message is the position of an image. In a line without
        # images, <image> is text that a user typed.
        pieces = re.split(f"({re.escape(IMAGE)})", content) if has_images else [content]
        return [_PLACEHOLDER if piece == IMAGE else piece for piece in pieces if piece]
    if not isinstance(content, list):
        raise DocumentError(f"Message {number}: 'content' must be a string or a list of parts.")
    parts: list[ContentPart] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            parts.append(str(part.get("text", "")))
        elif kind == "image":
            parts.append(_PLACEHOLDER)
        else:
            raise DocumentError(
                f"Message {number}: Unsupported part of type {kind!r} (expected text or image)."
            )
    return parts


def _images_from_row(row: dict[str, Any]) -> list[ImagePart]:
    paths, codes = row.get("image_path"), row.get("image_tokens")
    paths = [paths] if isinstance(paths, str) else paths or []
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        raise DocumentError("'image_path' must be a string or a list of strings.")
    if any("\0" in path for path in paths):
        raise DocumentError("'image_path' contains a NUL character.")
    lists = codes or []
    if not isinstance(lists, list):
        raise DocumentError("'image_tokens' must be a list of image codes or a list of such lists.")
    if lists and not isinstance(lists[0], list):
        lists = [lists]
    if paths and lists and len(paths) != len(lists):
        raise DocumentError(
            f"{len(paths)} image paths but {len(lists)} lists of image codes (expected one list "
            "per path)."
        )
    for one in lists:
        if not isinstance(one, list) or not set(map(type, one)) <= {int}:
            raise DocumentError("'image_tokens' contains a value that is not an integer.")
    count = max(len(paths), len(lists))
    return [
        ImagePart(
            path=paths[i] if paths else None,
            codes=tuple(lists[i]) if lists else None,
        )
        for i in range(count)
    ]


def _insert_images(turns: list[Turn], images: list[ImagePart]) -> list[Turn]:
    placeholders = sum(part is _PLACEHOLDER for turn in turns for part in turn.parts)
    if placeholders != len(images):
        raise DocumentError(
            f"The number of {IMAGE} placeholders ({placeholders}) differs from the number of "
            f"images ({len(images)})."
        )
    remaining = iter(images)
    return [
        Turn(t.role, tuple(next(remaining) if p is _PLACEHOLDER else p for p in t.parts))
        for t in turns
    ]


# --- parts <-> ids ------------------------------------------------------------------------


def parts_to_ids(parts: Sequence[ContentPart], tokenizer: TextTokenizer) -> list[int]:
    """Parts of one turn -> ids. Each text is encoded on its own."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, str):
            ids += tokenizer.encode(part)
        elif part.codes is None:
            raise DocumentError(f"The image {part.path or part.image} has no image codes.")
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


def assistant_spans(ids: Sequence[int], vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """Half-open ranges of positions in a document's ids that training uses by default.

    Each range is an assistant turn with the token that ends it. A document without an end-of-turn
    token has one range: everything except `<s>`.
    """
    turn_ends = [position for position, token in enumerate(ids) if token == vocabulary.end_turn]
    if not turn_ends:
        return [(1, len(ids))]
    edges = [*turn_ends, len(ids) - 1]
    return [(edges[i] + 1, edges[i + 1] + 1) for i in range(0, len(edges) - 1, 2)]
