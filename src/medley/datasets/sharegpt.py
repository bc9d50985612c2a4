"""LLaMA-Factory's datasets: `dataset_info.json`, and files in its sharegpt and alpaca formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from medley.data.document import ContentPart, Document, DocumentError, ImagePart, Turn
from medley.data.vocabulary import IMAGE
from medley.datasets.base import (
    SPLITS,
    ConversionConfig,
    FormatSpec,
    RawRecord,
    RecordError,
    Sample,
    extra_fields,
    get_text,
    get_value,
    relative_image_name,
    repr_short,
    require_path,
    resolve_image_path,
    split_at_placeholders,
)
from medley.datasets.llava import add_prompt
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.utils.files import read_json

INFO = "dataset_info.json"
# LLaMA-Factory's defaults. In an entry that lists columns (or tags), unlisted ones are absent.
DEFAULT_COLUMNS: dict[str, str | None] = {
    "messages": "conversations", "prompt": "instruction", "query": "input", "response": "output",
    "images": None, "system": None, "history": None,
}  # fmt: skip
DEFAULT_TAGS: dict[str, str | None] = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "system_tag": "system",
}  # fmt: skip
_REQUIRED_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag")
_WRITTEN_LAYOUT = {
    "columns": {"messages": "messages", "images": "images"},
    "tags": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user",
        "assistant_tag": "assistant", "system_tag": "system",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """An entry of dataset_info.json: format, names of the columns, and tags of the messages."""

    formatting: str
    columns: Mapping[str, str | None]
    tags: Mapping[str, str | None]


def parse_layout(entry: dict[str, Any]) -> Layout:
    """The layout of an entry, with LLaMA-Factory's defaults."""
    columns, tags = entry.get("columns"), entry.get("tags")
    for names in (columns, tags):
        is_valid = isinstance(names, dict) and all(isinstance(n, str) for n in names.values())
        if names is not None and not is_valid:
            raise UserError(
                f"{INFO}: columns or tags are not an object of names (got {repr_short(names)})."
            )
    return Layout(
        entry.get("formatting", "alpaca"),
        DEFAULT_COLUMNS if columns is None else {n: columns.get(n) for n in DEFAULT_COLUMNS},
        DEFAULT_TAGS if tags is None else {n: tags.get(n) for n in DEFAULT_TAGS},
    )


@lru_cache(4)
def _find_dataset(config: ConversionConfig) -> tuple[Path, Layout]:
    """The data file and its layout. Raises UserError for a dataset without an entry."""
    folder = config.path if config.path.is_dir() else config.path.parent
    if config.path.is_file() and config.path.name != INFO:
        entries = _read_entries(folder) if (folder / INFO).is_file() else {}
        matching = [e for e in entries.values() if e.get("file_name") == config.path.name]
        return config.path, parse_layout(matching[0] if matching else {"formatting": "sharegpt"})
    entries = _read_entries(folder)
    name = config.dataset or (next(iter(entries)) if len(entries) == 1 else None)
    if name is None or name not in entries:
        problem = "--dataset is missing" if name is None else f"There is no dataset {name}"
        raise UserError(f"{folder / INFO}: {problem} (expected one of {', '.join(entries)}).")
    file = entries[name].get("file_name")
    if not isinstance(file, str):
        raise UserError(
            f"{folder / INFO}: {name} has no file_name. Datasets on a hub and loading scripts are "
            "unsupported."
        )
    return Path(resolve_image_path(file, folder)), parse_layout(entries[name])


def _read_entries(folder: Path) -> dict[str, dict[str, Any]]:
    entries = read_json(folder / INFO)
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise UserError(f"{folder / INFO}: Expected an object with one entry per dataset.")
    return entries


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    path, layout = _find_dataset(config)
    if layout.formatting not in ("sharegpt", "alpaca"):
        raise UserError(
            f"{path}: The formatting is unsupported (got {layout.formatting!r}, expected sharegpt "
            "or alpaca)."
        )
    missing = [n for n in _REQUIRED_TAGS if layout.tags[n] is None]
    if layout.formatting == "sharegpt" and (missing or not layout.columns["messages"]):
        raise UserError(
            f"{path}: {INFO} lists columns or tags without {', '.join(missing) or 'messages'}. "
            "LLaMA-Factory treats unlisted ones as absent."
        )
    yield from records_of(path)


def read(record: Any, config: ConversionConfig) -> Sample:
    layout = _find_dataset(config)[1]
    columns, remarks = layout.columns, list[str]()
    images = (
        record.get(columns["images"]) if isinstance(record, dict) and columns["images"] else None
    )
    names = [images] if isinstance(images, str) else images or []
    if not isinstance(names, list):
        raise RecordError(
            f"{columns['images']!r} is not a list of image paths (got {repr_short(names)})."
        )
    image_parts = [ImagePart(path=resolve_image_path(name, config.image_folder)) for name in names]
    is_sharegpt = layout.formatting == "sharegpt"
    messages = (_sharegpt_messages if is_sharegpt else _alpaca_messages)(record, layout, remarks)
    pieces = [(role, split_at_placeholders(text, len(image_parts))) for role, text in messages]
    placeholders = sum(piece is None for _, parts in pieces for piece in parts)
    if placeholders != len(image_parts):
        raise RecordError(
            f"The number of {IMAGE} placeholders differs from the number of images (got "
            f"{placeholders}, expected {len(image_parts)})."
        )
    remaining = iter(image_parts)
    turns = [
        Turn(role, tuple(next(remaining) if piece is None else piece for piece in parts))
        for role, parts in pieces
    ]
    try:
        document = Document(tuple(turns))
    except DocumentError as error:
        raise RecordError(str(error)) from error
    used = ["messages", "images", "system"]
    if not is_sharegpt:
        used = ["prompt", "query", "response", "images", "system", "history"]
    used_columns = {name for key in used if (name := columns[key])}
    return Sample(document, extra_fields(record, *used_columns), tuple(remarks))


def _sharegpt_messages(record: Any, layout: Layout, remarks: list[str]) -> list[tuple[str, str]]:
    """(role, text) of each message; a system text is prepended to the first user message."""
    columns, tags = layout.columns, layout.tags
    messages = get_value(record, _required(columns["messages"]))
    if not isinstance(messages, list) or not messages:
        raise RecordError(
            f"{columns['messages']!r} is not a list of messages (got {repr_short(messages)})."
        )
    role_key, text_key = _required(tags["role_tag"]), _required(tags["content_tag"])
    roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant"}
    texts = [(get_value(m, role_key), get_text(m, text_key, remarks)) for m in messages]
    system = record.get(columns["system"]) if columns["system"] else None
    if tags["system_tag"] is not None and texts[0][0] == tags["system_tag"]:
        system = texts.pop(0)[1]
    if len(texts) % 2 or not texts:
        raise RecordError(
            f"The messages are not pairs of a question and its answer (got {len(texts)} messages)."
        )
    for number, (role, _) in enumerate(texts):
        if not isinstance(role, str) or roles.get(role) != ("user", "assistant")[number % 2]:
            expected = tags["user_tag" if number % 2 == 0 else "assistant_tag"]
            raise RecordError(
                f"Message {number} has an invalid role (got {repr_short(role)}, expected "
                f"{expected})."
            )
    turns = [(roles[role], text) for role, text in texts]
    return [(turns[0][0], f"{system}\n{turns[0][1]}"), *turns[1:]] if system else turns


def _required(name: str | None) -> str:
    if name is None:
        raise RecordError(f"{INFO} lists columns or tags without one that messages require.")
    return name


def _alpaca_messages(record: Any, layout: Layout, remarks: list[str]) -> list[tuple[str, str]]:
    """(role, text) of the history, the prompt and the response."""
    columns = layout.columns
    prompt, response = columns["prompt"], columns["response"]
    if not prompt or not response:
        raise RecordError(f"The columns in {INFO} contain no prompt or no response.")
    prompt_texts = [get_text(record, prompt, remarks)]
    if columns["query"] and record.get(columns["query"]):
        prompt_texts.append(get_text(record, columns["query"], remarks))
    turns: list[tuple[str, str]] = []
    history = (record.get(columns["history"]) or []) if columns["history"] else []
    if not isinstance(history, list):
        raise RecordError(f"The history is not a list (got {repr_short(history)}).")
    for pair in history:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise RecordError(
                f"An entry of the history is not a pair of strings (got {repr_short(pair)})."
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    turns += [
        ("user", "\n".join(prompt_texts)), ("assistant", get_text(record, response, remarks)),
    ]  # fmt: skip
    if columns["system"] and record.get(columns["system"]):
        turns[0] = ("user", f"{record[columns['system']]}\n{turns[0][1]}")
    return turns


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    turns = list(sample.document.turns)
    image_parts = sample.document.images
    if turns[0].role == "assistant":
        turns = add_prompt(turns[0], image_parts[0] if image_parts else None, config)
    if len(turns) % 2:
        raise RecordError("The document ends with a question; this format requires an answer.")
    names = [relative_image_name(require_path(i), config.image_folder) for i in image_parts]
    messages = [{"role": t.role, "content": _format_parts(t.parts, bool(names))} for t in turns]
    record: dict[str, Any] = {"messages": messages, "images": names}
    return {**record, **extra_fields(sample.fields, *record)}


def _format_parts(parts: tuple[ContentPart, ...], has_images: bool) -> str:
    if has_images and any(isinstance(part, str) and IMAGE in part for part in parts):
        raise RecordError(f"The text contains {IMAGE}, which this format reads as an image.")
    return "".join(part if isinstance(part, str) else IMAGE for part in parts)


def sidecar_files(name: str, config: ConversionConfig) -> dict[str, dict[str, Any]]:
    """dataset_info.json for a written file; its entry is named after the file or --dataset."""
    entry = {"file_name": name, "formatting": "sharegpt", **_WRITTEN_LAYOUT}
    stem = Path(name).stem
    is_split = config.dataset and stem in ("all", *SPLITS)
    entry_name = f"{config.dataset}_{stem}" if is_split else config.dataset or stem
    return {INFO: {entry_name: entry}}


FORMAT = FormatSpec(
    records, read, write, sidecar_files=sidecar_files,
    default_image_folder=lambda path: path if path.is_dir() else path.parent,
)  # fmt: skip
