"""Client of a chat model behind an OpenAI-compatible or Azure endpoint.

Requests run concurrently, up to a limit. Each reply is cached on disk as soon as it arrives, so an
interrupted run can be repeated without paying for a request twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import urllib.parse
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from medley.errors import UserError
from medley.utils.cli_options import Alias
from medley.utils.extras import require_extra
from medley.utils.jsonl import append_jsonl

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam

Message = dict[str, str]
Item = TypeVar("Item")
# Statuses that concern the endpoint, the key or the model: every other request would fail as well.
_FATAL_STATUSES = (401, 403, 404)


class TriesAlias(Alias):
    """`--tries N` counted all attempts; `--max_retries` counts those after the first."""

    def convert(self, value: Any) -> Any:
        try:
            return int(value) - 1
        except (TypeError, ValueError):
            return value  # the parser reports it


@dataclass(frozen=True)
class ChatClient:
    """A chat model's endpoint and the sampling parameters of its requests.

    Attributes:
        base_url: URL of an OpenAI-compatible server, or of an Azure resource
        model: the model's name on the server (on Azure, the deployment's name)
        api_key_env: environment variable with the API key; the key itself is never written
        api_version: Azure API version; selects the Azure protocol
        temperature: sampling temperature
        max_tokens: maximum length of a reply
        max_retries: retries after a failed request
        timeout: seconds to wait for a reply
        keep_truncated: accept a reply that was truncated at `max_tokens`; the part that the caller
            needs may be complete
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    api_version: str | None = None
    temperature: float = 0.7
    max_tokens: int = 2048
    max_retries: int = 4
    timeout: float = 120.0
    keep_truncated: bool = False

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.base_url)
        except ValueError as error:
            raise UserError(f"--endpoint {self.base_url}: Invalid URL ({error}).") from error
        if parts.username or parts.password or parts.query:
            raise UserError(
                "--endpoint: The URL contains a password or a query, which would appear in logs "
                "and manifests. Put the key into an environment variable (--api_key_env)."
            )
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(
                f"--endpoint {self.base_url}: Invalid URL (expected http:// or https:// and a "
                "host)."
            )

    def api_key(self) -> str:
        """The key. Raises UserError if the openai package or the key is missing."""
        require_extra("openai", "evaluate", "sending requests to a chat model")
        key = os.environ.get(self.api_key_env)
        if not key:
            raise UserError(
                f"The environment variable {self.api_key_env} is not set. Export it (any value "
                "works if the server needs no key)."
            )
        return key

    def connect(self) -> AsyncOpenAI:
        """The openai package's asynchronous client. Raises UserError as `api_key` does."""
        key = self.api_key()
        library = importlib.import_module("openai")
        common = {"api_key": key, "max_retries": self.max_retries, "timeout": self.timeout}
        if self.api_version is not None:
            client = library.AsyncAzureOpenAI(
                azure_endpoint=self.base_url, api_version=self.api_version, **common
            )
        else:
            client = library.AsyncOpenAI(base_url=self.base_url, **common)
        return cast("AsyncOpenAI", client)

    def cache_key(self, messages: Sequence[Message]) -> str:
        """A hash of everything that a reply depends on."""
        request = [
            self.base_url.rstrip("/"),
            self.model,
            self.temperature,
            self.max_tokens,
            list(messages),
        ]
        return hashlib.sha256(json.dumps(request).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ChatClientOptions:
    """Options of all commands that send requests to a chat model.

    Args:
        endpoint: URL of an OpenAI-compatible server, or of an Azure resource
        api_key_env: environment variable with the API key
        api_version: Azure API version; selects the Azure protocol
        concurrency: maximum number of concurrent requests
        max_retries: retries after a failed request
        timeout: seconds to wait for a reply
    """

    aliases: ClassVar = {
        "key_variable": Alias("api_key_env"),
        "at_once": Alias("concurrency"),
        "tries": TriesAlias("max_retries"),
    }
    endpoint: str | None = None
    api_key_env: str = ChatClient.api_key_env
    api_version: str | None = None
    concurrency: int = 8
    max_retries: int = ChatClient.max_retries
    timeout: float = ChatClient.timeout

    def chat_client(
        self, model: str, temperature: float, max_tokens: int, keep_truncated: bool = False
    ) -> ChatClient:
        """The client of these options. Raises UserError for an invalid or missing value."""
        if self.endpoint is None:
            raise UserError("--endpoint is required.")
        for name, value, least in (
            ("--concurrency", self.concurrency, 1),
            ("--max_retries", self.max_retries, 0),
        ):
            if value < least:
                raise UserError(f"{name} {value}: Expected {least} or more.")
        if self.timeout <= 0:
            raise UserError(f"--timeout {self.timeout}: Expected more than 0 seconds.")
        return ChatClient(
            self.endpoint, model, self.api_key_env, self.api_version, temperature, max_tokens,
            self.max_retries, self.timeout, keep_truncated,
        )  # fmt: skip


class ResponseCache:
    """Replies in a JSON Lines file, by the cache keys of their requests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._replies: dict[str, str] = {}
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            try:
                row = json.loads(line)
                self._replies[row["key"]] = row["reply"]
            except (ValueError, KeyError, TypeError):
                continue  # An interrupted run left the line incomplete; its request is repeated.

    def get(self, key: str) -> str | None:
        return self._replies.get(key)

    def discard(self, key: str) -> None:
        """Drops a reply, so that its request is repeated; the file's last line for a key counts."""
        self._replies.pop(key, None)

    def add(self, key: str, reply: str) -> None:
        append_jsonl(self.path, {"key": key, "reply": reply})
        self._replies[key] = reply


@dataclass(frozen=True)
class RequestFailed:
    """The reason why a request has no reply."""

    reason: str


def complete_all(
    client: ChatClient,
    items: Iterable[Item],
    messages: Callable[[Item], Sequence[Message]],
    cache: ResponseCache,
    concurrency: int,
) -> Iterator[tuple[Item, str | RequestFailed]]:
    """Yields (item, reply) for every item in order of completion.

    At most `concurrency` requests run at the same time. A request that fails after all retries
    yields RequestFailed and does not affect the others. Raises UserError if the endpoint rejects
    every request (invalid key, unknown model).
    """
    stream = _complete_all(client, iter(items), messages, cache, concurrency)
    loop = asyncio.new_event_loop()
    try:
        while True:
            task = loop.create_task(_next(stream))
            try:
                result = loop.run_until_complete(task)
            except BaseException:  # After Ctrl-C, for example, the pending task has to end first.
                task.cancel()
                loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
                raise
            if result is None:
                return
            yield result
    finally:
        loop.run_until_complete(stream.aclose())
        loop.close()


async def _next(stream: AsyncGenerator[Item]) -> Item | None:
    return await anext(stream, None)


async def _complete_all(
    client: ChatClient,
    items: Iterator[Item],
    messages: Callable[[Item], Sequence[Message]],
    cache: ResponseCache,
    concurrency: int,
) -> AsyncGenerator[tuple[Item, str | RequestFailed]]:
    running: dict[asyncio.Task[str | RequestFailed], Item] = {}
    by_key: dict[str, asyncio.Task[str | RequestFailed]] = {}  # running requests
    async with client.connect() as connection:
        try:
            while True:
                for item in islice(items, concurrency - len(running)):
                    request = messages(item)
                    key = client.cache_key(request)
                    same = by_key.get(key)
                    work = _wait_for(same) if same else _send(client, connection, request, cache)
                    task = asyncio.create_task(work)
                    running[task] = item
                    by_key.setdefault(key, task)
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                by_key = {key: task for key, task in by_key.items() if task not in done}
                for task in done:
                    yield running.pop(task), task.result()
        except UserError:  # The running requests are paid for; their replies are cached.
            await asyncio.gather(*running, return_exceptions=True)
            raise
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _wait_for(task: asyncio.Task[str | RequestFailed]) -> str | RequestFailed:
    """The result of an identical request that is already running."""
    return await asyncio.shield(task)


async def _send(
    client: ChatClient, connection: AsyncOpenAI, messages: Sequence[Message], cache: ResponseCache
) -> str | RequestFailed:
    key = client.cache_key(messages)
    if (cached := cache.get(key)) is not None:
        return cached
    errors: Any = importlib.import_module("openai")  # not typed: the package is optional
    try:
        response = await connection.chat.completions.create(
            model=client.model, messages=cast("list[ChatCompletionMessageParam]", list(messages)),
            temperature=client.temperature, max_tokens=client.max_tokens,
        )  # fmt: skip
        reply, reason = response.choices[0].message.content, response.choices[0].finish_reason
    except errors.APIStatusError as error:
        if error.status_code in _FATAL_STATUSES:
            raise UserError(f"{client.base_url}: {error.status_code}, {error.message}") from error
        return RequestFailed(f"{error.status_code}: {error.message}")
    except Exception as error:  # Any invalid reply fails its own request only.
        return RequestFailed(" ".join(str(error).split()) or type(error).__name__)
    if not isinstance(reply, str) or not reply.strip():
        return RequestFailed("The reply is empty.")
    if reason not in (None, "stop") and not (reason == "length" and client.keep_truncated):
        return RequestFailed(
            f"The reply is incomplete (finish_reason {reason}): --max_tokens or the model's own "
            "limit is too low."
        )
    try:
        reply.encode()
    except UnicodeEncodeError:
        return RequestFailed("The reply contains an unpaired surrogate (half of a character).")
    cache.add(key, reply)
    return reply
