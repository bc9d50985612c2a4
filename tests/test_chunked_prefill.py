"""Prompts that are read in parts, between the steps of other requests."""

from __future__ import annotations

from typing import Any

import pytest
from engine_runs import (
    TEXT,
    finish,
    long_text,
    make_engine,
    make_requests,
    make_scheduler,
)

import medley
from medley.generation import GenerationOptions, Request
from medley.generation.scheduler import Scheduler
from medley.inference.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return medley.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def requests(model: Model) -> list[Request]:
    return make_requests(model)


@pytest.fixture(scope="module")
def expected(model: Model, requests: list[Request]) -> list[list[int]]:
    """The outputs of whole prompts, one request at a time."""
    engine = make_engine(model)
    return [engine.generate([request])[0].ids for request in requests]


@pytest.mark.parametrize(("chunk_size", "fuse"), [(5, False), (32, True)])
def test_prompts_read_in_parts_give_the_same_tokens(
    model: Model, requests: list[Request], expected: list[list[int]], chunk_size: int, fuse: bool
) -> None:
    engine = make_engine(model, chunk_size, fuse)
    outputs = finish(engine, [engine.submit(request) for request in requests])
    assert [output.ids for output in outputs] == expected
    assert engine.runner.cache.num_slots == 0


def test_requests_that_join_between_the_parts_of_a_prompt_change_no_output(
    model: Model, requests: list[Request], expected: list[list[int]]
) -> None:
    """The half-read prompt lies between the slots of running sequences."""
    engine = make_engine(model, 8)
    tickets = []
    was_between = False
    for request in requests:
        tickets.append(engine.submit(request))
        for _ in range(3):
            engine.step()
            running = [s.full.slot for s in engine.scheduler.running]
            half_read = [b.slot for p in engine.scheduler.reading for b in p.branches]
            was_between |= bool(running and half_read and min(half_read) < max(running))
    assert was_between
    outputs = finish(engine, tickets)
    assert [output.ids for output in outputs] == expected


def test_part_of_a_prompt_is_at_most_one_chunk(
    model: Model, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, 16)
    sizes: list[int] = []
    prefill = engine.runner.prefill

    def record(parts: Any) -> Any:
        longest = max(min(part.num_tokens, part.prefill.remaining) for part in parts)
        sizes.append(longest * len(parts))
        return prefill(parts)

    monkeypatch.setattr(engine.runner, "prefill", record)
    finish(engine, [engine.submit(request) for request in requests])
    assert max(sizes) == 16


def test_running_sequences_continue_while_a_long_prompt_is_read(
    model: Model, requests: list[Request]
) -> None:
    engine = make_engine(model, 8)
    options = GenerationOptions(mode="image", max_images=1, seed=1)
    running = engine.submit(Request(requests[2].prompt, options))
    while not list(engine.poll(running)):
        engine.step()
    engine.submit(requests[0])
    steps = tokens = 0
    while len(engine.scheduler.running) == 1:
        engine.step()
        steps += 1
        tokens += len(list(engine.poll(running)))
    assert steps >= len(requests[0].prompt) / 8
    assert tokens >= steps / 3


def test_short_prompt_gets_its_first_token_before_a_long_one_is_read(
    model: Model, requests: list[Request]
) -> None:
    engine = make_engine(model, 16)
    long = [engine.submit(Request(requests[0].prompt, TEXT, i)) for i in range(12)]
    for _ in range(4):
        engine.step()
    short = engine.submit(requests[1])
    steps = 0
    while not list(engine.poll(short)):
        engine.step()
        steps += 1
    assert steps <= 3  # an earlier part, a decode step, its own pass
    assert not any(list(engine.poll(ticket)) for ticket in long)


def test_stream_of_short_prompts_does_not_starve_a_long_one(model: Model) -> None:
    scheduler = make_scheduler(model, max_seq_len=4096, max_num_seqs=8)
    scheduler.chunk_size = 16
    long = scheduler.add(Request([0] * 100, TEXT))
    passes = 0
    while scheduler.waiting or any(p.admission.ticket == long for p in scheduler.reading):
        scheduler.add(Request([0] * 5, TEXT))
        scheduler.admit()
        parts = scheduler.next_parts()
        scheduler.have_read(parts)
        read(scheduler, parts)
        passes += 1
        assert passes < 50


def read(scheduler: Scheduler, parts: Any) -> None:
    """What the engine does with parts, without a model; complete prompts leave."""
    from medley.generation.sequence import CFGBranch

    for prefill, num_tokens in parts:
        if prefill.branch is None:
            prefill.branch = CFGBranch(0, 0)
        prefill.branch.length += num_tokens
        if not prefill.remaining:
            scheduler.cancel(prefill.admission.ticket)


def test_cancelled_half_read_prompt_is_freed_and_others_continue(
    model: Model, requests: list[Request], expected: list[list[int]]
) -> None:
    engine = make_engine(model, 8)
    long, short, other = (engine.submit(requests[i]) for i in (0, 1, 4))
    while not any(prefill.branches for prefill in engine.scheduler.reading):
        engine.step()
    engine.step()
    engine.cancel(long)
    outputs = finish(engine, [short, other])
    assert [output.ids for output in outputs] == [expected[1], expected[4]]
    assert engine.runner.cache.num_slots == 0
    assert not list(engine.poll(long))


def test_half_read_prompt_rules_out_the_graph(model: Model, requests: list[Request]) -> None:
    """It would overwrite the keys and values of the prompt."""
    engine = make_engine(model, 8, fuse=True)
    engine.submit(requests[2])
    while not any(s.grammar.in_image for s in engine.scheduler.running):
        engine.step()
    engine.step()
    engine.runner.use_cuda_graph = True
    assert engine.runner.graph_steps(engine.scheduler.running) > 0
    engine.runner.use_cuda_graph = False
    engine.submit(requests[0])
    while not any(prefill.branches for prefill in engine.scheduler.reading):
        engine.step()
    engine.runner.use_cuda_graph = True
    assert engine.runner.graph_steps(engine.scheduler.running) == 0


def test_prompt_in_parts_begins_after_its_cached_prefix(
    model: Model, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, 16)
    first = Request(requests[0].prompt, TEXT, cache_prefix=True)
    (output,) = finish(engine, [engine.submit(first)])
    read_tokens = 0
    prefill_contexts = engine.runner._prefill_contexts

    def record(branches: Any, contexts: Any, starts: Any) -> Any:
        nonlocal read_tokens
        read_tokens += sum(len(c) - s for c, s in zip(contexts, starts, strict=True))
        return prefill_contexts(branches, contexts, starts)

    monkeypatch.setattr(engine.runner, "_prefill_contexts", record)
    turn = model.encode_prompt([long_text(30, 2)])[1:]
    second = Request([*first.prompt, *output.ids, *turn], TEXT)
    (chunked,) = finish(engine, [engine.submit(second)])
    assert len(turn) <= read_tokens <= len(turn) + 2
    assert chunked.ids == make_engine(model).generate([second])[0].ids
