"""LLM judge: the cost is estimated first, and every reply is cached on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import yaml
from tqdm import tqdm

from medley.errors import PartialFailure, UserError
from medley.utils.chat_client import (
    ChatClient,
    ChatClientOptions,
    Message,
    RequestFailed,
    ResponseCache,
    complete_all,
)
from medley.utils.cli_options import Alias
from medley.utils.extras import require_extra

Name = TypeVar("Name")
_CHARACTERS_PER_TOKEN = 4  # approximately, in ASCII text
PROMPTS = Path(__file__).parent / "prompts"


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(ChatClientOptions):
    """An LLM judge and the limit of its cost.

    Args:
        judge: name of the judging model on the server (on Azure, of the deployment)
        judge_temperature: sampling temperature of the judge
        judge_max_tokens: maximum length of the judge's reply
        input_price: price of a million input tokens
        output_price: price of a million output tokens
        max_cost: send no requests if the estimated cost is higher
        dry_run: print the estimate without sending requests
        ask_again: repeat requests whose cached reply cannot be parsed
    """

    aliases: ClassVar = {"price_in": Alias("input_price"), "price_out": Alias("output_price")}
    judge: str | None = None
    judge_temperature: float = 0.2
    judge_max_tokens: int = 1024
    input_price: float | None = None
    output_price: float | None = None
    max_cost: float | None = None
    dry_run: bool = False
    ask_again: bool = False

    def check_judge(self) -> None:
        """Raises UserError for invalid options, and if the openai package is missing."""
        if self.judge_max_tokens < 1:
            raise UserError(f"--judge_max_tokens {self.judge_max_tokens}: Expected 1 or more.")
        for name in ("input_price", "output_price"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise UserError(f"--{name} {value}: Expected 0 or more.")
        if self.dry_run and self.endpoint is None:
            raise UserError("--dry_run estimates the cost of a judge. Set --endpoint and --judge.")
        if (self.endpoint is None) != (self.judge is None):
            raise UserError("A judge needs both --endpoint and --judge.")
        if self.max_cost is not None and None in (self.input_price, self.output_price):
            raise UserError("--max_cost needs --input_price and --output_price.")
        if self.endpoint is not None:
            # Before the options are printed, since an invalid URL may contain a password.
            self.judge_client()
            if not self.dry_run:
                require_extra("openai", "evaluate", "--judge")

    def judge_client(self) -> ChatClient:
        if self.endpoint is None or self.judge is None:
            raise UserError("A judge is required. Set --endpoint and --judge.")
        return self.chat_client(
            self.judge, self.judge_temperature, self.judge_max_tokens, keep_truncated=True
        )


class DryRun(Exception):
    """Raised after the estimate of a dry run."""


def ask_judge(
    options: JudgeOptions,
    requests: Mapping[Name, Sequence[Message]],
    cache_file: Path,
    is_parsable: Callable[[Name, str], bool],
) -> dict[Name, str | RequestFailed]:
    """The judge's replies by the names of the requests.

    Replies are cached in a file on arrival, so that an interrupted run resumes without paying for
    a request twice.

    Raises:
        DryRun: after the estimate, if `options` asks only for it
        UserError: the estimated cost is above the limit
    """
    client, cache = options.judge_client(), ResponseCache(cache_file)
    replies: dict[Name, str | RequestFailed] = {}
    for name, messages in requests.items():
        reply = cache.get(client.cache_key(messages))
        if reply is not None and (is_parsable(name, reply) or not options.ask_again):
            replies[name] = reply
        elif reply is not None:
            cache.discard(client.cache_key(messages))
    remaining = {name: messages for name, messages in requests.items() if name not in replies}
    print(f"Judge: {len(replies)} cached replies, {_estimate(options, list(remaining.values()))}")
    if options.dry_run:
        raise DryRun
    if remaining:
        completed = complete_all(
            client, remaining, remaining.__getitem__, cache, options.concurrency
        )
        replies |= dict(tqdm(completed, total=len(remaining), desc="judging", unit=" replies"))
    return {name: replies[name] for name in requests}


def _estimate(options: JudgeOptions, requests: Sequence[Sequence[Message]]) -> str:
    """The remaining requests and their cost. Raises UserError if it is above the limit."""
    text = "".join(message["content"] for messages in requests for message in messages)
    ascii_characters = sum(character.isascii() for character in text)
    # Other characters may take one token each.
    input_tokens = ascii_characters / _CHARACTERS_PER_TOKEN + len(text) - ascii_characters
    output_tokens = len(requests) * options.judge_max_tokens
    amount = (
        f"{len(requests)} requests with about {input_tokens:,.0f} input tokens and at most "
        f"{output_tokens:,} output tokens"
    )
    if options.input_price is None or options.output_price is None:
        return amount
    cost = (input_tokens * options.input_price + output_tokens * options.output_price) / 1e6
    if options.max_cost is not None and cost > options.max_cost:
        raise UserError(
            f"--max_cost {options.max_cost}: The estimated cost is higher (up to about {cost:.2f} "
            f"for {amount})."
        )
    return f"{amount}: up to about {cost:.2f}"


@dataclass(frozen=True)
class JudgeStats:
    """The number of requests and their outcomes."""

    requests: int
    parsed: int
    unparsed: int
    failed: int
    first_failure: str = ""

    @classmethod
    def from_replies(
        cls, replies: Mapping[Name, str | RequestFailed], is_parsed: Mapping[Name, bool]
    ) -> JudgeStats:
        failures = [reply for reply in replies.values() if isinstance(reply, RequestFailed)]
        parsed = sum(is_parsed[name] for name in replies)
        first = failures[0].reason if failures else ""
        unparsed = len(replies) - parsed - len(failures)
        return cls(len(replies), parsed, unparsed, len(failures), first)

    def summary(self) -> str:
        return (
            f"{self.parsed} of {self.requests} replies of the judge were parsed; {self.unparsed} "
            f"could not be parsed, {self.failed} requests failed"
        )

    def to_json(self) -> dict[str, int]:
        return {"requests": self.requests, "parsed": self.parsed, "unparsed": self.unparsed,
                "failed": self.failed}  # fmt: skip

    def check(self) -> None:
        """Raises PartialFailure if a request failed. Call it after all outputs are written."""
        if self.failed:
            raise PartialFailure(
                f"{self.failed} of {self.requests} requests to the judge failed. Run the same "
                f"command again to repeat them. First failure: {self.first_failure}"
            )


def failure_note(reply: str | RequestFailed, is_parsed: bool) -> str:
    """The reason why a judge's reply gave no score; empty if it gave one."""
    if isinstance(reply, RequestFailed):
        return f"The judge gave no reply: {reply.reason}"
    return "" if is_parsed else f"The judge's reply cannot be parsed: {reply[:200]}"


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Replaces each `{name}` once; braces in the values are not replaced."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def read_templates(path: Path, **placeholders: tuple[str, ...]) -> dict[str, str]:
    """The templates of a YAML file by name.

    `placeholders` names the templates and the `{placeholders}` that each must contain. Raises
    UserError for a missing template or placeholder.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        templates = {name: content[name] for name in placeholders}
    except FileNotFoundError as error:
        raise UserError(f"{path}: File not found.") from error
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: Expected the keys {', '.join(placeholders)} ({error})."
        ) from error
    for name, template in templates.items():
        if not isinstance(template, str):
            raise UserError(f"{path}: {name} must be a string (got {template!r}).")
        missing = [f"{{{key}}}" for key in placeholders[name] if f"{{{key}}}" not in template]
        if missing:
            raise UserError(f"{path}: {name} lacks the placeholders {', '.join(missing)}.")
    return templates
