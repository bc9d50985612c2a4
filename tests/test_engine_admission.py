"""Requests are admitted by the memory that their keys and values may need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_runs import (
    TEXT,
    finish,
    long_text,
    make_engine,
    make_requests,
    make_scheduler,
)

import medley
from medley.commands.model_options import ModelOptions
from medley.commands.serve import ServeOptions, load_state
from medley.errors import UserError
from medley.generation import GenerationOptions, Request, kv_cache
from medley.generation.cache_budget import CacheBudget, cache_demand
from medley.generation.kv_cache import CachedPrefix, KeyValueCache
from medley.generation.prefix_cache import PrefixCache
from medley.generation.sequence import Prefill
from medley.inference.memory import cache_summary, check_cache_limits, limit_caches
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


@pytest.mark.parametrize("chunk_size", [None, 64])
def test_cache_stays_within_its_budget_and_outputs_are_the_same(
    model: Model, requests: list[Request], expected: list[list[int]], chunk_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Room for one guided image sequence, or for two to three text sequences."""
    engine = make_engine(model, chunk_size)
    few = requests[:4]
    largest = max(engine.budget.needed([engine.scheduler._demand(r)]) for r in few)
    engine.set_cache_bytes(largest)
    sizes: list[int] = []
    resize = kv_cache._resize

    def record(*args: Any) -> Any:
        resized = resize(*args)
        sizes.append(engine.runner.cache.nbytes)
        return resized

    monkeypatch.setattr(kv_cache, "_resize", record)
    outputs = finish(engine, [engine.submit(request) for request in few])
    assert [output.ids for output in outputs] == expected[:4]
    assert 0 < max(sizes) <= largest


def test_request_that_can_never_fit_is_refused_with_the_figures(model: Model) -> None:
    engine = make_engine(model)
    per_token = engine.budget.bytes_per_token
    engine.set_cache_bytes(1024 * per_token)
    engine.check(Request([0] * 10, GenerationOptions(mode="text", max_new_tokens=1000)))
    with pytest.raises(UserError) as caught:
        engine.submit(Request([0] * 10, GenerationOptions(max_new_tokens=1000)))
    message = str(caught.value)
    needed = 3 * 1024 * per_token / 1e9
    assert f"3 guidance branches of 1010 tokens need {needed:.3g} GB" in message
    assert f"limit {1024 * per_token / 1e9:.3g} GB" in message
    for advice in (
        "max_new_tokens",
        "guidance scales",
        "--kv_cache_gb",
        "--gpu_memory_utilization",
    ):
        assert advice in message
    assert "\n" not in message
    with pytest.raises(UserError, match="1 branch of 4096 tokens"):
        engine.generate([Request([0] * 10, GenerationOptions(mode="text"))])
    assert not engine.has_work


def test_demand_is_the_worst_case_of_a_request(model: Model) -> None:
    vocabulary = model.vocabulary
    image = [vocabulary.begin_image, *list(vocabulary.image_codes)[:64], vocabulary.end_image]

    def demand(prompt: list[int], **options: Any) -> tuple[int, int]:
        return cache_demand(Request(prompt, GenerationOptions(**options)), vocabulary, 64, 4096)

    assert demand([0], mode="text") == (1, 4096)
    assert demand([0], mode="text", max_new_tokens=9) == (1, 10)
    assert demand([0] * 4000, max_new_tokens=200) == (2, 4096)
    assert demand([0], max_new_tokens=65) == (1, 66)  # no room for an image
    assert demand([0], max_new_tokens=66) == (2, 67)
    assert demand([0], max_new_tokens=132) == (3, 133)
    assert demand([0], max_new_tokens=132, max_images=1) == (2, 133)
    assert demand([0, *image], max_new_tokens=66) == (3, 133)
    unguided = {"guidance_scale_text": 1.0, "guidance_scale_image": 1.0}
    assert demand([0, *image], max_new_tokens=66, **unguided) == (1, 133)


def test_large_request_waits_and_later_ones_do_not_overtake_it(model: Model) -> None:
    """Otherwise a stream of small requests would keep it waiting forever."""
    scheduler = make_scheduler(model, max_bytes=1024, max_seq_len=4096, max_num_seqs=8)
    small = [scheduler.add(Request([0] * 10, TEXT)) for _ in range(3)]
    large = scheduler.add(Request([0] * 400, TEXT))
    last = scheduler.add(Request([0] * 10, TEXT))

    def admitted() -> list[int]:
        scheduler.admit()
        return [prefill.admission.ticket for prefill in scheduler.reading]

    assert admitted() == small
    scheduler.cancel(small[0])
    assert admitted() == small[1:]
    scheduler.cancel(small[1])
    assert admitted() == [small[2], large]
    scheduler.cancel(small[2])
    assert admitted() == [large, last]
    assert all(isinstance(p, Prefill) for ticket in (large, last) for p in scheduler.cancel(ticket))
    assert not scheduler.has_work


def test_cached_prefixes_make_room_for_sequences() -> None:
    prefixes = PrefixCache(1 << 30)
    budget = CacheBudget(8, prefixes)
    for start in range(4):
        ids = tuple(range(start, start + 20))
        prefixes.add(CachedPrefix(ids, (torch.zeros(2, 1, 20, 4),)))
    each = prefixes.nbytes // 4
    budget.max_bytes = 256 * 8 + 2 * each
    demand = cache_demand(
        Request([0], GenerationOptions(mode="text", max_new_tokens=5)),
        medley.load("tiny").vocabulary, 64, 4096,
    )  # fmt: skip
    assert budget.fits([demand])
    assert len(prefixes) == 2
    assert budget.cache_bytes == 256 * 8
    assert not budget.fits([demand, demand])
    assert len(prefixes) == 0


def test_cache_gives_up_what_ended_sequences_have_left(model: Model) -> None:
    """A long sequence and many short ones need different shapes within one budget."""
    cache = KeyValueCache(model.engine.decoder.config, torch.float32, torch.device("cpu"), 24)
    per_token = kv_cache.bytes_per_token(model.engine.decoder.config, torch.float32)
    cache.max_bytes, cache.idle_bytes = 8 * 256 * per_token, 1 << 40
    for slots, length in ((1, 2048), (8, 256), (2, 1024), (4, 512), (1, 2048)):
        cache.max_length = length
        for _ in range(slots):
            cache.add_slot()
        assert cache.reserve(length) == length
        assert cache.nbytes <= cache.max_bytes
        for keys in cache._keys:
            assert keys.shape[0] >= slots and keys.shape[2] >= length
        for slot in range(slots)[::-1]:
            cache.remove_slot(slot, length)


def test_idle_cache_is_kept_for_one_sequence_only(model: Model, requests: list[Request]) -> None:
    engine = make_engine(model)
    engine.keep_idle_cache()
    cache = engine.runner.cache
    engine.generate(requests[:1])
    kept, allocations = cache.nbytes, cache.allocations
    assert 0 < kept <= engine.runner.guided_sequence_bytes
    engine.generate(requests[:1])
    assert (cache.nbytes, cache.allocations) == (kept, allocations)
    cache.idle_bytes = kept
    engine.generate([requests[0], requests[1]] * 4)
    assert cache.nbytes <= kept


def test_free_memory_is_shared_by_the_models_of_a_process(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = medley.load("tiny", device="cpu")
    monkeypatch.setattr("medley.inference.memory.free_memory", lambda device: 1_000_000_000)
    limit_caches([other])
    assert other.engine.budget.max_bytes == 900_000_000
    limit_caches([other, model], gpu_memory_utilization=0.5)
    assert other.engine.budget.max_bytes == model.engine.budget.max_bytes == 250_000_000
    limit_caches([other], kv_cache_gb=0.2)
    assert other.engine.budget.max_bytes == 200_000_000
    rows = 200_000_000 // (4096 * other.engine.budget.bytes_per_token)
    assert f"room for {rows} sequences of 4096 tokens" in cache_summary(other)
    limit_caches([model])
    for values in ((0.0, 0.9), (None, 0.0), (None, 1.1), (float("nan"), 0.9)):
        with pytest.raises(UserError, match="must be"):
            check_cache_limits(*values)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"chunked_prefill_size": 0}, r"--chunked_prefill_size must be at least 1 \(got 0\)"),
        ({"kv_cache_gb": -1.0}, r"--kv_cache_gb must be positive \(got -1.0\)"),
        ({"gpu_memory_utilization": 90.0}, r"above 0, at most 1 \(got 90.0\)"),
    ],
)
def test_flags_out_of_range_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServeOptions(ckpt=["tiny"], **flags)


def test_flags_reach_the_engine() -> None:
    state = load_state(ServeOptions(ckpt=["a=tiny", "b=tiny"], kv_cache_gb=0.5, device="cpu"))
    engines = [worker.model.engine for worker in state.workers.values()]
    assert [engine.budget.max_bytes for engine in engines] == [250_000_000] * 2
    assert [engine.scheduler.chunk_size for engine in engines] == [128, 128]
    options = ServeOptions(ckpt=["tiny"], chunked_prefill_size=40, device="cpu")
    engine = load_state(options).workers["tiny"].model.engine
    assert engine.scheduler.chunk_size == 40
    assert engine.budget.max_bytes is not None
    model = ModelOptions(ckpt="tiny", kv_cache_gb=0.25, device="cpu").load()
    assert model.engine.budget.max_bytes == 250_000_000


def test_a_lone_request_evicts_the_prefixes_that_it_has_no_room_beside(model: Model) -> None:
    engine = make_engine(model)
    conversation = Request(model.encode_prompt("Is there a cyst?"), TEXT, 0, cache_prefix=True)
    engine.generate([conversation])
    assert len(engine.runner.prefixes) == 1
    request = Request(model.encode_prompt(long_text(60)), TEXT, 1)
    codes = model.image_tokenizer.codes_per_image
    demand = cache_demand(request, model.vocabulary, codes, engine.max_seq_len)
    engine.set_cache_bytes(engine.budget.needed([demand]) + 1)
    assert engine.generate([request])[0].finish_reason
    assert len(engine.runner.prefixes) == 0
