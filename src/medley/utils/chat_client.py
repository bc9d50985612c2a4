"""A chat model behind an OpenAI-compatible or Azure endpoint: bounded in parallel, every reply kept
as soon as it is there, nothing asked twice."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import json
import os
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from medley.errors import UserError
from medley.utils.jsonl import append_jsonl

Message = dict[str, str]
Item = TypeVar("Item")
_STOPPING = (401, 403, 404)  # of the endpoint itself: no other question will fare better


@dataclass(frozen=True)
class ChatClient:
    """Where a chat model is, and how it is asked.

    `api_version` makes it an Azure endpoint. The key is read from the environment, by name, and
    never written anywhere. `keep_cut` keeps a reply that was cut at its limit, too: what is wanted
    of it may stand at its beginning, and it was paid for.
    """

    address: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    api_version: str | None = None
    temperature: float = 0.7
    max_tokens: int = 2048
    tries: int = 5
    timeout: float = 120.0
    keep_cut: bool = False

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.address)
        except ValueError as error:
            raise UserError(f"--endpoint {self.address}: no address ({error})") from error
        if parts.username or parts.password or parts.query:
            raise UserError(
                "--endpoint: an address with a password or a query would stand in logs and "
                "manifests; put the key into an environment variable (--key_variable)"
            )
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"--endpoint {self.address}: expected http:// or https:// and a host")

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

    def cache_key(self, messages: Sequence[Message]) -> str:
        """What a reply is remembered by: all that it depends on."""
        asked = [
            self.address.rstrip("/"),
            self.model,
            self.temperature,
            self.max_tokens,
            list(messages),
        ]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


class ResponseCache:
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

    def forget(self, key: str) -> None:
        """The question is asked again; its old line stays, and the new one counts."""
        self._known.pop(key, None)

    def keep(self, key: str, reply: str) -> None:
        append_jsonl(self.path, {"key": key, "reply": reply})
        self._known[key] = reply


@dataclass(frozen=True)
class RequestFailed:
    """Why a question has no reply."""

    reason: str


def complete_all(
    endpoint: ChatClient,
    items: Iterable[Item],
    messages: Callable[[Item], Sequence[Message]],
    replies: ResponseCache,
    at_once: int,
) -> Iterator[tuple[Item, str | RequestFailed]]:
    """(item, reply) for every item, as they come; no more than `at_once` under way.

    A reply that fails after all tries is a Failed, and costs no other. Raises UserError where the
    endpoint refuses whatever is asked (a wrong key, no such model).
    """
    stream = _ask_all(endpoint, iter(items), messages, replies, at_once)
    loop = asyncio.new_event_loop()
    try:
        while True:
            task = loop.create_task(_next(stream))
            try:
                found = loop.run_until_complete(task)
            except BaseException:  # Ctrl-C, say: what waits for a reply has to end first
                task.cancel()
                loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
                raise
            if found is None:
                return
            yield found
    finally:
        loop.run_until_complete(stream.aclose())  # type: ignore[attr-defined]  # a generator's
        loop.close()


async def _next(stream: AsyncIterator[Item]) -> Item | None:
    return await anext(stream, None)


async def _ask_all(
    endpoint: ChatClient,
    items: Iterator[Item],
    messages: Callable[[Item], Sequence[Message]],
    replies: ResponseCache,
    at_once: int,
) -> AsyncIterator[tuple[Item, str | RequestFailed]]:
    running: dict[asyncio.Task[str | RequestFailed], Item] = {}
    asked: dict[str, asyncio.Task[str | RequestFailed]] = {}  # under way, by what they ask
    async with endpoint.client() as client:
        try:
            while True:
                for item in islice(items, at_once - len(running)):
                    said = messages(item)
                    key = endpoint.cache_key(said)
                    same = asked.get(key)
                    work = _same(same) if same else _ask(endpoint, client, said, replies)
                    task = asyncio.create_task(work)
                    running[task] = item
                    asked.setdefault(key, task)
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                asked = {key: task for key, task in asked.items() if task not in done}
                for task in done:
                    yield running.pop(task), task.result()
        except UserError:  # what is under way is paid for, and kept as it comes
            await asyncio.gather(*running, return_exceptions=True)
            raise
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _same(task: asyncio.Task[str | RequestFailed]) -> str | RequestFailed:
    """The reply to a question that is under way already."""
    return await asyncio.shield(task)


async def _ask(
    endpoint: ChatClient, client: Any, messages: Sequence[Message], replies: ResponseCache
) -> str | RequestFailed:
    key = endpoint.cache_key(messages)
    if (known := replies.get(key)) is not None:
        return known
    errors: Any = importlib.import_module("openai")
    try:
        answer = await client.chat.completions.create(
            model=endpoint.model, messages=list(messages), temperature=endpoint.temperature,
            max_tokens=endpoint.max_tokens,
        )  # fmt: skip
        reply, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    except errors.APIStatusError as error:
        if error.status_code in _STOPPING:
            raise UserError(f"{endpoint.address}: {error.status_code}, {error.message}") from error
        return RequestFailed(f"{error.status_code}: {error.message}")
    except Exception as error:  # a server may say anything; the other questions go on
        return RequestFailed(" ".join(str(error).split()) or type(error).__name__)
    if not isinstance(reply, str) or not reply.strip():
        return RequestFailed("an empty reply")
    if reason not in (None, "stop") and not (reason == "length" and endpoint.keep_cut):
        return RequestFailed(
            f"the reply is not whole ({reason}): its limit (--max_tokens), or the model's own"
        )
    try:
        reply.encode()
    except UnicodeEncodeError:
        return RequestFailed("the reply holds half of a character")
    replies.keep(key, reply)
    return reply
