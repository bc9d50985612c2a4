"""Memory that runs out in the engine ends one request, and the others continue."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_runs import (
    TEXT,
    finish,
    make_engine,
    make_requests,
)

import medley
from medley.errors import UserError
from medley.generation import Engine, GenerationOutput, Request, kv_cache
from medley.generation.out_of_memory import is_out_of_memory
from medley.inference.batch import generate_all
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


ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: MemoryError(),
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12 bytes."),
]


def fail_once(function: Any, error: Exception, call: int) -> Any:
    """`function`, whose call number `call` raises the error."""
    calls = 0

    def work(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls - 1 == call:
            raise error
        return function(*args, **kwargs)

    return work


@pytest.mark.parametrize("make_error", ERRORS)
def test_failed_allocations_of_every_device_are_recognized(
    make_error: Callable[[], Exception],
) -> None:
    assert is_out_of_memory(make_error())
    assert not is_out_of_memory(RuntimeError("The size of tensor a must match."))


@pytest.mark.parametrize(
    ("call", "chunk_size"), [(0, None), (13, None), (30, None), (3, 64), (20, 64), (25, 64)]
)
def test_memory_that_runs_out_while_the_cache_grows_ends_at_most_one_request(
    model: Model, requests: list[Request], expected: list[list[int]], call: int,
    chunk_size: int | None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine = make_engine(model, chunk_size)
    few = requests[:4]
    with monkeypatch.context() as patched:
        stub = fail_once(kv_cache._resize, ERRORS[call % 3](), call)
        patched.setattr(kv_cache, "_resize", stub)
        outputs = finish(engine, [engine.submit(request) for request in few])
    check_that_others_are_right(engine, few, outputs, expected[:4])


@pytest.mark.parametrize("call", [0, 2])
@pytest.mark.parametrize(
    "method", ["_prefill_contexts", "_decode", "logits", "open_cfg_branches", "_make_sequence"]
)
def test_memory_that_runs_out_in_a_pass_ends_at_most_one_request(
    model: Model, requests: list[Request], expected: list[list[int]], method: str, call: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine = make_engine(model, 64)
    few = requests[1:4]
    with monkeypatch.context() as patched:
        stub = fail_once(getattr(engine.runner, method), ERRORS[call](), call)
        patched.setattr(engine.runner, method, stub)
        outputs = finish(engine, [engine.submit(request) for request in few])
    check_that_others_are_right(engine, few, outputs, expected[1:4])


def check_that_others_are_right(
    engine: Engine, requests: list[Request], outputs: list[GenerationOutput],
    expected: list[list[int]],
) -> None:  # fmt: skip
    """At most one request has failed, and the engine works as before."""
    failed = [output for output in outputs if output.error is not None]
    assert len(failed) <= 1
    for output in failed:
        assert output.finish_reason == "error"
        assert "cpu ran out of memory while" in str(output.error)
    for output, ids in zip(outputs, expected, strict=True):
        assert output.error is not None or output.ids == ids
    assert engine.runner.cache.num_slots == 0
    assert not engine.has_work
    again = finish(engine, [engine.submit(request) for request in requests[:2]])
    assert [output.ids for output in again] == expected[:2]


def test_memory_that_never_suffices_ends_every_request(
    model: Model, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "_decode", fail)
        outputs = engine.generate(requests[:3])
    assert [output.finish_reason for output in outputs] == ["error"] * 3
    assert not engine.has_work
    assert engine.generate(requests[1:2])[0].error is None


def test_other_errors_of_a_pass_are_raised(
    model: Model, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    engine.keep_idle_cache()
    monkeypatch.setattr(engine.runner, "_decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(requests[:2])
    assert not engine.has_work
    assert engine.runner.cache.nbytes == 0  # it may contain NaN


def test_batch_reports_the_request_that_ran_out_of_memory_and_continues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = medley.load("tiny", device="cpu")
    runner = model.engine.runner
    stub = fail_once(runner._prefill_contexts, torch.OutOfMemoryError("CUDA out of memory."), 1)
    monkeypatch.setattr(runner, "_prefill_contexts", stub)
    prompts = [(i, [f"Is there a cyst {i}?"], TEXT) for i in range(3)]
    results = dict(generate_all(model, prompts, batch_size=1))
    assert "ran out of memory" in str(results[1])
    assert not isinstance(results[0], str) and not isinstance(results[2], str)
    monkeypatch.setattr(runner, "_prefill_contexts", fail_once(None, MemoryError(), 0))
    with pytest.raises(UserError, match="cpu ran out of memory while its prompt was read"):
        model.generate(["Is there a cyst?"], mode="text", max_new_tokens=3)


@pytest.mark.parametrize("failing", range(4))
def test_a_cache_that_could_not_grow_has_the_capacity_of_its_smallest_tensor(
    model: Model, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Two layers have four tensors; the allocation of any one of them may fail."""
    config = copy.copy(model.engine.decoder.config)
    config.num_hidden_layers = 2
    cache = kv_cache.KeyValueCache(config, torch.float32, torch.device("cpu"), 8)
    assert [cache.add_slot(), cache.add_slot()] == [0, 1]
    cache.reserve(10)
    before, resize, calls = cache.capacity, kv_cache._resize, iter(range(8))

    def resize_or_fail(*arguments: Any) -> torch.Tensor:
        if next(calls) == failing:
            raise torch.OutOfMemoryError("no memory")
        return resize(*arguments)

    monkeypatch.setattr(kv_cache, "_resize", resize_or_fail)
    with pytest.raises(torch.OutOfMemoryError):
        cache.reserve(before[1] + 1)
    assert cache.capacity == before
    cache.reserve(before[1] + 1)
    assert cache.capacity[1] > before[1]
    assert all(t.shape[2] == cache.capacity[1] for t in (*cache._keys, *cache._values))
