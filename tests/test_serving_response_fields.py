"""`/v1/responses`: fields that a response repeats, its usage, and truncation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from running_server import RunningServer

from medley.serving.limits import Limits
from medley.serving.responses_api import Conversation
from medley.serving.responses_schema import MAX_TOOL_CHARACTERS

TOOL: dict[str, Any] = {"type": "image_generation"}
PATH = "/v1/responses"
END = 7  # the end of a turn, in the conversations of these tests


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = RunningServer(Limits(request_timeout=60, max_tokens=2))
    yield server
    server.stop()


def send(running: RunningServer, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "input": "x", "mode": "text", **fields}
    return httpx.post(running.url + PATH, json=body, timeout=60)


# --- fields that a response repeats -----------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metadata": {"a": "x" * 513}}, "metadata.a"), ({"metadata": {"a": 5}}, "metadata.a"),
        ({"metadata": {"a": ["x"]}}, "metadata.a"), ({"metadata": {"a": {"b": "c"}}}, "metadata.a"),
        ({"metadata": {f"a{n}": "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"tools": [TOOL | {"x": "y" * MAX_TOOL_CHARACTERS}]}, "tools"),
        ({"tools": [TOOL] * 128 + [TOOL | {"x": 1}]}, "tools"),
        ({"tools": [TOOL | {"x": [[1] * 2000]}]}, "tools"),
        ({"tools": [TOOL], "tool_choice": TOOL | {"x": "y" * MAX_TOOL_CHARACTERS}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": TOOL | {"x": {str(n): n for n in range(999)}}},
         "tool_choice"),
    ],
)  # fmt: skip
def test_what_a_response_repeats_is_bounded(
    fields: dict[str, Any], param: str, running: RunningServer
) -> None:
    """The response outlives the request body, whose memory is counted, and may be stored."""
    response = send(running, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)
    assert "limit" in (text := response.json()["error"]["message"]) or "should" in text


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {}}, {"metadata": {"k" * 64: "v" * 512}}, {"parallel_tool_calls": False},
        {"metadata": {f"a{n}": "\u4e00" * 512 for n in range(16)}}, {"parallel_tool_calls": True},
        {"tools": [TOOL | {"model": "gpt-image-1", "size": "auto", "partial_images": 1}]},
        {"tools": [TOOL], "tool_choice": TOOL},
        {"tools": [TOOL], "tool_choice": "none"},
    ],
)  # fmt: skip
def test_a_response_repeats_what_was_sent(fields: dict[str, Any], running: RunningServer) -> None:
    response = send(running, **fields)
    assert response.status_code == 200, response.text
    stored = httpx.get(f"{running.url}{PATH}/{response.json()['id']}", timeout=60).json()
    for name, value in fields.items():
        assert response.json()[name] == stored[name] == value


def test_parallel_tool_calls_have_the_default_of_openai(running: RunningServer) -> None:
    assert send(running).json()["parallel_tool_calls"] is True
    assert send(running, parallel_tool_calls=None).json()["parallel_tool_calls"] is True


def test_unknown_numbers_of_cached_tokens_are_left_out(running: RunningServer) -> None:
    assert "cached_tokens" not in send(running).text
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        usage = client.responses.create(model="tiny", input="x").usage
    assert usage is not None
    assert usage.input_tokens > 0
    assert usage.input_tokens_details.cached_tokens is None


# --- truncation -------------------------------------------------------------------------------


def conversation_of(*lengths: int, instructions: int = 0) -> Conversation:
    """Turns with these numbers of tokens before their ends; tokens differ, except the ends."""
    tokens, ids = iter(range(100, 10**6)), [1]
    for length in lengths:
        ids += [*(next(tokens) for _ in range(length)), END]
    return Conversation(tuple(ids), tuple(range(-instructions, 0)))


def truncate_step_by_step(ids: tuple[int, ...], room: int) -> tuple[tuple[int, ...], int]:
    """The definition: two turns at a time, as long as the ids exceed the room."""
    dropped = 0
    while len(ids) > room and ids.count(END) >= 3:
        second = [i for i, token in enumerate(ids) if token == END][1]
        ids, dropped = (ids[0], *ids[second + 1 :]), dropped + 2
    return ids, dropped


@pytest.mark.parametrize(
    "lengths", [(4,), (4, 0), (3, 2, 5), (0, 0, 0), (1, 9, 2, 2, 1), (2, 3, 4, 5), (5,) * 9, ()]
)
@pytest.mark.parametrize("instructions", [0, 3])
def test_truncation_drops_as_few_turns_as_possible(
    lengths: tuple[int, ...], instructions: int
) -> None:
    for limit in range(-2, sum(lengths) + 20):
        conversation = conversation_of(*lengths, instructions=instructions)
        expected, dropped = truncate_step_by_step(conversation.ids, limit - instructions)
        conversation.truncate(limit, END)
        assert conversation.ids == expected
        note = f"truncation: The {dropped} oldest turns were left out." if dropped else None
        assert conversation.note == note


def test_truncation_of_many_turns_takes_linear_time() -> None:
    """Counts the comparisons of tokens: the event loop waits for the truncation."""

    class Counted(int):
        count = 0

        def __eq__(self, other: object) -> bool:
            Counted.count += 1
            return int(self) == other

        __hash__ = int.__hash__

    turns = 20_000
    conversation = Conversation((1, *[Counted(END) for _ in range(turns)]))
    conversation.truncate(10, END)
    assert len(conversation.ids) <= 10
    assert 0 < Counted.count <= 2 * turns
