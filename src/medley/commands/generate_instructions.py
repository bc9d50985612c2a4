"""Questions and answers about figures, written by a model from their captions; or a translation.

    medley generate-instructions --input fig_captions.json --output raw.jsonl \\
        --endpoint http://localhost:8000/v1 --model NAME
    medley generate-instructions --translate German --input docs.jsonl \\
        --output docs.de.jsonl --endpoint URL --model NAME

Any server that speaks OpenAI's protocol will do; --api_version makes it Azure's. Every reply is
kept in OUTPUT.replies.jsonl as it comes, and never asked for again; what fails is named in
OUTPUT.failed.jsonl, and tried again by the same command. conversion.clean_instructions comes next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medley.data.document import Document, Turn
from medley.datasets import documents
from medley.datasets.base import RecordError, Sample
from medley.datasets.instructions.captions import PROMPTS, Prompts, context_of, read_captions
from medley.datasets.readers import records_of
from medley.datasets.registry import ConversionConfig
from medley.errors import PartialFailure, UserError
from medley.utils.chat_client import ChatClient, Message, RequestFailed, ResponseCache, complete_all
from medley.utils.cli_options import resolved
from medley.utils.files import atomic_file
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class GenerateInstructionsOptions:
    """Asks a model for instructions, or for translations.

    Args:
        input: captions of figures; documents for --translate
        output: JSONL of the records with the model's result; documents for --translate
        endpoint: address of an OpenAI-compatible server, or of an Azure resource
        model: the model's name there (Azure, the deployment's)
        key_variable: environment variable that holds the key
        api_version: version of Azure's protocol; makes the endpoint an Azure one
        prompts: YAML file of what is asked and of examples
        translate: language to translate documents into
        mentions: tell the sentences that mention a figure, too
        limit: take so many records, the first ones
        temperature: temperature of the model
        max_tokens: longest reply
        at_once: questions under way at the same time
        tries: how often a question is asked that fails
        timeout: seconds to wait for a reply
    """

    input: Path
    output: Path
    endpoint: str
    model: str
    key_variable: str = ChatClient.key_variable
    api_version: str | None = None
    prompts: Path | None = None
    translate: str | None = None
    mentions: bool = True
    limit: int | None = None
    temperature: float = ChatClient.temperature
    max_tokens: int = ChatClient.max_tokens
    at_once: int = 8
    tries: int = ChatClient.tries
    timeout: float = ChatClient.timeout

    def __post_init__(self) -> None:
        if self.at_once < 1 or self.tries < 1 or (self.limit is not None and self.limit < 1):
            raise UserError("--at_once, --tries and --limit start at 1")
        self.asked_of()  # before anything is printed: an address may hold a secret

    def asked_of(self) -> ChatClient:
        return ChatClient(
            self.endpoint, self.model, self.key_variable, self.api_version, self.temperature,
            self.max_tokens, self.tries, self.timeout,
        )  # fmt: skip


def beside(output: Path, what: str) -> Path:
    return output.with_name(f"{output.name}.{what}.jsonl")


def generate_instructions(options: GenerateInstructionsOptions) -> None:
    usual = PROMPTS / ("instructions.yaml" if options.translate is None else "translation.yaml")
    prompts = Prompts.read(options.prompts or usual)
    replies = ResponseCache(beside(options.output, "replies"))
    run = instruct if options.translate is None else translate
    rows, failed = run(options, prompts, replies)
    write_lines(options.output, rows)
    write_manifest(options.output, resolved(options), [options.input], None)
    print(f"{options.output}: {len(rows)} records, {len(failed)} failed")
    if failed:
        write_lines(beside(options.output, "failed"), failed)
        raise PartialFailure(
            f"{len(failed)} of {len(rows) + len(failed)} records failed, see "
            f"{beside(options.output, 'failed')}: {failed[0]['error']}; the same command tries "
            "them again"
        )
    beside(options.output, "failed").unlink(missing_ok=True)


Rows = list[dict[str, Any]]


def instruct(
    options: GenerateInstructionsOptions, prompts: Prompts, replies: ResponseCache
) -> tuple[Rows, Rows]:
    """Records with the model's `result`, in the order of the captions, and those that failed."""
    records = read_captions(options.input, options.limit)

    def messages(number: int) -> list[Message]:
        return prompts.messages(context_of(records[number], options.mentions))

    found = _asked(options, range(len(records)), messages, replies)
    rows, failed = Rows(), Rows()
    for number, record in enumerate(records):
        reply = found[number]
        if isinstance(reply, RequestFailed):
            failed.append({"pair_id": record["pair_id"], "error": reply.reason})
        else:
            rows.append({**record, "result": reply})
    return rows, failed


def translate(
    options: GenerateInstructionsOptions, prompts: Prompts, replies: ResponseCache
) -> tuple[Rows, Rows]:
    """Documents with every text in another language, and those of which a text failed."""
    told = replace(prompts, system=prompts.system.replace("{language}", str(options.translate)))
    samples = list(_documents(options))
    places = [
        (number, turn, part)
        for number, sample in enumerate(samples)
        for turn, said in enumerate(sample.document.turns)
        for part, text in enumerate(said.parts)
        if isinstance(text, str) and text.strip()
    ]

    def messages(place: tuple[int, int, int]) -> list[Message]:
        number, turn, part = place
        return told.messages(str(samples[number].document.turns[turn].parts[part]))

    found = _asked(options, places, messages, replies)
    failures = {p[0]: r.reason for p, r in found.items() if isinstance(r, RequestFailed)}
    rows, failed = Rows(), Rows()
    for number, sample in enumerate(samples):
        if number in failures:
            failed.append({"record": number, "error": failures[number]})
            continue
        turns = tuple(
            Turn(said.role, tuple(
                str(found.get((number, turn, part), text)) if isinstance(text, str) else text
                for part, text in enumerate(said.parts)
            ))
            for turn, said in enumerate(sample.document.turns)
        )  # fmt: skip
        fields = {**sample.fields, "language": options.translate}
        rows.append(
            documents.write(Sample(Document(turns), fields), ConversionConfig(options.input))
        )
    return rows, failed


def _documents(options: GenerateInstructionsOptions) -> Iterator[Sample]:
    for number, (place, _, record) in enumerate(records_of(options.input)):
        if number == options.limit:
            return
        try:
            if isinstance(record, RecordError):
                raise record
            yield documents.read(record, ConversionConfig(options.input))
        except RecordError as error:
            raise UserError(f"{place}: {error}") from error


def _asked(
    options: GenerateInstructionsOptions, items: Any, messages: Any, replies: ResponseCache
) -> dict[Any, Any]:
    found = complete_all(options.asked_of(), items, messages, replies, options.at_once)
    return dict(tqdm(found, total=len(items), desc="asking", unit=" replies"))


def write_lines(path: Path, rows: Rows) -> None:
    with atomic_file(path) as temporary:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
