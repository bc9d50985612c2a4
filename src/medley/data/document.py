"""Interleaved documents: turns of text and pictures, and their one exact token sequence.

The ids of a document are `<s>`, the user's turn, the end-of-turn mark, the assistant's turn
and so on, and `</s>`. A document of one assistant turn has no mark and is learned whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from medley.data.vocabulary import END_TURN, IMAGE, TextTokenizer, Vocabulary
from medley.errors import UserError

ROLES = ("user", "assistant")
_MARKS_IN_TEXT = re.compile(f"({re.escape(IMAGE)}|{re.escape(END_TURN)})")


class DocumentError(UserError):
    """A document that cannot become a sequence; the message says why."""


@dataclass(frozen=True)
class ImagePart:
    """A picture by its path, as pixels, or as image codes in raster order."""

    path: str | Path | None = None
    image: Image.Image | None = None
    codes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.path is None and self.image is None and self.codes is None:
            raise DocumentError("a ImagePart needs a path, an image or codes")


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
                f"role {self.role!r} is not known: {' and '.join(ROLES)} are (a system text "
                "joins the first user turn)"
            )


@dataclass(frozen=True)
class Document:
    """Turns that alternate, user first; or one assistant turn alone, learned whole."""

    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(self.turns))
        roles = [turn.role for turn in self.turns]
        if not roles:
            raise DocumentError("a document has no turns")
        expected = [ROLES[i % 2] for i in range(len(roles))]
        if roles not in (expected, ["assistant"]):
            raise DocumentError(f"turns must alternate, user first, got {', '.join(roles)}")

    @cached_property
    def pictures(self) -> list[ImagePart]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, ImagePart)]

    def map_images(self, change: Callable[[ImagePart], ImagePart]) -> Document:
        """The same document with every picture replaced by what `change` makes of it."""
        return Document(
            tuple(
                Turn(t.role, tuple(change(p) if isinstance(p, ImagePart) else p for p in t.parts))
                for t in self.turns
            )
        )

    def to_ids(self, tokenizer: TextTokenizer) -> list[int]:
        """Token ids; every picture must have its codes. Inverse of `from_ids`."""
        vocabulary = tokenizer.vocabulary
        ids = [vocabulary.bos]
        for number, turn in enumerate(self.turns):
            if number:
                ids.append(vocabulary.end_turn)
            ids += parts_to_ids(turn.parts, tokenizer)
        return [*ids, vocabulary.eos]

    @classmethod
    def from_ids(cls, ids: Sequence[int], tokenizer: TextTokenizer) -> Document:
        """Ids of one whole document -> document. Raises DocumentError for a torn sequence."""
        vocabulary = tokenizer.vocabulary
        if len(ids) < 2 or ids[0] != vocabulary.bos or ids[-1] != vocabulary.eos:
            raise DocumentError("ids of a document begin with <s> and end with </s>")
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
        """One line of a documents file: `text`, or `messages`, with `image_path` and
        `image_tokens`. Raises DocumentError that says what is missing or does not match.
        """
        if not isinstance(row, dict):
            raise DocumentError(f"a line holds {type(row).__name__}, expected an object")
        if "messages" in row:
            turns = _turns_of_messages(row["messages"], bool(_pictures_of(row)))
        elif "text" in row:
            turns = _turns_of_text(row["text"])
        else:
            raise DocumentError("neither 'text' nor 'messages' is there")
        return cls(tuple(_with_pictures(turns, _pictures_of(row))))

    def to_json(self) -> dict[str, Any]:
        """The line of a documents file, inverse of `from_json`: `text` where its marks say all,
        else `messages`. Neighbouring texts become one, empty ones vanish.

        Raises DocumentError where some pictures have a path and others only codes.
        """
        words = ["\0".join(_texts(turn)) for turn in self.turns]
        if _says_all([turn.role for turn in self.turns]) and not any(map(has_mark, words)):
            row: dict[str, Any] = {"text": END_TURN.join(map(_marked, self.turns))}
        else:
            row = {"messages": [_message(turn) for turn in self.turns]}
        pictures = self.pictures
        paths = [p.path for p in pictures if p.path is not None]
        codes = [p.codes for p in pictures if p.codes is not None]
        if len(pictures) not in (len(paths), len(codes)):
            raise DocumentError(
                f"{len(paths)} of {len(pictures)} pictures have a path and {len(codes)} have image "
                "codes: all need the one or the other"
            )
        if pictures and len(paths) == len(pictures):
            row["image_path"] = str(paths[0]) if len(paths) == 1 else [str(p) for p in paths]
        if pictures and len(codes) == len(pictures):
            row["image_tokens"] = list(codes[0]) if len(codes) == 1 else [list(c) for c in codes]
        return row


def has_mark(text: str) -> bool:
    """Whether a text holds what stands for a picture or the end of a turn in a document's line."""
    return IMAGE in text or END_TURN in text


def _says_all(roles: list[str]) -> bool:
    """Whether the number of turns says who speaks: one alone is read as the assistant's."""
    return roles == ["assistant"] or len(roles) > 1


def _texts(turn: Turn) -> list[str]:
    """The texts between a turn's pictures, neighbours joined."""
    joined = [""]
    for part in turn.parts:
        if isinstance(part, str):
            joined[-1] += part
        else:
            joined.append("")
    return joined


def _marked(turn: Turn) -> str:
    return "".join(part if isinstance(part, str) else IMAGE for part in turn.parts)


def _message(turn: Turn) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


# A picture's place before it is known which one stands there.
_PLACE = ImagePart(codes=())


def _turns_of_text(text: Any) -> list[Turn]:
    if not isinstance(text, str):
        raise DocumentError(f"'text' is {type(text).__name__}, expected a string")
    segments: list[list[ContentPart]] = [[]]
    for piece in _MARKS_IN_TEXT.split(text):
        if piece == END_TURN:
            segments.append([])
        elif piece == IMAGE:
            segments[-1].append(_PLACE)
        elif piece:
            segments[-1].append(piece)
    if len(segments) == 1:
        return [Turn("assistant", tuple(segments[0]))]
    return [Turn(ROLES[i % 2], tuple(parts)) for i, parts in enumerate(segments)]


def _turns_of_messages(messages: Any, has_pictures: bool) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise DocumentError("'messages' must be a list with at least one message")
    turns: list[Turn] = []
    system: list[ContentPart] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DocumentError(f"message {number} lacks 'role' or 'content'")
        parts = _parts_of_content(message["content"], number, has_pictures)
        if message["role"] == "system" and number == 0:
            system = [*parts, "\n"]
        else:
            turns.append(Turn(str(message["role"]), (*system, *parts)))
            system = []
    return turns


def _parts_of_content(content: Any, number: int, has_pictures: bool) -> list[ContentPart]:
    if isinstance(content, str):
        # A message says by <image> where its pictures stand, as sharegpt has it; where no
        # picture was given, it is text that somebody typed.
        pieces = re.split(f"({re.escape(IMAGE)})", content) if has_pictures else [content]
        return [_PLACE if piece == IMAGE else piece for piece in pieces if piece]
    if not isinstance(content, list):
        raise DocumentError(f"message {number}: 'content' must be a string or a list of parts")
    parts: list[ContentPart] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            parts.append(str(part.get("text", "")))
        elif kind == "image":
            parts.append(_PLACE)
        else:
            raise DocumentError(f"message {number}: part of type {kind!r}, expected text or image")
    return parts


def _pictures_of(row: dict[str, Any]) -> list[ImagePart]:
    paths, codes = row.get("image_path"), row.get("image_tokens")
    paths = [paths] if isinstance(paths, str) else paths or []
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        raise DocumentError("'image_path' must be a string or a list of strings")
    if any("\0" in path for path in paths):
        raise DocumentError("'image_path' holds a NUL, which no path can")
    lists = codes or []
    if not isinstance(lists, list):
        raise DocumentError("'image_tokens' must be a list of codes, or a list of such lists")
    if lists and not isinstance(lists[0], list):
        lists = [lists]
    if paths and lists and len(paths) != len(lists):
        raise DocumentError(
            f"{len(paths)} picture paths but {len(lists)} lists of image codes: one for each"
        )
    for one in lists:
        if not isinstance(one, list) or not set(map(type, one)) <= {int}:
            raise DocumentError("'image_tokens' holds something that is no whole number")
    count = max(len(paths), len(lists))
    return [
        ImagePart(
            path=paths[i] if paths else None,
            codes=tuple(lists[i]) if lists else None,
        )
        for i in range(count)
    ]


def _with_pictures(turns: list[Turn], pictures: list[ImagePart]) -> list[Turn]:
    places = sum(part is _PLACE for turn in turns for part in turn.parts)
    if places != len(pictures):
        raise DocumentError(
            f"{places} {IMAGE} in the text but {len(pictures)} pictures: one for each is needed"
        )
    supply = iter(pictures)
    return [
        Turn(turn.role, tuple(next(supply) if part is _PLACE else part for part in turn.parts))
        for turn in turns
    ]


# --- parts <-> ids ------------------------------------------------------------------------


def parts_to_ids(parts: Sequence[ContentPart], tokenizer: TextTokenizer) -> list[int]:
    """Parts of one turn -> ids, each text encoded alone, pictures between their marks."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, str):
            ids += tokenizer.encode(part)
        elif part.codes is None:
            raise DocumentError(f"the picture {part.path or part.image} has no image codes yet")
        elif not part.codes:
            raise DocumentError("a picture with an empty list of image codes")
        else:
            ids += tokenizer.vocabulary.image_token_ids(part.codes)
    return ids


def ids_to_parts(ids: Sequence[int], tokenizer: TextTokenizer) -> list[ContentPart]:
    """Ids of one turn -> parts. Raises DocumentError for a picture that is not whole."""
    vocabulary = tokenizer.vocabulary
    parts: list[ContentPart] = []
    text: list[int] = []
    codes: list[int] | None = None
    for place, token in enumerate(ids):
        if codes is not None:
            if token == vocabulary.end_image:
                parts.append(ImagePart(codes=tuple(codes)))
                codes = None
            elif token in vocabulary.image_codes:
                codes.append(vocabulary.token_to_image_code(token))
            else:
                raise DocumentError(f"id {token} at {place} stands inside a picture")
        elif token == vocabulary.begin_image:
            if text:
                parts.append(tokenizer.decode(text))
                text = []
            codes = []
        elif token in vocabulary.text_tokens:
            text.append(token)
        else:
            raise DocumentError(f"id {token} at {place} is neither text nor inside a picture")
    if codes is not None:
        raise DocumentError("a picture has a beginning and no end")
    return [*parts, tokenizer.decode(text)] if text else parts


def assistant_spans(ids: Sequence[int], vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """Where the learned parts of a document lie, as half-open ranges of places in `ids`.

    Every assistant turn with the mark that closes it; everything but `<s>` where no mark
    separates turns.
    """
    marks = [place for place, token in enumerate(ids) if token == vocabulary.end_turn]
    if not marks:
        return [(1, len(ids))]
    edges = [*marks, len(ids) - 1]
    return [(edges[i] + 1, edges[i + 1] + 1) for i in range(0, len(edges) - 1, 2)]
