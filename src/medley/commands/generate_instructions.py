"""Lets a chat model write conversations from figure captions, or translate documents.

    medley generate-instructions --input fig_captions.json --output raw.jsonl \\
        --endpoint http://localhost:8000/v1 --model NAME
    medley generate-instructions --translate German --input docs.jsonl \\
        --output docs.de.jsonl --endpoint URL --model NAME

In: LLaVA-Med's captions, or documents with --translate. Out: the records with the model's reply in
`result` (clean them with `medley clean-instructions`), or translated documents. Any server with an
OpenAI-compatible API works; --api_version selects the Azure API. Each reply is cached in
OUTPUT.replies.jsonl on arrival, and its request is never repeated. Failed records are listed in
OUTPUT.failed.jsonl; the same command retries them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from medley.datasets.instructions.captions import PROMPTS, Prompts, read_captions
from medley.datasets.instructions.generation import (
    ChatModel,
    generate_conversations,
    translate_documents,
)
from medley.errors import PartialFailure, UserError
from medley.utils.chat_client import ChatClient, ChatClientOptions, ResponseCache
from medley.utils.cli_options import resolved
from medley.utils.jsonl import write_jsonl
from medley.utils.manifest import write_manifest


@dataclass(frozen=True, kw_only=True)
class GenerateInstructionsOptions(ChatClientOptions):
    """Generates instruction data, or translations, with a chat model.

    Args:
        input: captions of figures; documents for --translate
        output: JSONL file of the records with the model's result; documents for --translate
        model: the model's name on the server (on Azure, the deployment's name)
        prompts: YAML file with the system prompt and examples
        translate: language to translate documents into
        mentions: include the article's sentences that mention the figure
        limit: use only the first N records
        temperature: sampling temperature
        max_tokens: maximum length of a reply
    """

    endpoint: str = field()  # required here
    input: Path
    output: Path
    model: str
    prompts: Path | None = None
    translate: str | None = None
    mentions: bool = True
    limit: int | None = None
    temperature: float = ChatClient.temperature
    max_tokens: int = ChatClient.max_tokens

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: Expected 1 or more.")
        self.client()  # before the options are printed: an invalid URL may contain a secret

    def client(self) -> ChatClient:
        return self.chat_client(self.model, self.temperature, self.max_tokens)


def sidecar(output: Path, kind: str) -> Path:
    return output.with_name(f"{output.name}.{kind}.jsonl")


def generate_instructions(options: GenerateInstructionsOptions) -> None:
    options.client().api_key()  # before any data is read
    default = "instructions.yaml" if options.translate is None else "translation.yaml"
    prompts = Prompts.read(options.prompts or PROMPTS / default)
    cache = ResponseCache(sidecar(options.output, "replies"))
    model = ChatModel(options.client(), cache, options.concurrency)
    if options.translate is None:
        records = read_captions(options.input, options.limit)
        rows, failed = generate_conversations(records, options.mentions, prompts, model)
    else:
        rows, failed = translate_documents(
            options.input, options.limit, options.translate, prompts, model
        )
    write_jsonl(options.output, rows)
    write_manifest(options.output, resolved(options), [options.input], None)
    print(f"{options.output}: {len(rows)} records, {len(failed)} failed")
    failed_file = sidecar(options.output, "failed")
    if failed:
        write_jsonl(failed_file, failed)
        error = failed[0]["error"].rstrip(".")
        raise PartialFailure(
            f"{len(failed)} of {len(rows) + len(failed)} records failed (see {failed_file}; the "
            f"first error: {error}). Run the same command again to retry them."
        )
    failed_file.unlink(missing_ok=True)
