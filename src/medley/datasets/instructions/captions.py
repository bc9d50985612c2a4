"""Figure captions, and what is asked about them."""

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
    """LLaVA-Med's captions: an object of domains with a list of records each (taken in turn, one of
    each domain), or a list of records, or JSON lines.

    Raises UserError, with its place, for a record without pair_id, fig_label and fig_caption.
    """
    records = _by_domain(path)
    if records is None:
        records = []
        for place, _, record in records_of(path):
            if isinstance(record, RecordError):
                raise UserError(f"{place}: {record}")
            records.append(_checked(place, record))
    if not records:
        raise UserError(f"{path}: no captions in it")
    names = [record["pair_id"] for record in records]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: a pair_id stands twice")
    return list(islice(records, limit))


def _by_domain(path: Path) -> list[dict[str, Any]] | None:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        value = json.loads(text) if text.lstrip().startswith("{") else None
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None  # JSON lines begin with the same mark
    if value is None or not all(isinstance(own, list) for own in value.values()):
        return None
    lists = [
        [_checked(f"{path}: {domain}, record {i}", record) for i, record in enumerate(own)]
        for domain, own in value.items()
    ]
    return [record for record in chain(*zip_longest(*lists)) if record is not None]


def _checked(place: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object")
    for key in ("pair_id", "fig_label", "fig_caption"):
        if not isinstance(record.get(key), str):
            raise UserError(f"{place}: {key} is {record.get(key)!r}, expected text")
    found = record.get("in_text_mention")
    if found is not None and not (
        isinstance(found, list) and all(isinstance(mention, str | dict) for mention in found)
    ):
        raise UserError(f"{place}: in_text_mention is {found!r}, expected a list of texts")
    return record


def context_of(record: dict[str, Any], mentions: bool) -> str:
    """What the model is told of a figure: label, caption, and where its article mentions it."""
    told = f"Figure Caption:\n{record['fig_label']}: {record['fig_caption']}"
    found = record.get("in_text_mention") if mentions else None
    if not found:
        return told
    lines = [m if isinstance(m, str) else str(m.get("tokens", "")) for m in found]
    return told + "\n\nFigure Context:" + "".join(f"\n\t- {line}" for line in lines)


@dataclass(frozen=True)
class Prompts:
    """What a model is told to do, and examples of it."""

    system: str
    samples: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, path: Path) -> Prompts:
        """A YAML file of `system` and `samples`, each with `context` and `reply`."""
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
            samples = [(str(s["context"]), str(s["reply"])) for s in found.get("samples") or []]
            return cls(str(found["system"]), tuple(samples))
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file") from error
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: expected system and samples ({error})") from error

    def messages(self, context: str) -> list[Message]:
        return [{"role": role, "content": text} for role, text in self._said(context)]

    def _said(self, context: str) -> Iterator[tuple[str, str]]:
        yield "system", self.system
        for asked, answered in self.samples:
            yield "user", asked
            yield "assistant", answered
        yield "user", context


def conversation_text(turns: Sequence[dict[str, str]]) -> str:
    """A conversation as the model is to write it."""
    names = {"human": "User", "gpt": "Assistant"}
    return "\n\n".join(f"{names[turn['from']]}: {turn['value']}" for turn in turns)
