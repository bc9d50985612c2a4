"""Where the images of a record belong in its texts, and keys of records that are not read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from medley.data.document import ContentPart, Document, DocumentError, ImagePart, Turn
from medley.data.message_keys import WEIGHT_KEYS, is_trained
from medley.data.vocabulary import IMAGE
from medley.datasets.base import RecordError, repr_short

IMAGE_KEYS = ("image", "images", "image_path")
SYSTEM_KEYS = ("system", "system_prompt")
OTHER_MEDIA = ("<video>", "<audio>")
_MEDIA_KEY = re.compile(r"(video|audio)s?(_?(path|file|url|name)s?)?", re.IGNORECASE)
_IMAGE_KEY = re.compile(r"image|img|pic|photo|figure|file_?name|media", re.IGNORECASE)
_IMAGE_NAME = re.compile(r".+\.(png|jpe?g|tiff?|bmp|webp|gif|dcm|dicom|nii|nii\.gz)", re.IGNORECASE)
_CONVERSATION_KEYS = {"messages", "conversations", "conversatons", "text", "instruction"}
_PREFERENCE_KEYS = ("chosen", "rejected", "rejected_response")
_TOOL_KEYS = ("tools", "tool_calls", "function_call", "functions")
# Fields that describe a record, or whose text is in its document (`choices`).
_METADATA = {
    "id", "sample_id", "qid", "question_id", "source", "task", "split", "answer_type", "choices",
    "credential", "image_tokens", "image_path",
}  # fmt: skip


def check_image_count(
    placeholders: int, images: int, record: Any, read_keys: Collection[str]
) -> None:
    """Raises RecordError that names the image keys that were not read."""
    if placeholders == images:
        return
    unread = [key for key in record if key not in read_keys and _may_name_images(key, record[key])]
    if unread:
        hint = f" The key {', '.join(map(repr, unread))} is not read."
    elif not images and read_keys:
        hint = f" The record has no image in {' or '.join(map(repr, read_keys))}."
    else:
        hint = "" if images else " This format has no images."
    raise RecordError(
        f"The number of {IMAGE} placeholders differs from the number of images (got "
        f"{placeholders}, expected {images}).{hint}"
    )


def _may_name_images(key: str, value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    is_name = any(isinstance(item, str) and _IMAGE_NAME.fullmatch(item) for item in values)
    has_content = any(isinstance(item, str | dict | bytes) and item for item in values)
    return is_name or (has_content and bool(_IMAGE_KEY.search(str(key))))


def split_at_placeholders(text: str) -> list[str | None]:
    """Splits a text at its `<image>` placeholders and gives None for each of them."""
    pieces: list[str | None] = []
    for number, piece in enumerate(text.split(IMAGE)):
        pieces += [None, piece] if number else [piece]
    return pieces


def place_images(
    texts: Sequence[str],
    images: Sequence[ImagePart],
    record: Any,
    read_keys: Collection[str],
    line_breaks: bool = False,
) -> list[tuple[ContentPart, ...]]:
    """The texts of several turns with their images in place of the placeholders.

    `line_breaks` removes the line break that LLaVA writes between an image and the text of its
    turn. Raises RecordError unless each image has its placeholder.
    """
    check_image_count(sum(text.count(IMAGE) for text in texts), len(images), record, read_keys)
    remaining = iter(images)
    turns = []
    for text in texts:
        pieces = split_at_placeholders(text)
        if line_breaks and len(pieces) > 1:
            _strip_line_breaks(pieces)
        parts = [next(remaining) if piece is None else piece for piece in pieces]
        turns.append(tuple(part for part in parts if part != "") or ("",))
    return turns


def build_document(
    roles: Sequence[str],
    turns: Sequence[tuple[ContentPart, ...]],
    messages: Sequence[dict[str, Any]],
) -> Document:
    """A document from turns, and the messages with the weights of their loss.

    Raises RecordError for turns that do not alternate and for unsupported weights.
    """
    try:
        trained = [is_trained(message, n) is not False for n, message in enumerate(messages)]
        return Document(tuple(map(Turn, roles, turns, trained)))
    except DocumentError as error:
        raise RecordError(str(error)) from error


def weight_of(turn: Turn) -> dict[str, int]:
    """The key of a written message that is not trained on."""
    return {} if turn.trained else {"weight": 0}


def _strip_line_breaks(pieces: list[str | None]) -> None:
    """Removes one line break after each image that begins the turn, before each that ends it."""
    for i in range(2, len(pieces), 2):
        if any(pieces[:i:2]):
            break
        pieces[i] = (pieces[i] or "").removeprefix("\n")
    for i in range(len(pieces) - 3, -1, -2):
        if any(pieces[i + 2 :: 2]):
            break
        pieces[i] = (pieces[i] or "").removesuffix("\n")


def format_turn(parts: Sequence[ContentPart]) -> str:
    """The text of a turn with placeholders and LLaVA's line breaks. Raises RecordError if a text
    contains a placeholder."""
    pieces = [""]
    for part in parts:
        if isinstance(part, str):
            refuse_placeholder(part)
            pieces[-1] += part
        else:
            pieces.append("")
    first = next((i for i, piece in enumerate(pieces) if piece), len(pieces))
    last = next((i for i in range(len(pieces) - 1, -1, -1) if pieces[i]), -1)
    text = pieces[0]
    for number, piece in enumerate(pieces[1:], 1):
        is_trailing = number > last and number > first
        is_leading = number <= first
        text += ("\n" if is_trailing else "") + IMAGE
        has_more = number < len(pieces) - 1 or piece
        text += ("\n" if is_leading and has_more else "") + piece
    return text


def refuse_placeholder(text: str) -> None:
    if IMAGE in text:
        raise RecordError(f"The text contains {IMAGE}, which this format reads as an image.")


# --- keys of records ----------------------------------------------------------------------


def refuse_other_media(record: Any) -> None:
    """Raises RecordError for a conversation with video, audio, tools or rejected answers."""
    if not isinstance(record, dict) or not _CONVERSATION_KEYS & record.keys():
        return
    for key, value in record.items():
        media = _MEDIA_KEY.fullmatch(str(key))
        if media is not None and has_content(value):
            raise media_error(str(key), media[1].lower())
    if "text" in record and "messages" not in record and "conversations" not in record:
        return
    for key in _TOOL_KEYS:
        if has_tools(record.get(key)):
            raise tools_error(key)
    if "kto_tag" in record:
        refuse_undesired(record, "kto_tag")
    if preference := [key for key in _PREFERENCE_KEYS if has_content(record.get(key))]:
        raise ranking_error(preference)


def media_error(key: str, kind: str) -> RecordError:
    return RecordError(f"The record has {kind} ({key!r}), which the model cannot read.")


def ranking_error(keys: Sequence[str]) -> RecordError:
    return RecordError(
        f"The record ranks answers ({', '.join(map(repr, keys))}). Training on rankings is "
        "unsupported; convert the chosen answers to conversations."
    )


def tools_error(key: str) -> RecordError:
    return RecordError(f"The record has tools ({key!r}), and tool calls are unsupported.")


def refuse_undesired(record: dict[str, Any], key: str) -> None:
    """Raises RecordError for a record whose KTO tag says that its answer is undesired."""
    tag = record.get(key)
    if not isinstance(tag, bool):
        raise RecordError(
            f"The KTO tag {key!r} is invalid (got {repr_short(tag)}, expected true or false)."
        )
    if not tag:
        raise RecordError(
            f"The answer is undesired (the KTO tag {key!r} is false), and would be learned as a "
            "good one."
        )


def has_content(value: Any) -> bool:
    """Whether a value is not empty, also not a list of empty values."""
    if isinstance(value, list):
        return any(map(has_content, value))
    if isinstance(value, dict):
        return any(map(has_content, value.values()))
    return value is not None and value is not False and value != ""


def has_tools(value: Any) -> bool:
    """Whether a value defines or calls tools: a list or an object, also as JSON text."""
    if isinstance(value, str):
        text = "".join(value.split())
        return text.startswith(("[", "{")) and text not in ("[]", "{}")
    return isinstance(value, list | dict) and has_content(value)


def unread_message_keys(message: dict[str, Any], *read_keys: str) -> list[str]:
    """Keys with text of a message that are not read. Raises RecordError for tool calls."""
    for key in _TOOL_KEYS:
        if key not in read_keys and has_tools(message.get(key)):
            raise tools_error(key)
    known = (*read_keys, *WEIGHT_KEYS)
    return [key for key in unread_keys(message, message) if key not in known]


def unread_keys(fields: dict[str, Any], record: Any) -> list[str]:
    """Keys of a record that hold text and are among the fields beside the document."""
    return [
        key
        for key, value in fields.items()
        if key not in _METADATA and isinstance(record, dict) and key in record and _has_text(value)
    ]


def _has_text(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and bool(value.strip())


def media_remarks(parts: Iterable[ContentPart]) -> list[str]:
    """Remarks on placeholders of other media in texts of a record without such keys."""
    texts = [part for part in parts if isinstance(part, str)]
    return [f"{tag} read as text" for tag in OTHER_MEDIA if any(tag in text for text in texts)]


def take_system(record: Any, keys: Sequence[str] = SYSTEM_KEYS) -> tuple[str | None, list[str]]:
    """The system text beside a conversation, and the keys that hold it."""
    found = [key for key in keys if isinstance(record.get(key), str) and record[key].strip()]
    if not found:
        return None, []
    return "\n".join(record[key] for key in found), found
