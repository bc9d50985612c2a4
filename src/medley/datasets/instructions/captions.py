"""LLaVA-Med's figure captions, and the prompts that a chat model receives for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import yaml

from medley.datasets.base import RecordError
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.utils.chat_client import Message

PROMPTS = Path(__file__).parent / "prompts"


def read_captions(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Reads captions: a list of records, JSON Lines, or an object with a list per domain.

    Domains are interleaved, one record of each in turn. Raises UserError, with file and position,
    for a record without pair_id, fig_label and fig_caption.
    """
    records = _read_domains(path)
    if records is None:
        records = []
        for where, _, record in records_of(path):
            if isinstance(record, RecordError):
                raise UserError(f"{where}: {record}")
            records.append(_checked_record(where, record))
    if not records:
        raise UserError(f"{path}: The file contains no captions.")
    names = [record["pair_id"] for record in records]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: Duplicate pair_id.")
    return list(islice(records, limit))


def _read_domains(path: Path) -> list[dict[str, Any]] | None:
    """The records of an object with a list per domain, or None for another layout."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        value = json.loads(text) if text.lstrip().startswith("{") else None
    except FileNotFoundError as error:
        raise UserError(f"{path}: File not found.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None  # JSON Lines also start with a brace.
    if value is None or not all(isinstance(records, list) for records in value.values()):
        return None
    lists = [
        [_checked_record(f"{path}: {domain}, record {i}", record) for i, record in enumerate(own)]
        for domain, own in value.items()
    ]
    return [record for record in chain(*zip_longest(*lists)) if record is not None]


def _checked_record(where: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: Expected an object.")
    for key in ("pair_id", "fig_label", "fig_caption"):
        if not isinstance(record.get(key), str):
            raise UserError(f"{where}: {key} must be a string (got {record.get(key)!r}).")
    mentions = record.get("in_text_mention")
    if mentions is not None and not (
        isinstance(mentions, list) and all(isinstance(each, str | dict) for each in mentions)
    ):
        raise UserError(f"{where}: in_text_mention must be a list of strings (got {mentions!r}).")
    return record


def figure_context(record: dict[str, Any], mentions: bool) -> str:
    """The text about a figure: label, caption and, with `mentions`, the article's sentences."""
    context = f"Figure Caption:\n{record['fig_label']}: {record['fig_caption']}"
    sentences = record.get("in_text_mention") if mentions else None
    if not sentences:
        return context
    lines = [s if isinstance(s, str) else str(s.get("tokens", "")) for s in sentences]
    return context + "\n\nFigure Context:" + "".join(f"\n\t- {line}" for line in lines)


@dataclass(frozen=True)
class Prompts:
    """A system prompt and few-shot examples as pairs (context, reply)."""

    system: str
    samples: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, path: Path) -> Prompts:
        """Reads a YAML file of `system` and `samples`, each with `context` and `reply`."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            samples = [(str(s["context"]), str(s["reply"])) for s in content.get("samples") or []]
            return cls(str(content["system"]), tuple(samples))
        except FileNotFoundError as error:
            raise UserError(f"{path}: File not found.") from error
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: Expected the keys system and samples ({error}).") from error

    def messages(self, context: str) -> list[Message]:
        """The messages of a request about one context."""
        return [{"role": role, "content": text} for role, text in self._turns(context)]

    def _turns(self, context: str) -> Iterator[tuple[str, str]]:
        yield "system", self.system
        for question, reply in self.samples:
            yield "user", question
            yield "assistant", reply
        yield "user", context


def format_conversation(turns: Sequence[dict[str, str]]) -> str:
    """LLaVA's turns -> the text format that the chat model writes."""
    names = {"human": "User", "gpt": "Assistant"}
    return "\n\n".join(f"{names[turn['from']]}: {turn['value']}" for turn in turns)
