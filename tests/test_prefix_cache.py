"""The prefix cache: a prompt that begins with an earlier conversation is not read again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import medley
from medley.generation import Engine, GenerationOptions, Request
from medley.generation.kv_cache import CachedPrefix
from medley.generation.prefix_cache import PrefixCache
from medley.inference.model import Model

GREEDY = {"text_greedy": True, "repetition_penalty": 1.0}


def make_engine(decoder: Any, fuse: bool, model: Model) -> Engine:
    return Engine(decoder, model.vocabulary, model.image_tokenizer.codes_per_image, fuse)


@pytest.fixture(scope="module")
def model() -> Model:
    return medley.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    """Prompts of different lengths, one with an image."""
    image = Image.new("RGB", (64, 64), "navy")
    parts = [["Is there a cyst?"], [image, "What does this scan show?"], ["Show me a head."]]
    return [model.encode_prompt(p) for p in parts]


def test_chat_prefills_only_the_new_turn_and_gives_the_same_output(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", (64, 64), "gray")
    session = model.chat(mode="text", max_new_tokens=20, **GREEDY)
    prefilled: list[int] = []
    prefill = model.engine.runner._prefill_contexts

    def record(branches: Any, contexts: Any, starts: Any) -> Any:
        prefilled.append(sum(len(c) - s for c, s in zip(contexts, starts, strict=True)))
        return prefill(branches, contexts, starts)

    monkeypatch.setattr(model.engine.runner, "_prefill_contexts", record)
    responses, contexts = [], []
    for turn in ((image, "Is there a cyst?"), ("Where is it?",), ("How large?",)):
        contexts.append([*session.ids, *model.encode_prompt(list(turn))[1:]])
        *_, last = session.send(*turn)
        assert last.response is not None
        responses.append(last.response.ids)
    assert prefilled[0] == len(contexts[0])
    assert all(count < 25 for count in prefilled[1:])
    engine = make_engine(model.engine.decoder, False, model)
    options = GenerationOptions(mode="text", max_new_tokens=20, **GREEDY)
    assert responses == [engine.generate([Request(ids, options)])[0].ids for ids in contexts]


def test_prefix_cache_evicts_the_oldest_and_replaces_shorter_prefixes() -> None:
    def prefix(*ids: int) -> CachedPrefix:
        return CachedPrefix(ids, (torch.zeros(2, 1, len(ids), 4),))

    cache = PrefixCache(3 * prefix(*range(20)).nbytes)
    for start in range(4):
        cache.add(prefix(*range(start, start + 20)))
    assert len(cache) == 3
    assert cache.find([0, *range(1, 20)]) is None  # the oldest was evicted
    found = cache.find([*range(3, 20), 99, 100])
    assert found is not None
    assert found[1] == 17
    cache.add(prefix(*range(3, 24)))  # replaces the prefix that it begins with
    assert len(cache) == 2  # and evicts one of the other two
    assert cache.find([*range(2, 22), 99]) is not None


def test_prefix_cache_has_room_for_one_full_context(model: Model) -> None:
    engine = make_engine(model.engine.decoder, False, model)
    config = model.engine.decoder.config
    per_token = engine.runner.prefixes.max_bytes / engine.max_seq_len
    assert per_token >= 2 * config.num_hidden_layers * config.hidden_size * 4
