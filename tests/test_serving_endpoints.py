"""`/v1/completions`, `/v1/embeddings`, `/tokenize`, `/detokenize`, and `Model.embed`."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from running_server import RunningServer

import medley
from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.inference.token_logprobs import token_logprobs
from medley.phantoms import Phantom, report
from medley.serving.limits import Limits
from medley.serving.token_text import ids_to_text
from medley.utils.html import data_url

PROMPT = "Technique: CT."


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = RunningServer(Limits(request_timeout=60, max_tokens=400, max_images=2))
    yield server
    assert server.becomes_idle()
    server.stop()


@pytest.fixture(scope="module")
def model() -> medley.Model:
    return medley.load("tiny")


@pytest.fixture
def client(running: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as own:
        yield own


def error_of(running: RunningServer, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(running.url + path, json={"model": "tiny", **body}, timeout=60)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


# --- completions ------------------------------------------------------------------------------


def test_a_completion_is_the_raw_continuation(client: openai.OpenAI, model: medley.Model) -> None:
    completion = client.completions.create(model="tiny", prompt=PROMPT, temperature=0)
    (expected,) = model.generate(
        [PROMPT], mode="text", raw_prompt=True, text_greedy=True, max_new_tokens=16
    )
    choice = completion.choices[0]
    assert (choice.text, choice.index, choice.logprobs) == (expected, 0, None)
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(model.encode_prompt([PROMPT], raw_prompt=True))


def test_prompts_of_every_kind_have_one_choice_each(
    client: openai.OpenAI, model: medley.Model
) -> None:
    ids = model.encode_prompt([PROMPT], raw_prompt=True)
    for prompt in (PROMPT, ids, ids[1:], [PROMPT], [ids], [PROMPT, PROMPT], [ids, ids[1:]]):
        completion = client.completions.create(
            model="tiny", prompt=prompt, temperature=0, echo=True
        )  # fmt: skip
        texts = {choice.text for choice in completion.choices}
        assert len(texts) == 1
        assert texts.pop().startswith(PROMPT)
        assert [choice.index for choice in completion.choices] == list(
            range(len(completion.choices))
        )
    several = client.completions.create(model="tiny", prompt=["a", "b", "c"], n=2, max_tokens=2)
    assert [choice.index for choice in several.choices] == list(range(6))


@pytest.mark.parametrize("echo", [False, True])
def test_a_streamed_completion_is_the_complete_one(echo: bool, client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Is there"]
    common: Any = {"model": "tiny", "prompt": prompts, "seed": 3, "n": 2, "echo": echo}
    complete = [choice.text for choice in client.completions.create(**common).choices]
    texts, reasons, usage = [""] * 4, [""] * 4, None
    stream = client.completions.create(
        **common, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == complete
    assert all(reasons)
    assert usage is not None


def test_a_stop_string_ends_a_completion(client: openai.OpenAI) -> None:
    common: Any = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 30}
    whole = client.completions.create(**common).choices[0].text
    stop = whole[5:9]
    cut = client.completions.create(**common, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_log_probabilities_are_those_of_the_model(
    client: openai.OpenAI, model: medley.Model
) -> None:
    completion = client.completions.create(
        model="tiny", prompt=PROMPT, temperature=0, max_tokens=8, echo=True, logprobs=2
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == completion.choices[0].text
    assert logprobs.token_logprobs[0] is None
    option = GenerationOptions(mode="text", text_greedy=True, max_new_tokens=8)
    (response,) = model.generate_responses([[PROMPT]], [option], raw_prompt=True)
    ids = model.encode_prompt([PROMPT], raw_prompt=True) + response.ids
    with torch.inference_mode():
        logits = model.decoder(torch.tensor([ids])).logits[0].float()
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    # The text state's tokens that the model never predicts do not matter: every token has a value.
    torch.testing.assert_close(
        torch.tensor(logprobs.token_logprobs[1:]), expected[1:], atol=1e-3, rtol=1e-3
    )
    best = [max(values.values()) for values in logprobs.top_logprobs[1:]]
    assert all(a >= b - 1e-6 for a, b in zip(best, logprobs.token_logprobs[1:], strict=True))
    offsets = list(itertools.accumulate(map(len, logprobs.tokens), initial=0))[:-1]
    assert logprobs.text_offset == offsets
    only_new = client.completions.create(
        model="tiny", prompt=PROMPT, temperature=0, max_tokens=8, logprobs=0
    ).choices[0]
    assert only_new.logprobs is not None
    assert only_new.logprobs.tokens == logprobs.tokens[-len(response.ids) :]


def test_log_probabilities_of_a_prompt_need_no_generation(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model="tiny", prompt=[PROMPT, "a"], max_tokens=0, echo=True, logprobs=1
    )
    assert [choice.text for choice in completion.choices] == [PROMPT, "a"]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 0


def test_blocks_of_log_probabilities_join(
    model: medley.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = model.encode_prompt([PROMPT * 4], raw_prompt=True)
    whole = token_logprobs(model.engine, ids, 3)
    monkeypatch.setattr("medley.inference.token_logprobs._BLOCK", 2)
    parts = token_logprobs(model.engine, ids, 3)
    assert [row.token for row in whole] == [row.token for row in parts] == ids[1:]
    for first, second in zip(whole, parts, strict=True):
        assert first.logprob == pytest.approx(second.logprob, abs=1e-4)


def test_a_completion_may_have_images(client: openai.OpenAI) -> None:
    for name, fields in (("tiny:image", {}), ("tiny", {"mode": "image"})):
        completion = client.completions.create(
            model=name, prompt=PROMPT, max_tokens=100, extra_body=fields
        )
        choice = completion.choices[0].model_dump()
        assert choice["images"][0]["type"] == "image_url"
        assert choice["text"].startswith("[image ")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": []}, "prompt", "Must not be empty"), ({"prompt": [[]]}, "prompt", "Item 0"),
        ({"prompt": ["a", 5]}, "prompt", "Item 1"), ({"prompt": {}}, "prompt", "got {}"),
        ({"prompt": [[1, -1]]}, "prompt", "Item 0"), ({"prompt": [[True]]}, "prompt", "Item 0"),
        ({"prompt": [[2**31]]}, "prompt", "Item 0"), ({"prompt": ["a"] * 129}, "prompt", "128"),
        ({"prompt": [99_999]}, "prompt[0]", "Unknown token id (got 99999"),
        ({"prompt": ["a", [99_999]]}, "prompt[1][0]", "Unknown token id"),
        ({"max_tokens": 0}, "max_tokens", "needs echo"), ({"suffix": "x"}, "suffix", "not filled"),
        ({"max_tokens": 9999}, "max_tokens", "limit 400"), ({"logprobs": 99}, "logprobs", "20"),
        ({"logprobs": 1, "stream": True}, "logprobs", "stream"), ({"best_of": 2}, "best_of", "n"),
        ({"logprobs": 1, "stop": "a"}, "logprobs", "stop"), ({"n": 9}, "n", "limit 8"),
        ({"logprobs": 1, "mode": "any"}, "logprobs", "mode text"),
        ({"logprobs": 1, "model": "tiny:image"}, "logprobs", "mode text (got image)"),
        ({"max_tokens": 0, "echo": True, "n": 2}, "n", "Must be 1 with max_tokens 0 (got 2)"),
        ({"prompt": "x" * 99_000}, "prompt", "does not fit"),
    ],
)  # fmt: skip
def test_invalid_completions_are_rejected(
    fields: dict[str, Any], param: str, message: str, running: RunningServer
) -> None:
    error = error_of(running, "/v1/completions", **({"prompt": "x"} | fields))
    assert error["param"] == param
    assert message in error["message"]


# --- tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", PROMPT, "a <image> b</s>", "\u00e4\u4e00\U0001f600", " \n\n x "]
)
def test_text_becomes_tokens_and_comes_back(text: str, running: RunningServer) -> None:
    tokens = httpx.post(f"{running.url}/tokenize", json={"prompt": text}).json()
    assert tokens["tokens"] == running.model.encode_prompt([text] if text else [], raw_prompt=True)
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == running.model.engine.max_seq_len
    body = {"tokens": tokens["tokens"]}
    assert httpx.post(f"{running.url}/detokenize", json=body).json() == {"prompt": text}
    bare = {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
    result = httpx.post(f"{running.url}/tokenize", json=bare).json()
    assert result["tokens"] == tokens["tokens"][1:]
    assert len(result["token_strs"]) == result["count"]


def test_messages_become_tokens_with_their_images(running: RunningServer) -> None:
    url = data_url(Phantom("CT", "head").image(64))
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}]}
    tokens = httpx.post(f"{running.url}/tokenize", json=body, timeout=60).json()["tokens"]
    assert tokens == running.model.encode_prompt([Phantom("CT", "head").image(64), "What?"])
    text = httpx.post(f"{running.url}/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text == "<image>What?<reserved08706>"


def test_incomplete_and_unusual_tokens_have_their_names(model: medley.Model) -> None:
    vocabulary, tokenizer = model.vocabulary, model.text_tokenizer
    begin, end, code = vocabulary.begin_image, vocabulary.end_image, vocabulary.image_codes[7]
    whole = [vocabulary.bos, begin, code, end]
    assert ids_to_text(whole, tokenizer) == "<image>"
    assert ids_to_text([begin, code], tokenizer) != "<image>"
    assert "<image>" not in ids_to_text([code, end], tokenizer)
    assert ids_to_text([begin, *tokenizer.encode("x"), end], tokenizer).count("x") >= 1
    assert ids_to_text([vocabulary.eos, vocabulary.bos], tokenizer) == "</s><s>"
    assert ids_to_text([], tokenizer) == ""


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "Send either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [{}]}, "Send either prompt or messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": ""}]}, "needs text or an image"),
        ("/detokenize", {"tokens": [99_999]}, "tokens[0]: Unknown token id"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]: "), ("/detokenize", {}, "tokens: "),
        ("/detokenize", {"tokens": "x"}, "tokens: "),
    ],
)  # fmt: skip
def test_invalid_tokens_are_rejected(
    path: str, body: dict[str, Any], message: str, running: RunningServer
) -> None:
    assert message in error_of(running, path, **body)["message"]


# --- embeddings -------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_of_the_hidden_states(model: medley.Model) -> None:
    prompts = ["a cyst", [Phantom("CT", "head").image(64), "a nodule"]]
    ids = [model.encode_prompt(prompt, raw_prompt=True) for prompt in prompts]  # type: ignore[arg-type]
    count = model.decoder.config.num_hidden_layers
    for layer in range(count + 1):
        rows = model.embed(prompts, layer)  # type: ignore[arg-type]
        assert rows.shape == (2, model.decoder.config.hidden_size)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
        for row, own in zip(rows, ids, strict=True):
            with torch.inference_mode():
                states = model.decoder.model(  # type: ignore[call-arg]
                    input_ids=torch.tensor([own]), output_hidden_states=True, use_cache=False
                ).hidden_states[layer]  # type: ignore[attr-defined]
            mean = states[0, 1:].mean(0)
            torch.testing.assert_close(row, mean / mean.norm(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.embed(prompts), model.embed(prompts, (count + 1) // 2))  # type: ignore[arg-type]
    assert model.embed([]).shape == (0, model.decoder.config.hidden_size)


@pytest.mark.parametrize(
    ("prompt", "layer", "message"),
    [
        ("", None, "An empty input has no embedding"), ([], None, "An empty input"),
        ("x", 7, "layer is 7, expected 0"), ("x", -1, "layer is -1"),
        ("x " * 9000, None, "the model's context is 4096 tokens"),
    ],
)  # fmt: skip
def test_inputs_without_an_embedding_are_rejected(
    prompt: Any, layer: int | None, message: str, model: medley.Model
) -> None:
    with pytest.raises(UserError, match=message):
        model.embed([prompt] if prompt != "" else [[]], layer)


def test_images_are_retrieved_by_the_image_of_the_same_region(model: medley.Model) -> None:
    """Every phantom twice, with other noise: the nearest image is the other one of its kind."""
    rng = np.random.default_rng(3)
    scans = [Phantom.random(rng) for _ in range(24)]
    images = model.embed([[scan.image(64)] for scan in scans])
    texts = model.embed([report(scan) for scan in scans])
    kinds = [(scan.modality, scan.organ) for scan in scans]
    scores = images @ images.T
    scores.fill_diagonal_(-1)
    has_other = [kinds.count(kind) > 1 for kind in kinds]
    hits = [
        kinds[int(j)] == kind
        for kind, j, other in zip(kinds, scores.argmax(1), has_other, strict=True) if other
    ]  # fmt: skip
    assert np.mean(hits) > 0.6  # by chance about 0.1
    assert texts.shape == images.shape


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_the_server_gives_the_embeddings_of_the_library(
    encoding: Any, client: openai.OpenAI, model: medley.Model
) -> None:
    fields = {} if encoding is None else {"encoding_format": encoding}
    texts = ["a cyst", "a nodule", PROMPT]
    result = client.embeddings.create(model="tiny", input=texts, **fields)
    rows: list[Any] = [row.embedding for row in result.data]
    if encoding == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    torch.testing.assert_close(
        torch.tensor(np.array(rows), dtype=torch.float32), model.embed(texts), atol=1e-4, rtol=1e-3
    )
    method = result.model_extra["method"] if result.model_extra else None
    assert method == {"pooling": "mean", "layer": 3, "normalized": True, "hidden_layers": 6}
    assert result.usage.prompt_tokens == sum(
        len(model.encode_prompt([text], raw_prompt=True)) for text in texts
    )


def test_images_and_mixtures_have_embeddings(running: RunningServer, model: medley.Model) -> None:
    image = Phantom("CT", "head").image(64)
    part = {"type": "image_url", "image_url": {"url": data_url(image)}}
    text = {"type": "text", "text": "a cyst"}
    ids = model.encode_prompt(["a cyst"], raw_prompt=True)
    body = {"model": "tiny", "input": [part, [part, text], "a cyst", ids, text]}
    data = httpx.post(f"{running.url}/v1/embeddings", json=body, timeout=60).json()["data"]
    rows = torch.tensor([row["embedding"] for row in data])
    expected = model.embed([[image], [image, "a cyst"], "a cyst", "a cyst", "a cyst"])
    torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-3)


def test_embeddings_do_not_disturb_running_responses(
    running: RunningServer, client: openai.OpenAI
) -> None:
    common: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Show a scan."}],
                   "seed": 5, "extra_body": {"mode": "image"}}  # fmt: skip
    alone = client.chat.completions.create(**common).choices[0].message.model_dump()
    stream = client.chat.completions.create(**common, stream=True)
    images: list[Any] = []
    client.embeddings.create(model="tiny", input=["a", "b", "c"])
    for chunk in stream:
        images += chunk.choices[0].delta.model_dump().get("images") or []
    assert images == alone["images"]
    assert running.becomes_idle()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": ""}, "input", "empty"), ({"input": []}, "input", "Must not be empty"),
        ({"input": [""]}, "input", "Item 0 is empty"), ({"input": [[]]}, "input", "Item 0"),
        ({"input": ["a", None]}, "input", "Item 1"), ({"input": None}, "input", "got None"),
        ({"input": [{}]}, "input[0][0]", "Unsupported type"), ({"layer": -1}, "layer", "0"),
        ({"input": [{"type": "text", "text": ""}]}, "input[0]", "An empty input"),
        ({"input": [{"type": "image_url"}] * 3}, "input", "Too many images"),
        ({"input": [{"type": "image_url", "image_url": "http://x"}]}, "input[0][0]", "Unsupp"),
        ({"input": ["a"] * 2049}, "input", "2048"), ({"layer": 7}, None, "layer is 7"),
        ({"dimensions": 4}, "dimensions", "width of the model"), ({"t": [1]}, "t", "Unknown"),
        ({"encoding_format": "int8"}, "encoding_format", "base64"),
        ({"input": "\u4e00" * 5000}, None, "the model's context is 4096"),
    ],
)  # fmt: skip
def test_invalid_embeddings_are_rejected(
    fields: dict[str, Any], param: str | None, message: str, running: RunningServer
) -> None:
    error = error_of(running, "/v1/embeddings", **({"input": "x"} | fields))
    assert error["param"] == param
    assert message in error["message"]


def test_a_call_of_a_stopped_worker_fails(model: medley.Model) -> None:
    server = RunningServer(Limits())
    server.stop()
    with pytest.raises(UserError, match="shutting down"):
        server.worker.call(lambda model: json.dumps(None))
