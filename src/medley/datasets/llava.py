"""Records of LLaVA and LLaVA-Med: instructions, alignment pairs, LLaVA 1.5's mix, questions.

The format is a list of
`{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}` with any other fields; a
list of images as LLaVA-NeXT writes it. The line break between the `<image>` placeholder and the
text of its message belongs to the format: `read` removes it and `write` adds it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from medley.data.document import ContentPart, ImagePart, Turn
from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RecordError,
    Sample,
    extra_fields,
    get_text,
    get_value,
    relative_image_name,
    repr_short,
    require_path,
)
from medley.datasets.embedded_images import read_images
from medley.datasets.input_files import records_at
from medley.datasets.placement import (
    IMAGE_KEYS,
    SYSTEM_KEYS,
    build_document,
    format_turn,
    has_content,
    place_images,
    refuse_placeholder,
    take_system,
    unread_message_keys,
    weight_of,
)

# The 500,000 alignment pairs of LLaVA-Med have the second spelling.
CONVERSATION_KEYS = ("conversations", "conversatons")
ID_KEYS = ("id", "sample_id", "question_id")
ROLES = {"human": "user", "gpt": "assistant"}
_SENDERS = {role: sender for sender, role in ROLES.items()}


def read(record: Any, config: ConversionConfig) -> Sample:
    spelling, misspelling = CONVERSATION_KEYS
    key = misspelling if isinstance(record, dict) and spelling not in record else spelling
    if isinstance(record, dict) and key not in record:
        raise RecordError(f"{spelling!r} is missing.")
    messages = get_value(record, key)
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"{key!r} is not a list of messages (got {repr_short(messages)}).")
    remarks: list[str] = []
    system, system_keys = take_system(record)
    if len(messages) > 1 and isinstance(messages[0], dict) and messages[0].get("from") == "system":
        system = get_text(messages[0], "value", remarks)
        messages = messages[1:]
    texts: list[str] = []
    roles: list[str] = []
    for number, message in enumerate(messages):
        sender = get_value(message, "from")
        if not isinstance(sender, str) or ROLES.get(sender) != ("user", "assistant")[number % 2]:
            raise RecordError(
                f"Message {number} has an invalid sender (got {repr_short(sender)}, expected "
                f"{'human' if number % 2 == 0 else 'gpt'})."
            )
        texts.append(get_text(message, "value", remarks))
        roles.append(ROLES[sender])
        unread = unread_message_keys(message, "from", "value")
        remarks += [f"message key {name!r} not read" for name in unread]
    image_key, image_parts = find_images(record, config, remarks)
    turns = place_images(texts, image_parts, record, IMAGE_KEYS, line_breaks=True)
    if system is not None:
        refuse_placeholder(system)
        turns[0] = (f"{system}\n", *turns[0])
    document = build_document(roles, turns, messages)
    fields = extra_fields(record, *CONVERSATION_KEYS, *system_keys, image_key, "image")
    if "id" not in fields and (identifier := identifier_of(record)) is not None:
        fields = {"id": identifier, **extra_fields(fields, *ID_KEYS)}
    return Sample(document, fields, tuple(remarks))


def identifier_of(record: dict[str, Any]) -> Any:
    """The id of a record, under any of its names; None without one."""
    return next((record[key] for key in ID_KEYS if record.get(key) is not None), None)


def find_images(
    record: dict[str, Any], config: ConversionConfig, remarks: list[str]
) -> tuple[str, list[ImagePart]]:
    """The key of a record that names its images, and the images.

    Raises RecordError for a record with several such keys.
    """
    keys = [key for key in IMAGE_KEYS if has_content(record.get(key))]
    if len(keys) > 1 and any(record[key] != record[keys[0]] for key in keys):
        raise RecordError(f"The record names its images in {' and '.join(map(repr, keys))}.")
    key = keys[0] if keys else IMAGE_KEYS[0]
    return key, read_images(record.get(key), identifier_of(record), config, remarks)


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    turns = list(sample.document.turns)
    image_parts = sample.document.images
    if turns[0].role == "assistant":  # a caption or a text without a question
        turns = add_prompt(turns[0], config)
    record: dict[str, Any] = {"id": sample.fields.get("id")}
    if record["id"] is None:
        raise RecordError("'id' is missing; this format requires it.")
    names = [relative_image_name(require_path(i), config.image_folder) for i in image_parts]
    if names:
        record["image"] = names[0] if len(names) == 1 else names
    record["conversations"] = [
        {"from": _SENDERS[turn.role], "value": format_turn(turn.parts), **weight_of(turn)}
        for turn in turns
    ]
    unused = (*record, *IMAGE_KEYS, *CONVERSATION_KEYS, *SYSTEM_KEYS)
    return {**record, **extra_fields(sample.fields, *unused)}


def add_prompt(turn: Turn, config: ConversionConfig) -> list[Turn]:
    """A single assistant turn -> a user turn (the image and --prompt) and the assistant turn."""
    if config.prompt is None:
        raise RecordError(
            "The document begins with an assistant turn; this format requires a question before "
            "it. Set --prompt."
        )
    image: tuple[ContentPart, ...] = tuple(p for p in turn.parts[:1] if isinstance(p, ImagePart))
    rest = turn.parts[len(image) :]
    if any(isinstance(part, ImagePart) for part in rest):
        raise RecordError("An image follows text; this format cannot represent images in answers.")
    return [Turn("user", (*image, config.prompt)), replace(turn, parts=rest)]


FORMAT = FormatSpec(
    lambda config: records_at(config.path), read, write,
    default_image_folder=lambda path: path if path.is_dir() else path.parent,
)  # fmt: skip
