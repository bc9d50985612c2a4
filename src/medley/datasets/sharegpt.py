"""LLaMA-Factory's data sets: `dataset_info.json`, and files in its sharegpt and alpaca forms."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from medley.data.document import ContentPart, Document, DocumentError, ImagePart, Turn
from medley.data.vocabulary import IMAGE
from medley.datasets.base import (
    SPLITS,
    ConversionConfig,
    FormatSpec,
    Found,
    RecordError,
    Sample,
    extra_fields,
    relative_image_name,
    repr_short,
    require_path,
    resolve_image_path,
    split_at_placeholders,
    text_of,
    value_of,
)
from medley.datasets.llava import asked
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.utils.files import read_json

INFO = "dataset_info.json"
# What a data set has where its entry says nothing. An entry that lists columns (or tags) has those
# alone: LLaMA-Factory takes what it leaves out for absent.
COLUMNS: dict[str, str | None] = {
    "messages": "conversations", "prompt": "instruction", "query": "input", "response": "output",
    "images": None, "system": None, "history": None,
}  # fmt: skip
TAGS: dict[str, str | None] = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "system_tag": "system",
}  # fmt: skip
_NEEDED = ("role_tag", "content_tag", "user_tag", "assistant_tag")
WRITTEN = {
    "columns": {"messages": "messages", "images": "images"},
    "tags": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user",
        "assistant_tag": "assistant", "system_tag": "system",
    },
}  # fmt: skip


def layout_of(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of dataset_info.json, with what it leaves out filled in as LLaMA-Factory does."""
    columns, tags = entry.get("columns"), entry.get("tags")
    for given in (columns, tags):
        texts = isinstance(given, dict) and all(isinstance(n, str) for n in given.values())
        if given is not None and not texts:
            raise UserError(
                f"{INFO}: columns and tags are objects of names, not {repr_short(given)}"
            )
    return {
        "formatting": entry.get("formatting", "alpaca"),
        "columns": COLUMNS if columns is None else {n: columns.get(n) for n in COLUMNS},
        "tags": TAGS if tags is None else {n: tags.get(n) for n in TAGS},
    }


@lru_cache(4)
def _entry(choices: ConversionConfig) -> tuple[Path, dict[str, Any]]:
    """The data file, and its layout. Raises UserError for a data set that is not described."""
    folder = choices.path if choices.path.is_dir() else choices.path.parent
    if choices.path.is_file() and choices.path.name != INFO:
        entries = _entries(folder) if (folder / INFO).is_file() else {}
        own = [e for e in entries.values() if e.get("file_name") == choices.path.name]
        return choices.path, layout_of(own[0] if own else {"formatting": "sharegpt"})
    entries = _entries(folder)
    name = choices.dataset or (next(iter(entries)) if len(entries) == 1 else None)
    if name is None or name not in entries:
        raise UserError(
            f"{folder / INFO}: --dataset {name or 'is needed'}; it has {', '.join(entries)}"
        )
    file = entries[name].get("file_name")
    if not isinstance(file, str):
        raise UserError(f"{folder / INFO}: {name} has no file_name (hubs and scripts are not read)")
    return Path(resolve_image_path(file, folder)), layout_of(entries[name])


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    found = read_json(folder / INFO)
    if not isinstance(found, dict) or not all(isinstance(e, dict) for e in found.values()):
        raise UserError(f"{folder / INFO}: expected an object with an entry for each data set")
    return found


def records(choices: ConversionConfig) -> Iterator[Found]:
    path, layout = _entry(choices)
    if layout["formatting"] not in ("sharegpt", "alpaca"):
        raise UserError(f"{path}: formatting {layout['formatting']!r}, expected sharegpt or alpaca")
    missing = [n for n in _NEEDED if layout["tags"][n] is None]
    if layout["formatting"] == "sharegpt" and (missing or not layout["columns"]["messages"]):
        raise UserError(
            f"{path}: {INFO} lists columns or tags without {', '.join(missing) or 'messages'}; "
            "what it does not list is absent for LLaMA-Factory"
        )
    yield from records_of(path)


def read(record: Any, choices: ConversionConfig) -> Sample:
    layout = _entry(choices)[1]
    columns, remarks = layout["columns"], list[str]()
    images = (
        record.get(columns["images"]) if isinstance(record, dict) and columns["images"] else None
    )
    names = [images] if isinstance(images, str) else images or []
    if not isinstance(names, list):
        raise RecordError(f"{columns['images']!r} is {repr_short(names)}, expected a list of paths")
    pictures = [ImagePart(path=resolve_image_path(name, choices.image_folder)) for name in names]
    sharegpt = layout["formatting"] == "sharegpt"
    said = (_messages if sharegpt else _alpaca)(record, layout, remarks)
    pieces = [(role, split_at_placeholders(text, len(pictures))) for role, text in said]
    places = sum(piece is None for _, parts in pieces for piece in parts)
    if places != len(pictures):
        raise RecordError(f"{places} {IMAGE} for {len(pictures)} pictures")
    supply = iter(pictures)
    turns = [
        Turn(role, tuple(next(supply) if piece is None else piece for piece in parts))
        for role, parts in pieces
    ]
    try:
        document = Document(tuple(turns))
    except DocumentError as error:
        raise RecordError(str(error)) from error
    own = ("messages", "images", "system")
    names_used = own if sharegpt else ("prompt", "query", "response", "images", "system", "history")
    used = {columns[name] for name in names_used if columns[name]}
    return Sample(document, extra_fields(record, *used), tuple(remarks))


def _messages(record: Any, layout: dict[str, Any], remarks: list[str]) -> list[tuple[str, str]]:
    columns, tags = layout["columns"], layout["tags"]
    messages = value_of(record, columns["messages"])
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"{columns['messages']!r} is {repr_short(messages)}, expected messages")
    roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant"}
    said = [
        (value_of(m, tags["role_tag"]), text_of(m, tags["content_tag"], remarks)) for m in messages
    ]
    system = record.get(columns["system"]) if columns["system"] else None
    if tags["system_tag"] is not None and said[0][0] == tags["system_tag"]:
        system = said.pop(0)[1]
    if len(said) % 2 or not said:
        raise RecordError(f"{len(said)} messages, expected pairs of a question and its answer")
    for number, (role, _) in enumerate(said):
        if not isinstance(role, str) or roles.get(role) != ("user", "assistant")[number % 2]:
            wanted = tags["user_tag" if number % 2 == 0 else "assistant_tag"]
            raise RecordError(f"message {number} is from {repr_short(role)}, expected {wanted}")
    turns = [(roles[role], text) for role, text in said]
    return [(turns[0][0], f"{system}\n{turns[0][1]}"), *turns[1:]] if system else turns


def _alpaca(record: Any, layout: dict[str, Any], remarks: list[str]) -> list[tuple[str, str]]:
    columns = layout["columns"]
    if not columns["prompt"] or not columns["response"]:
        raise RecordError("the data set's columns name no prompt or no response")
    asked_for = [text_of(record, columns["prompt"], remarks)]
    if columns["query"] and record.get(columns["query"]):
        asked_for.append(text_of(record, columns["query"], remarks))
    turns: list[tuple[str, str]] = []
    history = (record.get(columns["history"]) or []) if columns["history"] else []
    if not isinstance(history, list):
        raise RecordError(f"its history is {repr_short(history)}, expected a list")
    for pair in history:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(t, str) for t in pair)
        ):
            raise RecordError(f"an entry of its history is {repr_short(pair)}, expected two texts")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    turns += [
        ("user", "\n".join(asked_for)), ("assistant", text_of(record, columns["response"], remarks))
    ]  # fmt: skip
    if columns["system"] and record.get(columns["system"]):
        turns[0] = ("user", f"{record[columns['system']]}\n{turns[0][1]}")
    return turns


def write(sample: Sample, choices: ConversionConfig) -> dict[str, Any]:
    turns = list(sample.document.turns)
    pictures = sample.document.pictures
    if turns[0].role == "assistant":
        turns = asked(turns[0], pictures[0] if pictures else None, choices)
    if len(turns) % 2:
        raise RecordError("ends with a question, this format with its answer")
    names = [
        relative_image_name(require_path(picture), choices.image_folder) for picture in pictures
    ]
    messages = [{"role": t.role, "content": _content(t.parts, bool(names))} for t in turns]
    return {
        "messages": messages,
        "images": names,
        **extra_fields(sample.fields, "messages", "images"),
    }


def _content(parts: tuple[ContentPart, ...], pictures: bool) -> str:
    if pictures and any(isinstance(part, str) and IMAGE in part for part in parts):
        raise RecordError(f"the words hold {IMAGE}, which this format would take for a picture")
    return "".join(part if isinstance(part, str) else IMAGE for part in parts)


def beside(name: str, choices: ConversionConfig) -> dict[str, Any]:
    """dataset_info.json for a written file: its entry is called as the file, without its suffix."""
    entry = {"file_name": name, "formatting": "sharegpt", **WRITTEN}
    stem = Path(name).stem
    of_split = choices.dataset and stem in ("all", *SPLITS)
    called = f"{choices.dataset}_{stem}" if of_split else choices.dataset or stem
    return {INFO: {called: entry}}


FORMAT = FormatSpec(
    records, read, write, beside=beside,
    images_in=lambda path: path if path.is_dir() else path.parent,
)  # fmt: skip
