"""`/v1/responses`: output items, streams, conversations, the store, refused fields."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from running_server import RunningServer

import medley
from medley.phantoms import Phantom
from medley.serving.limits import Limits, RequestError
from medley.serving.response_items import to_messages
from medley.serving.response_store import ResponseStore, StoredResponse
from medley.utils.html import data_url

QUESTION = "Write a report on an image."
TOOL: Any = {"type": "image_generation"}
SEED = {"seed": 4}
PATH = "/v1/responses"


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = RunningServer(
        Limits(request_timeout=60, max_tokens=400, max_images=2), names=("tiny", "other")
    )
    yield server
    assert server.becomes_idle()
    server.stop()


@pytest.fixture
def client(running: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as own:
        yield own


def create(client: openai.OpenAI, **fields: Any) -> Any:
    common = {"model": "tiny", "input": QUESTION, "extra_body": SEED}
    return client.responses.create(**(common | fields))


# --- output -----------------------------------------------------------------------------------


def test_text_is_that_of_the_library(client: openai.OpenAI) -> None:
    response = create(client, temperature=0, instructions="Be brief.", metadata={"a": "b"})
    (expected,) = medley.load("tiny").generate(
        ["Be brief.", "\n", QUESTION], mode="text", text_greedy=True, max_new_tokens=400
    )
    assert response.output_text == expected
    assert (response.status, response.object, response.error) == ("completed", "response", None)
    assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"})
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_images_come_by_the_tool_the_mode_or_the_name(client: openai.OpenAI) -> None:
    forms: list[dict[str, Any]] = [
        {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "auto"}, {"model": "tiny:any"},
        {"extra_body": SEED | {"mode": "any"}},
    ]  # fmt: skip
    outputs = []
    for form in forms:
        output = [item.model_dump() for item in create(client, **form).output]
        outputs.append([(item["type"], item.get("result"), item["status"]) for item in output])
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
    assert [kind for kind, _, _ in outputs[0]] == ["message", "image_generation_call", "message"]
    image = Image.open(io.BytesIO(base64.b64decode(str(outputs[0][1][1]))))
    assert image.size == (64, 64)
    for choice in ("required", TOOL):
        (only,) = create(client, tools=[TOOL], tool_choice=choice).output
        assert only.type == "image_generation_call"
    for quiet in ({"tools": [TOOL], "tool_choice": "none"}, {}, {"model": "tiny:text"}):
        assert {item.type for item in create(client, **quiet).output} == {"message"}


def test_a_truncated_response_is_incomplete(client: openai.OpenAI) -> None:
    response = create(client, max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 2
    assert response.output[0].status == "incomplete"


def test_markdown_is_part_of_the_text(client: openai.OpenAI) -> None:
    response = create(client, tools=[TOOL], extra_body=SEED | {"images_as": "markdown"})
    assert [item.type for item in response.output] == ["message"]
    assert "![image](data:image/png;base64," in response.output_text


# --- streams ----------------------------------------------------------------------------------


@pytest.mark.parametrize("partial", [0, 1, 2, 3])
def test_a_stream_has_the_events_of_openai(partial: int, client: openai.OpenAI) -> None:
    tool = TOOL | {"partial_images": partial}
    expected = create(client, tools=[TOOL])
    with client.responses.stream(
        model="tiny", input=QUESTION, tools=[tool], extra_body=SEED
    ) as stream:
        events: list[Any] = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert (
        kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    )
    previews = [e for e in events if e.type == "response.image_generation_call.partial_image"]
    assert [event.partial_image_index for event in previews] == list(range(partial))
    for preview in previews:
        Image.open(io.BytesIO(base64.b64decode(preview.partial_image_b64))).load()
    assert final.output_text == expected.output_text
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert deltas == expected.output_text
    # Every event of an item names the item that was added at its index.
    added = {e.output_index: e.item.id for e in events if e.type == "response.output_item.added"}
    for event in events:
        if hasattr(event, "item_id"):
            assert added[event.output_index] == event.item_id
    results = [item.result for item in final.output if item.type == "image_generation_call"]
    assert results == [i.result for i in expected.output if i.type == "image_generation_call"]


def test_an_error_in_a_stream_ends_it_as_failed(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, count = running.model.engine.step, 0

    def fail_later() -> None:
        nonlocal count
        count += 1
        if count > 5:
            raise RuntimeError("broken")
        step()

    body = {"model": "tiny", "input": QUESTION, "stream": True, "mode": "image"}
    with monkeypatch.context() as patched:
        patched.setattr(running.model.engine, "step", fail_later)
        text = httpx.post(running.url + PATH, json=body, timeout=60).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1]["response"]["error"]["code"] == "internal_error"
    assert events[-1]["response"]["status"] == "failed"
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(len(events)))


# --- conversations ----------------------------------------------------------------------------


def test_a_stored_conversation_continues_with_the_same_tokens(client: openai.OpenAI) -> None:
    first = create(client, tools=[TOOL], instructions="Be brief.")
    stored = create(client, input="Is there a cyst?", previous_response_id=first.id)
    user = {"role": "user", "content": QUESTION}
    items = [item.model_dump(exclude_none=True) for item in first.output]
    by_id = [
        {"type": item["type"], "id": item["id"]} if "result" in item else item for item in items
    ]
    question = {"role": "user", "content": [{"type": "input_text", "text": "Is there a cyst?"}]}
    for sent in (items, by_id):
        whole = create(client, input=[user, *sent, question])
        assert whole.output_text == stored.output_text
        assert whole.usage == stored.usage
    third = create(client, input="Why?", previous_response_id=stored.id)
    assert third.usage.input_tokens > stored.usage.input_tokens
    # Instructions belong to one request.
    again = create(
        client, input="Is there a cyst?", previous_response_id=first.id, instructions="Be brief."
    )
    assert again.usage.input_tokens > stored.usage.input_tokens


def test_a_stop_string_does_not_break_a_conversation(client: openai.OpenAI) -> None:
    whole = create(client).output_text
    cut = create(client, extra_body=SEED | {"stop": whole[10:14]})
    assert cut.output_text == whole[: whole.index(whole[10:14])]
    following = create(client, input="Why?", previous_response_id=cut.id)
    user, answer = (
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": cut.output_text}
    )  # fmt: skip
    sent = create(client, input=[user, answer, {"role": "user", "content": "Why?"}])
    assert following.usage.input_tokens == sent.usage.input_tokens


def test_images_of_the_user_are_read(client: openai.OpenAI, running: RunningServer) -> None:
    image = Phantom("CT", "head").image(64)
    part = {"type": "input_image", "image_url": data_url(image), "detail": "auto"}
    content = [part, {"type": "input_text", "text": "Is there a cyst?"}]
    response = create(
        client, input=[{"type": "message", "role": "user", "content": content}], temperature=0
    )
    chat = client.chat.completions.create(
        model="tiny", temperature=0, extra_body={"mode": "text"},
        messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": data_url(image)}},
            {"type": "text", "text": "Is there a cyst?"},
        ]}],
    )  # fmt: skip
    assert response.output_text == chat.choices[0].message.content


def test_truncation_leaves_out_the_oldest_turns(client: openai.OpenAI) -> None:
    long, name, notes = "word " * 300, None, []
    for _ in range(6):
        response = create(
            client, input=long, previous_response_id=name, truncation="auto", max_output_tokens=4
        )
        name = response.id
        notes.append(response.model_dump().get("note"))
        assert response.usage.input_tokens <= 4096
    assert notes[0] is None
    assert notes[-1] == "truncation: The 2 oldest turns were left out."
    with pytest.raises(openai.BadRequestError) as caught:
        for _ in range(3):
            name = create(client, input=long, previous_response_id=name, max_output_tokens=4).id
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="context"):  # One turn is too long by itself.
        create(client, input="a b " * 3000, truncation="auto")


# --- the store --------------------------------------------------------------------------------


def test_a_response_is_retrieved_and_deleted_by_its_owner_only(
    client: openai.OpenAI, running: RunningServer
) -> None:
    response = create(client, tools=[TOOL])
    assert client.responses.retrieve(response.id) == response
    stranger = client.with_options(api_key="other")
    for call in (stranger.responses.retrieve, stranger.responses.delete):
        with pytest.raises(openai.NotFoundError, match="belongs to another API key"):
            call(response.id)
    with pytest.raises(openai.BadRequestError) as caught:
        create(stranger, previous_response_id=response.id)
    assert (caught.value.code, caught.value.param) == (
        "previous_response_not_found", "previous_response_id"
    )  # fmt: skip
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError) as gone:
        client.responses.retrieve(response.id)
    assert gone.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError, match="No such response"):
        create(client, previous_response_id=response.id)


def test_a_response_that_is_not_stored_is_not_found(client: openai.OpenAI) -> None:
    response = create(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_a_streamed_response_is_stored(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tiny", input=QUESTION, extra_body=SEED) as stream:
        final = stream.get_final_response()
    assert client.responses.retrieve(final.id).output_text == final.output_text


def test_models_with_the_same_tokens_share_conversations(
    client: openai.OpenAI, running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = create(client)
    assert create(client, model="other", previous_response_id=first.id).status == "completed"
    tokenizer = running.state.workers["other"].model.image_tokenizer
    monkeypatch.setattr(tokenizer, "fingerprint", "another token space")
    with pytest.raises(openai.BadRequestError, match="A model with other tokens"):
        create(client, model="other", previous_response_id=first.id)


def stored(number: int, size: int = 1000) -> StoredResponse:
    return StoredResponse({"id": f"resp_{number}", "text": "x" * size}, [1, 2], ("a", 1))


def test_ten_thousand_responses_stay_within_the_bytes() -> None:
    store = ResponseStore(max_bytes=100_000)
    for number in range(10_000):
        store.add("a", stored(number))
        assert store.size <= store.max_bytes
    assert store.get("a", "resp_9999") is not None
    assert store.get("a", "resp_0") is None
    assert 10 < len(store) < 100


def test_one_user_does_not_displace_the_responses_of_another() -> None:
    store = ResponseStore(max_bytes=100_000)
    store.add("quiet", stored(0))
    for number in range(1000):
        store.add("busy", stored(number))
    assert store.get("quiet", "resp_0") is not None
    assert store.get("busy", "resp_0") is None
    for number in range(1000):
        store.delete("busy", f"resp_{number}")
    assert store.delete("quiet", "resp_0")
    assert not store.delete("quiet", "resp_0")
    assert (len(store), store.size) == (0, 0)


def test_a_response_larger_than_the_store_is_dropped() -> None:
    store = ResponseStore(max_bytes=1000)
    store.add("a", stored(1, 10_000))
    assert (len(store), store.size) == (0, 0)


# --- refused requests -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": ""}, "input", "not empty"), ({"input": []}, "input", "not empty"),
        ({"input": ["x"]}, "input", "list of items"), ({"input": None}, "input", "got None"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type", "Unsupported item"),
        ({"input": [{"type": "function_call_output"}]}, "input[0].type", "'function_call_output'"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0]", "Unsupported role"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0]", "Must be text"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
         "input[0].content[0]", "Unsupported type (got 'input_file'"),
        ({"input": [{"type": "image_generation_call"}]}, "input[0]", "needs result"),
        ({"input": [{"role": "user", "content": "x"},
                    {"type": "image_generation_call", "id": "ig_0"}]},
         "input[1].content[0]", "no longer has the image 'ig_0'"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input", "must be a user message"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools[0]", "'function' 'f'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "'web_search'"),
        ({"tools": [{}]}, "tools[0]", "got None"),
        ({"tools": [TOOL | {"partial_images": 4}]}, "tools[0].partial_images", "0 to 3"),
        ({"tools": [TOOL | {"input_image_mask": {"file_id": "x"}}]}, "tools[0].input_image_mask",
         "not edited"),
        ({"tools": [TOOL | {"output_format": "webp"}]}, "tools[0].output_format", "PNG"),
        ({"tool_choice": "required"}, "tool_choice", "Needs the tool"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "Unsupported choice"),
        ({"text": {"format": {"type": "json_object"}}}, "text", "plain text"),
        ({"background": True}, "background", "background"), ({"n": 2}, "n", "one choice"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"include": ["message.output_text.logprobs"]}, "include", "no other parts"),
        ({"max_output_tokens": 9999}, "max_output_tokens", "limit 400"),
        ({"previous_response_id": "resp_0"}, "previous_response_id", "No such response"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "no separate reasoning"),
        ({"model": "tiny:text", "tools": [TOOL]}, "mode", "got mode any and model tiny:text"),
        ({"truncation": "some"}, "truncation", "auto"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_rejected_by_name(
    fields: dict[str, Any], param: str, message: str, running: RunningServer
) -> None:
    body = {"model": "tiny", "input": "x"} | fields
    response = httpx.post(running.url + PATH, json=body, timeout=60)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_items_of_one_response_are_one_message() -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "image_generation_call", "result": "aGk="},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "c"}]},
        {"role": "user", "content": None},
    ]
    messages, names = to_messages(items)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert names == ["input[0]", "input[1]", "input[4]"]
    assert [part["type"] for part in messages[1]["content"]] == ["output_text", "image_url", "text"]
    with pytest.raises(RequestError, match=r"input\[0\]"):
        to_messages([{"type": "image_generation_call", "result": 5}])
