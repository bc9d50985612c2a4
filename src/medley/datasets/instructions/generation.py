"""Instruction data written by a chat model: conversations from captions, and translations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from medley.data.document import Document, Turn
from medley.datasets import documents
from medley.datasets.base import ConversionConfig, RecordError, Sample
from medley.datasets.instructions.captions import Prompts, figure_context
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.utils.chat_client import ChatClient, Message, RequestFailed, ResponseCache, complete_all

Item = TypeVar("Item")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ChatModel:
    """A chat model with a reply cache and a limit of concurrent requests."""

    client: ChatClient
    cache: ResponseCache
    concurrency: int

    def complete(
        self, items: Sequence[Item], messages: Callable[[Item], Sequence[Message]]
    ) -> dict[Item, str | RequestFailed]:
        """The reply, or the failure, of the request for each item; shows progress."""
        results = complete_all(self.client, items, messages, self.cache, self.concurrency)
        return dict(tqdm(results, total=len(items), desc="requests", unit=" replies"))


def generate_conversations(
    records: Rows, mentions: bool, prompts: Prompts, model: ChatModel
) -> tuple[Rows, Rows]:
    """Caption records -> records with the model's `result`, in order, and the failed ones."""

    def messages(number: int) -> list[Message]:
        return prompts.messages(figure_context(records[number], mentions))

    replies = model.complete(range(len(records)), messages)
    rows, failed = Rows(), Rows()
    for number, record in enumerate(records):
        reply = replies[number]
        if isinstance(reply, RequestFailed):
            failed.append({"pair_id": record["pair_id"], "error": reply.reason})
        else:
            rows.append({**record, "result": reply})
    return rows, failed


def translate_documents(
    path: Path, limit: int | None, language: str, prompts: Prompts, model: ChatModel
) -> tuple[Rows, Rows]:
    """Documents with every text translated, and the documents with a failed request.

    Replaces `{language}` in the system prompt.
    """
    prompts = replace(prompts, system=prompts.system.replace("{language}", language))
    samples = list(_read_documents(path, limit))
    positions = [
        (number, turn_number, part_number)
        for number, sample in enumerate(samples)
        for turn_number, turn in enumerate(sample.document.turns)
        for part_number, part in enumerate(turn.parts)
        if isinstance(part, str) and part.strip()
    ]

    def messages(position: tuple[int, int, int]) -> list[Message]:
        number, turn_number, part_number = position
        part = samples[number].document.turns[turn_number].parts[part_number]
        return prompts.messages(str(part))

    replies = model.complete(positions, messages)
    failures = {p[0]: r.reason for p, r in replies.items() if isinstance(r, RequestFailed)}
    rows, failed = Rows(), Rows()
    for number, sample in enumerate(samples):
        if number in failures:
            failed.append({"record": number, "error": failures[number]})
            continue
        turns = tuple(
            Turn(turn.role, tuple(
                str(replies.get((number, i, j), part)) if isinstance(part, str) else part
                for j, part in enumerate(turn.parts)
            ))
            for i, turn in enumerate(sample.document.turns)
        )  # fmt: skip
        fields = {**sample.fields, "language": language}
        rows.append(documents.write(Sample(Document(turns), fields), ConversionConfig(path)))
    return rows, failed


def _read_documents(path: Path, limit: int | None) -> Iterator[Sample]:
    for number, (where, _, record) in enumerate(records_of(path)):
        if number == limit:
            return
        try:
            if isinstance(record, RecordError):
                raise record
            yield documents.read(record, ConversionConfig(path))
        except RecordError as error:
            raise UserError(f"{where}: {error}") from error
