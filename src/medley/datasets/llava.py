"""Records of LLaVA and LLaVA-Med: instructions, alignment pairs, LLaVA 1.5's mix, questions.

The format is a list of
`{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}` with any other fields. The
line break between the `<image>` placeholder and the text of its message belongs to the format:
`read` removes it and `write` adds it.
"""

from __future__ import annotations

from typing import Any

from medley.data.document import ContentPart, Document, DocumentError, ImagePart, Turn
from medley.data.vocabulary import IMAGE
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
    resolve_image_path,
    single_image,
)
from medley.datasets.readers import records_of

# The 500,000 alignment pairs of LLaVA-Med have the second spelling.
CONVERSATION_KEYS = ("conversations", "conversatons")
ROLES = {"human": "user", "gpt": "assistant"}
_SENDERS = {role: sender for sender, role in ROLES.items()}


def read(record: Any, config: ConversionConfig) -> Sample:
    spelling, misspelling = CONVERSATION_KEYS
    key = misspelling if isinstance(record, dict) and spelling not in record else spelling
    if isinstance(record, dict) and key not in record:
        raise RecordError(f"{spelling!r} is missing.")
    messages = get_value(record, key)
    if "id" not in record:
        raise RecordError("'id' is missing.")
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"{key!r} is not a list of messages (got {repr_short(messages)}).")
    remarks: list[str] = []
    image_part = None
    if record.get("image") is not None:
        image_part = ImagePart(path=resolve_image_path(record["image"], config.image_folder))
    turns, placeholders = [], 0
    for number, message in enumerate(messages):
        sender = get_value(message, "from")
        if not isinstance(sender, str) or ROLES.get(sender) != ("user", "assistant")[number % 2]:
            raise RecordError(
                f"Message {number} has an invalid sender (got {repr_short(sender)}, expected "
                f"{'human' if number % 2 == 0 else 'gpt'})."
            )
        text = get_text(message, "value", remarks)
        placeholders += text.count(IMAGE) if image_part is not None else 0
        turns.append(Turn(ROLES[sender], tuple(_parse_parts(text, image_part))))
    if image_part is not None and placeholders != 1:
        raise RecordError(
            f"The number of {IMAGE} placeholders is invalid (got {placeholders}, expected 1 for "
            "the record's image)."
        )
    try:
        document = Document(tuple(turns))
    except DocumentError as error:
        raise RecordError(str(error)) from error
    return Sample(document, extra_fields(record, key, "image"), tuple(remarks))


def _parse_parts(text: str, image_part: ImagePart | None) -> list[ContentPart]:
    if image_part is None or IMAGE not in text:
        return [text]
    before, _, after = text.partition(IMAGE)
    if not before:
        after = after.removeprefix("\n")
    elif not after:
        before = before.removesuffix("\n")
    return [part for part in (before, image_part, after) if part != ""]


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    document = sample.document
    image_part = single_image(document.images)
    turns = list(document.turns)
    if turns[0].role == "assistant":  # a caption or a text without a question
        turns = add_prompt(turns[0], image_part, config)
    record: dict[str, Any] = {"id": sample.fields.get("id")}
    if record["id"] is None:
        raise RecordError("'id' is missing; this format requires it.")
    if image_part is not None:
        record["image"] = relative_image_name(require_path(image_part), config.image_folder)
    record["conversations"] = [
        {"from": _SENDERS[turn.role], "value": _format_parts(turn, image_part)} for turn in turns
    ]
    return {**record, **extra_fields(sample.fields, *record, "image", *CONVERSATION_KEYS)}


def add_prompt(turn: Turn, image_part: ImagePart | None, config: ConversionConfig) -> list[Turn]:
    """A single assistant turn -> a user turn (the image and --prompt) and the assistant turn."""
    if config.prompt is None:
        raise RecordError(
            "The document begins with an assistant turn; this format requires a question before "
            "it. Set --prompt."
        )
    if image_part is not None and turn.parts[0] is not image_part:
        raise RecordError("An image follows text; this format cannot represent images in answers.")
    image: tuple[ContentPart, ...] = () if image_part is None else (image_part,)
    rest = turn.parts[len(image) :]
    return [Turn("user", (*image, config.prompt)), Turn("assistant", rest)]


def _format_parts(turn: Turn, image_part: ImagePart | None) -> str:
    texts = [part for part in turn.parts if isinstance(part, str)]
    if image_part is not None and any(IMAGE in text for text in texts):
        raise RecordError(f"The text contains {IMAGE}, which this format reads as an image.")
    position = next((i for i, part in enumerate(turn.parts) if not isinstance(part, str)), None)
    if position is None:
        return "".join(texts)
    before = "".join(str(part) for part in turn.parts[:position])
    after = "".join(str(part) for part in turn.parts[position + 1 :])
    if not before:
        return f"{IMAGE}\n{after}" if after else IMAGE
    return f"{before}{IMAGE}{after}" if after else f"{before}\n{IMAGE}"


FORMAT = FormatSpec(
    lambda config: records_of(config.path), read, write,
    default_image_folder=lambda path: path.parent,
)  # fmt: skip
