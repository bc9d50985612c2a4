"""One row of JSON -> a document: Medley's own lines, and the common layouts of others.

`text` or `messages`, and the images in `image_path` and `image_tokens`, are Medley's. Other
layouts:

- ms-swift, LLaMA-Factory: `messages` with `images`, a list of paths or of {"path": ...}
- OpenAI: content parts `text` and `image_url`, with a path, a URL or a data URL; `weight`
- Hugging Face's templates: parts {"type": "image", "image": PATH}; LLaMA-Factory's `value` parts
- Anole: `text` with `image`. The image is at `<image>`, or, without a placeholder, after the text,
  as in Anole's own code
- Chameleon's prompts: `prompt` with `<img>` placeholders and `image_urls`

One rule holds for all: there are as many `<image>` placeholders as images, or the row is an error.
Only a text part marked as `literal` may contain `<image>` as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from medley.data.document import (
    ROLES,
    ContentPart,
    Document,
    DocumentError,
    ImagePart,
    Turn,
    shorten,
)
from medley.data.message_keys import check_message, check_row, is_trained, unread_row_keys
from medley.data.vocabulary import END_TURN, IMAGE

NUMBERS_READ = "numbers read as text"
EMPTY_ANSWER = "assistant turns without text"
_CONTENT_KEYS = ("messages", "text", "prompt")
_IMAGE_KEYS = ("images", "image", "image_urls")  # of others, if Medley's own keys are absent
_SPECIAL_IN_TEXT = re.compile(f"({re.escape(IMAGE)}|{re.escape(END_TURN)})")
_IN_MESSAGE = re.compile(f"({re.escape(IMAGE)})")
_IN_PROMPT = re.compile(f"({re.escape(IMAGE)}|<img>)")
_TEXT_PARTS = ("text", "input_text", "output_text")
_TEXT_KEYS = ("text", "value", "content")
_IMAGE_PARTS = ("image", "image_url", "input_image", "image_path")
_SOURCE_KEYS = ("image", "image_url", "image_path", "url", "path", "value", "source")
_IMAGE_NAME = re.compile(
    r"(?i)image|img|pic|photo|figure|frame|media|scan|slice|(^|_)(path|file)s?$"
)
_IMAGE_FILE = re.compile(r"(?i)\.(png|jpe?g|bmp|gif|tiff?|webp|dcm|nii|nii\.gz)(#\d+)?$")
# Position of an image in a turn, until `_insert_images` replaces it.
_PLACEHOLDER = ImagePart(codes=())


@dataclass(frozen=True)
class ReadDocument:
    """A document with notes on how its row was read.

    Attributes:
        remarks: what was converted or left out, such as "numbers read as text"
        used_keys: the keys of the row that the document contains
    """

    document: Document
    remarks: tuple[str, ...]
    used_keys: frozenset[str]


def read_document(row: Any) -> ReadDocument:
    """Reads one row. Raises DocumentError that names the missing or inconsistent field."""
    if not isinstance(row, dict):
        raise DocumentError(f"The line contains {type(row).__name__} (expected an object).")
    check_row(row)
    reader = _Reader(row)
    key = next((key for key in _CONTENT_KEYS if row.get(key) is not None), None)
    if key == "messages":
        turns = reader.turns_from_messages(row["messages"])
    elif key == "text":
        turns = _turns_from_text(row["text"])
    elif key == "prompt":
        turns = [_turn_from_prompt(row)]
    else:
        empty = [key for key in _CONTENT_KEYS if key in row]
        raise DocumentError(
            f"{empty[0]!r} is null."
            if empty
            else "The line has neither 'text' nor 'messages'"
            + (" (its conversation is in 'conversations': convert it with --from llava)."
               if "conversations" in row else ".")
        )  # fmt: skip
    images, image_keys = _images_from_row(row)
    document = Document(tuple(_insert_images(turns, images, image_keys, row)))
    used = frozenset((key, *image_keys))
    reader.remarks += unread_row_keys(row, used)
    if not document.images:
        reader.remarks += [
            f"key {name!r} seems to name an image and is not read"
            for name in _unread_image_keys(row, used)
            if _looks_like_file(row[name])
        ]
    reader.remarks += [EMPTY_ANSWER] * sum(map(is_empty_answer, document.turns))
    return ReadDocument(document, tuple(reader.remarks), used)


def is_empty_answer(turn: Turn) -> bool:
    """Whether a turn would teach the model to answer with nothing."""
    return turn.role == "assistant" and turn.trained and not any(
        isinstance(part, ImagePart) or part.strip() for part in turn.parts
    )  # fmt: skip


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


def _turn_from_prompt(row: dict[str, Any]) -> Turn:
    """Chameleon's prompts: a user turn without an answer."""
    if not isinstance(row["prompt"], str):
        raise DocumentError(f"'prompt' is {type(row['prompt']).__name__} (expected a string).")
    for name in ("completion", "response", "chosen"):
        if row.get(name):
            raise DocumentError(f"{name!r} beside 'prompt' is not read. Write both as 'messages'.")
    return Turn("user", tuple(_split(row["prompt"], _IN_PROMPT)))


def _split(text: str, placeholder: re.Pattern[str]) -> Iterator[ContentPart]:
    """A text -> its pieces, with `_PLACEHOLDER` for each placeholder."""
    for number, piece in enumerate(placeholder.split(text)):
        if number % 2:
            yield _PLACEHOLDER
        elif piece:
            yield piece


# --- messages -----------------------------------------------------------------------------


@dataclass
class _Reader:
    """Reads the messages of one row and collects remarks."""

    row: dict[str, Any]
    remarks: list[str] = field(default_factory=list)

    def turns_from_messages(self, messages: Any) -> list[Turn]:
        if not isinstance(messages, list) or not messages:
            raise DocumentError("'messages' must be a list with at least one message.")
        turns: list[Turn] = []
        system: list[ContentPart] = []
        for number, message in enumerate(messages):
            self.remarks += check_message(message, number)
            role = message["role"]
            parts = self._content(message["content"], number)
            if role == "system" and number == 0:  # part of the first user turn
                system = [*parts, "\n"]
                continue
            if system and role != "user":
                raise DocumentError(
                    "A system message belongs to the user's first message, which must follow it "
                    f"(got {role!r})."
                )
            trained = is_trained(message, number)
            if role == "user" and trained:
                self.remarks.append("user turns with weight 1 (only assistant turns are trained)")
            turns.append(Turn(str(role), (*system, *parts), trained is not False))
            system = []
        return turns

    def _content(self, content: Any, number: int) -> list[ContentPart]:
        if isinstance(content, str | int | float) and not isinstance(content, bool):
            return list(_split(self._text(content, number), _IN_MESSAGE))
        if not isinstance(content, list):
            raise DocumentError(
                f"Message {number}: 'content' must be a string or a list of parts (got "
                f"{'null' if content is None else type(content).__name__})."
            )
        parts: list[ContentPart] = []
        for part in content:
            parts += self._part(part, number)
        return parts

    def _part(self, part: Any, number: int) -> Iterator[ContentPart]:
        if not isinstance(part, dict):
            raise DocumentError(
                f"Message {number}: A part is {type(part).__name__} (expected an object with "
                "'type')."
            )
        # Tables have all keys in each row; null means absent.
        present = {name: value for name, value in part.items() if value is not None}
        kind = present.pop("type", None) or next(
            (name for name in ("text", "image", "image_url") if name in part), None
        )
        if kind in _TEXT_PARTS:
            values = [present.pop(name) for name in _TEXT_KEYS if name in present]
            if not values and not any(name in part for name in _TEXT_KEYS):
                raise DocumentError(
                    f"Message {number}: A part of type {kind!r} has no 'text' (got "
                    f"{', '.join(map(repr, part))})."
                )
            if any(value != values[0] for value in values[1:]):
                raise DocumentError(f"Message {number}: A part has two different texts.")
            literal = present.pop("literal", False) is True
            text = self._text(values[0], number) if values else ""
            if literal:
                yield text
            elif text:
                yield from _split(text, _IN_MESSAGE)
            elif values:
                yield text
        elif kind in _IMAGE_PARTS:
            sources = [present.pop(name) for name in _SOURCE_KEYS if name in present]
            if len(sources) > 1:
                raise DocumentError(f"Message {number}: An image part has several sources.")
            yield _image(sources[0], f"Message {number}: The image") if sources else _PLACEHOLDER
        else:
            raise DocumentError(
                f"Message {number}: Unsupported part of type {kind!r} (expected text or image)."
            )
        self.remarks += [f"content part key {name!r} is not read" for name in present
                         if present[name] not in ("", [], {}) and name != "detail"]  # fmt: skip

    def _text(self, value: Any, number: int) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DocumentError(
                f"Message {number}: A text is {type(value).__name__}, not a string."
            )
        self.remarks.append(NUMBERS_READ)
        return str(value)


# --- images -------------------------------------------------------------------------------


def _images_from_row(row: dict[str, Any]) -> tuple[list[ImagePart], tuple[str, ...]]:
    """The images of a row, and the keys that they were read from."""
    if row.get("image_path") or row.get("image_tokens"):
        return _own_images(row), ("image_path", "image_tokens")
    found = [name for name in _IMAGE_KEYS if row.get(name)]
    if len(found) > 1:
        raise DocumentError(
            f"The images are in several keys ({', '.join(map(repr, found))}). Keep one of them."
        )
    if not found:
        return [], ("image_path", "image_tokens")
    (name,) = found
    values = row[name] if isinstance(row[name], list) else [row[name]]
    return [_image(value, repr(name)) for value in values], (name, "image_path", "image_tokens")


def _image(value: Any, where: str) -> ImagePart:
    """An image of another layout: a path or URL, or an object with one.

    A data URL stays a name, too; `open_image` decodes it.
    """
    if isinstance(value, dict):
        value = {name: item for name, item in value.items() if item is not None}
        if value.get("type") == "base64" and isinstance(value.get("data"), str):
            kind = value.get("media_type", "image/png")
            return ImagePart(path=f"data:{kind};base64,{value['data']}")
        if "bytes" in value:
            raise DocumentError(
                f"{where} has an image as bytes, which JSON cannot hold. Save the images as files, "
                "for example with `medley convert --image_folder FOLDER` from the Parquet file."
            )
        names = [value[name] for name in ("path", "url", "image_url", "image") if name in value]
        value = names[0] if len(names) == 1 else value
    if not isinstance(value, str) or not value:
        raise DocumentError(
            f"{where} is not the path of an image (got {shorten(repr(value), 60)})."
        )
    if "\0" in value:
        raise DocumentError(f"{where} contains a NUL character.")
    return ImagePart(path=value.removeprefix("file://"))


def _own_images(row: dict[str, Any]) -> list[ImagePart]:
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


def _insert_images(
    turns: list[Turn], images: list[ImagePart], keys: tuple[str, ...], row: dict[str, Any]
) -> list[Turn]:
    placeholders = sum(part is _PLACEHOLDER for turn in turns for part in turn.parts)
    if placeholders == 0 and keys[0] == "image" and "text" in row and len(images) == 1:  # Anole's
        return [*turns[:-1], replace(turns[-1], parts=(*turns[-1].parts, *images))]
    inline = [p for turn in turns for p in turn.parts if isinstance(p, ImagePart)]
    if placeholders == 0 and inline == images:  # the parts name the same images again
        return turns
    if placeholders != len(images):
        unread = [] if images else list(_unread_image_keys(row, keys))
        hint = ""
        if unread:
            hint = (
                f" {', '.join(map(repr, unread))} is not read: name the images in 'image_path' or "
                "'images'."
            )
        elif images:
            hint = f" The images are those of {keys[0]!r}."
        raise DocumentError(
            f"The number of {IMAGE} placeholders ({placeholders}) differs from the number of "
            f"images ({len(images)}).{hint}"
        )
    remaining = iter(images)
    return [
        replace(t, parts=tuple(next(remaining) if p is _PLACEHOLDER else p for p in t.parts))
        for t in turns
    ]


def _unread_image_keys(row: dict[str, Any], used: frozenset[str] | tuple[str, ...]) -> list[str]:
    """The keys whose name or value looks like that of an image, and that were not read."""
    return [
        name
        for name, value in row.items()
        if name not in used
        and name not in _CONTENT_KEYS
        and (isinstance(value, str | list | dict) and value)
        and (_is_image_name(name) or _looks_like_file(value))
    ]


@lru_cache(1000)
def _is_image_name(name: str) -> bool:
    return _IMAGE_NAME.search(name) is not None


def _looks_like_file(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        return "bytes" in first or "path" in first
    return isinstance(first, str) and (
        first.startswith("data:image/") or _IMAGE_FILE.search(first[-20:]) is not None
    )
