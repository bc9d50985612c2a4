"""LLaVA's and LLaVA-Med's records: instructions, alignment pairs, LLaVA 1.5's mix, questions.

A list of `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`, with any other
values beside. A line break between the picture's mark and the words of its turn belongs to the
format: it is taken off in reading and put there in writing.
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
    relative_image_name,
    repr_short,
    require_path,
    resolve_image_path,
    single_image,
    text_of,
    value_of,
)
from medley.datasets.readers import records_of

TURNS = ("conversations", "conversatons")  # the 500,000 alignment pairs spell it so
ROLES = {"human": "user", "gpt": "assistant"}
_NAMES = {role: name for name, role in ROLES.items()}


def read(record: Any, choices: ConversionConfig) -> Sample:
    key = TURNS[1] if isinstance(record, dict) and TURNS[0] not in record else TURNS[0]
    if isinstance(record, dict) and key not in record:
        raise RecordError(f"{TURNS[0]!r} is missing")
    messages = value_of(record, key)
    if "id" not in record:
        raise RecordError("'id' is missing")
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"{key!r} is {repr_short(messages)}, expected a list of messages")
    remarks: list[str] = []
    picture = None
    if record.get("image") is not None:
        picture = ImagePart(path=resolve_image_path(record["image"], choices.image_folder))
    turns, places = [], 0
    for number, message in enumerate(messages):
        said = value_of(message, "from")
        if not isinstance(said, str) or ROLES.get(said) != ("user", "assistant")[number % 2]:
            raise RecordError(
                f"message {number} is from {repr_short(said)}, expected "
                f"{'human' if number % 2 == 0 else 'gpt'}"
            )
        text = text_of(message, "value", remarks)
        places += text.count(IMAGE) if picture is not None else 0
        turns.append(Turn(ROLES[said], tuple(_parts(text, picture))))
    if picture is not None and places != 1:
        raise RecordError(f"{places} {IMAGE} for one picture")
    try:
        document = Document(tuple(turns))
    except DocumentError as error:
        raise RecordError(str(error)) from error
    return Sample(document, extra_fields(record, key, "image"), tuple(remarks))


def _parts(text: str, picture: ImagePart | None) -> list[ContentPart]:
    if picture is None or IMAGE not in text:
        return [text]
    before, _, after = text.partition(IMAGE)
    if not before:
        after = after.removeprefix("\n")
    elif not after:
        before = before.removesuffix("\n")
    return [part for part in (before, picture, after) if part != ""]


def write(sample: Sample, choices: ConversionConfig) -> dict[str, Any]:
    document = sample.document
    picture = single_image(document.pictures)
    turns = list(document.turns)
    if turns[0].role == "assistant":  # a caption or a text, learned whole
        turns = asked(turns[0], picture, choices)
    record: dict[str, Any] = {"id": sample.fields.get("id")}
    if record["id"] is None:
        raise RecordError("no 'id', which this format needs")
    if picture is not None:
        record["image"] = relative_image_name(require_path(picture), choices.image_folder)
    record["conversations"] = [
        {"from": _NAMES[turn.role], "value": _value(turn, picture)} for turn in turns
    ]
    return {**record, **extra_fields(sample.fields, *record, "image", *TURNS)}


def asked(turn: Turn, picture: ImagePart | None, choices: ConversionConfig) -> list[Turn]:
    """An assistant's turn alone, with --prompt as the question before it."""
    if choices.prompt is None:
        raise RecordError(
            "begins with an answer, and here questions come first: name one by --prompt"
        )
    if picture is not None and turn.parts[0] is not picture:
        raise RecordError("a picture behind words: this format has no pictures in answers")
    own: tuple[ContentPart, ...] = () if picture is None else (picture,)
    rest = turn.parts[len(own) :]
    return [Turn("user", (*own, choices.prompt)), Turn("assistant", rest)]


def _value(turn: Turn, picture: ImagePart | None) -> str:
    words = [part for part in turn.parts if isinstance(part, str)]
    if picture is not None and any(IMAGE in part for part in words):
        raise RecordError(f"the words hold {IMAGE}, which this format would take for a picture")
    place = next((i for i, part in enumerate(turn.parts) if not isinstance(part, str)), None)
    if place is None:
        return "".join(words)
    before = "".join(str(part) for part in turn.parts[:place])
    after = "".join(str(part) for part in turn.parts[place + 1 :])
    if not before:
        return f"{IMAGE}\n{after}" if after else IMAGE
    return f"{before}{IMAGE}{after}" if after else f"{before}\n{IMAGE}"


FORMAT = FormatSpec(
    lambda choices: records_of(choices.path), read, write,
    images_in=lambda path: path.parent,
)  # fmt: skip
