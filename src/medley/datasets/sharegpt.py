"""LLaMA-Factory's datasets: `dataset_info.json`, and files in its sharegpt and alpaca formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from medley.data.document import ContentPart
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
)
from medley.datasets.embedded_images import read_images
from medley.datasets.llava import add_prompt
from medley.datasets.placement import (
    IMAGE_KEYS,
    SYSTEM_KEYS,
    build_document,
    has_content,
    has_tools,
    media_error,
    place_images,
    ranking_error,
    refuse_placeholder,
    refuse_undesired,
    tools_error,
    unread_message_keys,
    weight_of,
)
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.utils.files import read_json

INFO = "dataset_info.json"
# LLaMA-Factory's defaults. In an entry that lists columns (or tags), unlisted ones are absent.
DEFAULT_COLUMNS: dict[str, str | None] = {
    "messages": "conversations", "prompt": "instruction", "query": "input", "response": "output",
    "images": None, "system": None, "history": None, "tools": None, "videos": None,
    "audios": None, "chosen": None, "rejected": None, "kto_tag": None,
}  # fmt: skip
DEFAULT_TAGS: dict[str, str | None] = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "system_tag": "system",
}  # fmt: skip
_REQUIRED_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag")
_MESSAGE_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user",
    "assistant_tag": "assistant", "system_tag": "system",
}  # fmt: skip
_TOOL_ROLES = ("function_call", "observation", "tool", "function")
_WRITTEN_LAYOUT = {
    "columns": {"messages": "messages", "images": "images"},
    "tags": _MESSAGE_TAGS,
}


@dataclass(frozen=True)
class Layout:
    """An entry of dataset_info.json: format, names of the columns, and tags of the messages."""

    formatting: str
    columns: Mapping[str, str | None]
    tags: Mapping[str, str | None]
    ranking: bool = False
    has_entry: bool = True


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
        entry.get("ranking") is True,
    )


@lru_cache(4)
def _find_dataset(config: ConversionConfig) -> tuple[Path, Layout]:
    """The data file and its layout. Raises UserError for a dataset without an entry."""
    folder = config.path if config.path.is_dir() else config.path.parent
    if config.path.is_file() and config.path.name != INFO:
        entries = _read_entries(folder) if (folder / INFO).is_file() else {}
        matching = [e for e in entries.values() if e.get("file_name") == config.path.name]
        if config.dataset in entries and entries[config.dataset] in matching:
            matching = [entries[config.dataset]]
        layouts = [parse_layout(entry) for entry in matching]
        if any(layout != layouts[0] for layout in layouts):
            raise UserError(
                f"{folder / INFO}: Several entries describe {config.path.name} differently. Name "
                "one with --dataset."
            )
        if layouts:
            return config.path, layouts[0]
        return config.path, replace(parse_layout({"formatting": "sharegpt"}), has_entry=False)
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
    if layout.ranking:
        raise UserError(
            f"{path}: {INFO} says that the dataset ranks answers (ranking: true). Training on "
            "rankings is unsupported; convert the chosen answers to conversations."
        )
    missing = [n for n in _REQUIRED_TAGS if layout.tags[n] is None]
    if layout.formatting == "sharegpt" and (missing or not layout.columns["messages"]):
        raise UserError(
            f"{path}: {INFO} lists columns or tags without {', '.join(missing) or 'messages'}. "
            "LLaMA-Factory treats unlisted ones as absent."
        )
    yield from records_of(path)


def _layout_of(record: dict[str, Any], layout: Layout) -> Layout:
    """The layout of a record: of its file's entry, else the one that its keys show."""
    if layout.has_entry or "conversations" in record:
        return layout
    if "messages" in record:
        columns = {**layout.columns, "messages": "messages"}
        return replace(layout, columns=columns, tags=_MESSAGE_TAGS)
    if "instruction" in record and "output" in record:
        return replace(layout, formatting="alpaca")
    keys = ", ".join(list(record)[:10])
    raise RecordError(
        f"The record has none of conversations, messages, or instruction and output (got {keys}). "
        "Use --from documents for texts."
    )


def _add_unlisted(
    record: dict[str, Any], layout: Layout, remarks: list[str]
) -> dict[str, str | None]:
    """The columns, with the usual names of images and system texts that the entry leaves out."""
    columns = dict(layout.columns)
    used = {name for name in columns.values() if name}
    for column, names in (("images", IMAGE_KEYS[1:] + IMAGE_KEYS[:1]), ("system", SYSTEM_KEYS)):
        found = [n for n in names if n not in used and has_content(record.get(n))]
        if columns[column] is None and found:
            columns[column] = found[0]
            if layout.has_entry:
                remarks.append(f"{found[0]!r} read although {INFO} does not list it")
    return columns


def read(record: Any, config: ConversionConfig) -> Sample:
    file_layout = _find_dataset(config)[1]
    if not isinstance(record, dict):
        raise RecordError(f"The record is not an object (got {repr_short(record)}).")
    remarks = list[str]()
    layout = _layout_of(record, file_layout)
    layout = replace(layout, columns=_add_unlisted(record, layout, remarks))
    columns = layout.columns
    _refuse_unsupported(record, columns)
    image_key = columns["images"]
    identifier = record.get("id")
    images = record.get(image_key) if image_key else None
    if images is not None and not isinstance(images, list | str | dict | bytes):
        raise RecordError(f"{image_key!r} is not a list of image paths (got {repr_short(images)}).")
    image_parts = read_images(images, identifier, config, remarks)
    is_sharegpt = layout.formatting == "sharegpt"
    messages = (_sharegpt_messages if is_sharegpt else _alpaca_messages)(record, layout, remarks)
    read_keys = [image_key] if image_key else [IMAGE_KEYS[1]]
    turns = place_images([text for _, text, _ in messages], image_parts, record, read_keys)
    document = build_document([role for role, _, _ in messages], turns, [w for _, _, w in messages])
    used = ["messages", "images", "system", "tools", "videos", "audios", "kto_tag"]
    if not is_sharegpt:
        used = ["prompt", "query", "response", "history", *used[1:]]
    used_columns = {name for key in used if (name := columns[key])}
    return Sample(document, extra_fields(record, *used_columns), tuple(remarks))


def _refuse_unsupported(record: dict[str, Any], columns: Mapping[str, str | None]) -> None:
    """Raises RecordError for columns of the entry that conversations with images do not have."""
    for column in ("videos", "audios"):
        if (name := columns[column]) and has_content(record.get(name)):
            raise media_error(name, column.removesuffix("s"))
    if (name := columns["tools"]) and has_tools(record.get(name)):
        raise tools_error(name)
    if name := columns["kto_tag"]:
        refuse_undesired(record, name)
    ranked = [n for c in ("chosen", "rejected") if (n := columns[c]) and has_content(record.get(n))]
    if ranked:
        raise ranking_error(ranked)


Message = tuple[str, str, dict[str, Any]]  # role, text, and the message with its weight


def _sharegpt_messages(record: Any, layout: Layout, remarks: list[str]) -> list[Message]:
    """The messages; a system text is prepended to the first user message."""
    columns, tags = layout.columns, layout.tags
    messages = get_value(record, _required(columns["messages"]))
    if not isinstance(messages, list) or not messages:
        raise RecordError(
            f"{columns['messages']!r} is not a list of messages (got {repr_short(messages)})."
        )
    role_key, text_key = _required(tags["role_tag"]), _required(tags["content_tag"])
    roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant"}
    texts = [(get_value(m, role_key), get_text(m, text_key, remarks)) for m in messages]
    for message in messages:
        unread = unread_message_keys(message, role_key, text_key)
        remarks += [f"message key {name!r} not read" for name in unread]
    system = record.get(columns["system"]) if columns["system"] else None
    if tags["system_tag"] is not None and texts[0][0] == tags["system_tag"]:
        system = texts.pop(0)[1]
        messages = messages[1:]
    if tools := [role for role, _ in texts if role in _TOOL_ROLES and role not in roles]:
        raise RecordError(f"The record has tool calls (role {tools[0]!r}), which are unsupported.")
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
    turns = [(roles[role], text, m) for (role, text), m in zip(texts, messages, strict=True)]
    return _prepend_system(turns, system)


def _prepend_system(turns: list[Message], system: Any) -> list[Message]:
    if not system:
        return turns
    if not isinstance(system, str):
        raise RecordError(f"The system text is not a string (got {repr_short(system)}).")
    role, text, weight = turns[0]
    return [(role, f"{system}\n{text}", weight), *turns[1:]]


def _required(name: str | None) -> str:
    if name is None:
        raise RecordError(f"{INFO} lists columns or tags without one that messages require.")
    return name


def _alpaca_messages(record: Any, layout: Layout, remarks: list[str]) -> list[Message]:
    """The messages of the history, the prompt and the response.

    A dataset whose entry lists only a prompt is a text to learn as a whole (pretraining).
    """
    columns = layout.columns
    prompt, response = columns["prompt"], columns["response"]
    if not prompt:
        raise RecordError(f"The columns in {INFO} contain no prompt.")
    if not response:
        remarks.append("texts without an answer, learned as a whole")
        return [("assistant", get_text(record, prompt, remarks), {})]
    if isinstance(record.get(response), list):
        raise ranking_error([response])
    prompt_texts = [get_text(record, prompt, remarks)]
    if columns["query"] and record.get(columns["query"]):
        prompt_texts.append(get_text(record, columns["query"], remarks))
    turns: list[Message] = []
    history = (record.get(columns["history"]) or []) if columns["history"] else []
    if not isinstance(history, list):
        raise RecordError(f"The history is not a list (got {repr_short(history)}).")
    for pair in history:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise RecordError(
                f"An entry of the history is not a pair of strings (got {repr_short(pair)})."
            )
        turns += [("user", pair[0], {}), ("assistant", pair[1], {})]
    answer = get_text(record, response, remarks)
    turns += [("user", "\n".join(prompt_texts), {}), ("assistant", answer, {})]
    return _prepend_system(turns, record.get(columns["system"]) if columns["system"] else None)


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    turns = list(sample.document.turns)
    image_parts = sample.document.images
    if turns[0].role == "assistant":
        turns = add_prompt(turns[0], config)
    if len(turns) % 2:
        raise RecordError("The document ends with a question; this format requires an answer.")
    names = [relative_image_name(require_path(i), config.image_folder) for i in image_parts]
    messages = [{"role": t.role, "content": _format_parts(t.parts), **weight_of(t)} for t in turns]
    record: dict[str, Any] = {"messages": messages, "images": names}
    return {**record, **extra_fields(sample.fields, *record)}


def _format_parts(parts: tuple[ContentPart, ...]) -> str:
    for part in parts:
        if isinstance(part, str):
            refuse_placeholder(part)
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
