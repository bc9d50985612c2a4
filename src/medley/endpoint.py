"""A chat model behind an OpenAI-compatible or Azure endpoint: bounded in parallel, every reply kept
as soon as it is there, nothing asked twice."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from medley.errors import UserError
from medley.files import append_line

Message = dict[str, str]
Item = TypeVar("Item")
_STOPPING = (401, 403, 404)  # of the endpoint itself: no other question will fare better


@dataclass(frozen=True)
class Endpoint:
    """Where a chat model is, and how it is asked.

    `api_version` makes it an Azure endpoint. The key is read from the environment, by name, and
    never written anywhere.
    """

    address: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    api_version: str | None = None
    temperature: float = 0.7
    max_tokens: int = 2048
    tries: int = 5
    timeout: float = 120.0

    def client(self) -> Any:
        """The library's asynchronous client. Raises UserError where it or the key is missing."""
        if importlib.util.find_spec("openai") is None:
            raise UserError("asking a model needs openai: pip install 'medley-mm[evaluate]'")
        library = importlib.import_module("openai")
        key = os.environ.get(self.key_variable)
        if not key:
            raise UserError(
                f"the environment has no {self.key_variable}: export it (any word does where the "
                "server asks for none)"
            )
        common = {"api_key": key, "max_retries": self.tries - 1, "timeout": self.timeout}
        if self.api_version is not None:
            return library.AsyncAzureOpenAI(
                azure_endpoint=self.address, api_version=self.api_version, **common
            )
        return library.AsyncOpenAI(base_url=self.address, **common)

    def key_of(self, messages: Sequence[Message]) -> str:
        """What a reply is remembered by: all that it depends on."""
        asked = [self.address, self.model, self.temperature, self.max_tokens, list(messages)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


class Replies:
    """Replies on disk, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, str] = {}
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            try:
                row = json.loads(line)
                self._known[row["key"]] = row["reply"]
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a kill: that question is asked again

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def keep(self, key: str, reply: str) -> None:
        append_line(self.path, json.dumps({"key": key, "reply": reply}))
        self._known[key] = reply


@dataclass(frozen=True)
class Failed:
    """Why a question has no reply."""

    reason: str


def ask_all(
    endpoint: Endpoint,
    items: Iterable[Item],
    messages: Callable[[Item], Sequence[Message]],
    replies: Replies,
    at_once: int,
) -> Iterator[tuple[Item, str | Failed]]:
    """(item, reply) for every item, as they come; no more than `at_once` under way.

    A reply that fails after all tries is a Failed, and costs no other. Raises UserError where the
    endpoint refuses whatever is asked (a wrong key, no such model).
    """
    stream = _ask_all(endpoint, iter(items), messages, replies, at_once)
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(stream))
            except StopAsyncIteration:
                return
    finally:
        loop.run_until_complete(stream.aclose())  # type: ignore[attr-defined]  # a generator's
        loop.close()


async def _ask_all(
    endpoint: Endpoint,
    items: Iterator[Item],
    messages: Callable[[Item], Sequence[Message]],
    replies: Replies,
    at_once: int,
) -> AsyncIterator[tuple[Item, str | Failed]]:
    running: dict[asyncio.Task[str | Failed], Item] = {}
    async with endpoint.client() as client:
        try:
            while True:
                for item in islice(items, at_once - len(running)):
                    work = _ask(endpoint, client, messages(item), replies)
                    running[asyncio.create_task(work)] = item
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield running.pop(task), task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _ask(
    endpoint: Endpoint, client: Any, messages: Sequence[Message], replies: Replies
) -> str | Failed:
    key = endpoint.key_of(messages)
    if (known := replies.get(key)) is not None:
        return known
    errors: Any = importlib.import_module("openai")
    try:
        answer = await client.chat.completions.create(
            model=endpoint.model, messages=list(messages), temperature=endpoint.temperature,
            max_tokens=endpoint.max_tokens,
        )  # fmt: skip
        reply = answer.choices[0].message.content
    except errors.APIStatusError as error:
        if error.status_code in _STOPPING:
            raise UserError(f"{endpoint.address}: {error.status_code}, {error.message}") from error
        return Failed(f"{error.status_code}: {error.message}")
    except (errors.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
        return Failed(" ".join(str(error).split()) or type(error).__name__)
    if not isinstance(reply, str) or not reply.strip():
        return Failed("an empty reply")
    replies.keep(key, reply)
    return reply
