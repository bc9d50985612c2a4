"""Asking a judge: what it will cost is said before, every reply is kept, none vanishes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from tqdm import tqdm

from medley.errors import PartialFailure, UserError
from medley.utils.chat_client import ChatClient, Message, RequestFailed, ResponseCache, complete_all

Name = TypeVar("Name")
_CHARACTERS = 4  # of a token, about
PROMPTS = Path(__file__).parent / "prompts"


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """A judge, and what it may cost.

    Args:
        endpoint: address of an OpenAI-compatible server, or of an Azure resource
        judge: the judging model's name there (Azure, the deployment's)
        key_variable: environment variable that holds the key
        api_version: version of Azure's protocol; makes the endpoint an Azure one
        judge_temperature: temperature of the judge
        judge_max_tokens: longest reply
        at_once: questions under way at the same time
        tries: how often a question is asked that fails
        timeout: seconds to wait for a reply
        price_in: price of a million tokens that the judge reads
        price_out: price of a million tokens that it writes
        max_cost: ask nothing if the estimate is above this
        dry_run: estimate, and ask nothing
        ask_again: ask again where a kept reply cannot be read
    """

    endpoint: str | None = None
    judge: str | None = None
    key_variable: str = ChatClient.key_variable
    api_version: str | None = None
    judge_temperature: float = 0.2
    judge_max_tokens: int = 1024
    at_once: int = 8
    tries: int = ChatClient.tries
    timeout: float = ChatClient.timeout
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None
    dry_run: bool = False
    ask_again: bool = False

    def check_judge(self) -> None:
        if min(self.at_once, self.tries, self.judge_max_tokens) < 1 or self.timeout <= 0:
            raise UserError(
                "--at_once, --tries and --judge_max_tokens start at 1, --timeout above 0"
            )
        if any(value is not None and value < 0 for value in (self.price_in, self.price_out)):
            raise UserError("--price_in and --price_out start at 0")
        if self.dry_run and self.endpoint is None:
            raise UserError("--dry_run estimates what a judge costs: --endpoint and --judge")
        if (self.endpoint is None) != (self.judge is None):
            raise UserError("a judge needs both --endpoint and --judge")
        if self.max_cost is not None and None in (self.price_in, self.price_out):
            raise UserError("--max_cost needs --price_in and --price_out, of a million tokens")
        if self.endpoint is not None:
            self.asked_of()  # before anything is printed: an address may hold a secret

    def asked_of(self) -> ChatClient:
        if self.endpoint is None or self.judge is None:
            raise UserError("a judge is needed: --endpoint and --judge")
        return ChatClient(
            self.endpoint, self.judge, self.key_variable, self.api_version,
            self.judge_temperature, self.judge_max_tokens, self.tries, self.timeout, True,
        )  # fmt: skip


class DryRun(Exception):
    """The estimate is printed, and no more was asked for."""


def ask_judge(
    options: JudgeOptions,
    questions: Mapping[Name, Sequence[Message]],
    kept: Path,
    readable: Callable[[Name, str], bool],
) -> dict[Name, str | RequestFailed]:
    """Replies by the questions' names. They are kept in a file as they come: the same command goes
    on where it was stopped, and pays for nothing twice.

    Raises DryRun where only the estimate was asked for, UserError where it is above the limit.
    """
    endpoint, replies = options.asked_of(), ResponseCache(kept)
    known: dict[Name, str] = {}
    for name, messages in questions.items():
        reply = replies.get(endpoint.cache_key(messages))
        if reply is not None and (readable(name, reply) or not options.ask_again):
            known[name] = reply
        elif reply is not None:
            replies.forget(endpoint.cache_key(messages))
    left = {name: messages for name, messages in questions.items() if name not in known}
    print(f"{len(known)} replies are there already; {_estimate(options, list(left.values()))}")
    if options.dry_run:
        raise DryRun
    found: dict[Name, str | RequestFailed] = dict(known)
    if left:
        asked = complete_all(endpoint, left, left.__getitem__, replies, options.at_once)
        found |= dict(tqdm(asked, total=len(left), desc="asking the judge", unit=" replies"))
    return {name: found[name] for name in questions}


def _estimate(options: JudgeOptions, questions: Sequence[Sequence[Message]]) -> str:
    """What is left to ask, in words. Raises UserError where it is above the limit."""
    said = "".join(message["content"] for messages in questions for message in messages)
    ascii_ones = sum(character.isascii() for character in said)
    # A letter beyond ASCII may take a token of its own.
    read = ascii_ones / _CHARACTERS + len(said) - ascii_ones
    written = len(questions) * options.judge_max_tokens
    told = f"{len(questions)} to ask, about {read:,.0f} tokens, and at most {written:,} in reply"
    if options.price_in is None or options.price_out is None:
        return told
    cost = (read * options.price_in + written * options.price_out) / 1e6
    if options.max_cost is not None and cost > options.max_cost:
        raise UserError(f"{told}: up to about {cost:.2f}, --max_cost is {options.max_cost}")
    return f"{told}: up to about {cost:.2f}"


@dataclass(frozen=True)
class JudgeStats:
    """What became of a judge's replies."""

    asked: int
    read: int
    unread: int
    failed: int
    first_failed: str = ""

    @classmethod
    def of(
        cls, replies: Mapping[Name, str | RequestFailed], read: Mapping[Name, bool]
    ) -> JudgeStats:
        """`read` says which replies could be read."""
        failed = [reply for reply in replies.values() if isinstance(reply, RequestFailed)]
        good = sum(read[name] for name in replies)
        first = failed[0].reason if failed else ""
        return cls(len(replies), good, len(replies) - good - len(failed), len(failed), first)

    def line(self) -> str:
        return (
            f"{self.read} of {self.asked} replies were read; {self.unread} cannot be read, "
            f"{self.failed} questions got none"
        )

    def values(self) -> dict[str, int]:
        return {"asked": self.asked, "read": self.read, "unread": self.unread,
                "failed": self.failed}  # fmt: skip

    def check(self) -> None:
        """Raises DataLost where a question got no reply, once all else is written."""
        if self.failed:
            raise PartialFailure(
                f"{self.failed} of {self.asked} questions got no reply from the judge, the first: "
                f"{self.first_failed}; the same command asks them again"
            )


def note_of(reply: str | RequestFailed, is_read: bool) -> str:
    """Why an answer has no score; nothing where it has one."""
    if isinstance(reply, RequestFailed):
        return f"the judge gave no reply: {reply.reason}"
    return "" if is_read else f"the judge's reply cannot be read: {reply[:200]}"


def filled(template: str, values: Mapping[str, str]) -> str:
    """A text with its `{names}` replaced, once: what a value holds is left as it is."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def read_prompts(path: Path, **names: tuple[str, ...]) -> dict[str, str]:
    """Texts of a YAML file by name, each with the `{places}` that it has to have. Raises UserError
    for one that is missing."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        texts = {name: found[name] for name in names}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected {', '.join(names)} ({error})") from error
    for name, text in texts.items():
        lacks = [place for place in names[name] if f"{{{place}}}" not in str(text)]
        if not isinstance(text, str) or lacks:
            places = ", ".join(f"{{{place}}}" for place in names[name])
            raise UserError(f"{path}: {name} is no text with {places or 'words'}")
    return texts
