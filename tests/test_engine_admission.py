"""Prompts that are read in parts, admission by memory, and requests for which memory runs out."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

import medley
from medley.commands.model_options import ModelOptions
from medley.commands.serve import ServeOptions, load_state
from medley.errors import UserError
from medley.generation import Engine, GenerationOptions, GenerationOutput, Request, kv_cache
from medley.generation.cache_budget import CacheBudget, cache_demand
from medley.generation.kv_cache import CachedPrefix, KeyValueCache
from medley.generation.out_of_memory import is_out_of_memory
from medley.generation.prefix_cache import PrefixCache
from medley.generation.scheduler import Scheduler
from medley.generation.sequence import Prefill
from medley.inference.batch import generate_all
from medley.inference.memory import cache_summary, check_cache_limits, limit_caches
from medley.inference.model import Model

GREEDY = {"text_greedy": True, "repetition_penalty": 1.0}
TEXT = GenerationOptions(mode="text", max_new_tokens=8, **GREEDY)
IMAGE = GenerationOptions(mode="image", max_images=1, max_new_tokens=70, seed=3)
WORDS = (
    "the",
    "scan",
    "of",
    "head",
    "chest",
    "shows",
    "a",
    "nodule",
    "cyst",
    "bright",
    "dark",
    "left",
)


@pytest.fixture(scope="module")
def model() -> Model:
    return medley.load("tiny", device="cpu")


def make_engine(model: Model, chunk_size: int | None = None, fuse: bool = False) -> Engine:
    codes = model.image_tokenizer.codes_per_image
    engine = Engine(model.engine.decoder, model.vocabulary, codes, fuse)
    if chunk_size is not None:
        engine.set_chunk_size(chunk_size)
    return engine


def long_text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture(scope="module")
def requests(model: Model) -> list[Request]:
    """Prompts of very different lengths, with and without images, text and guided images."""
    image = Image.new("RGB", (64, 64), "navy")
    prompts: list[list[Any]] = [
        [long_text(120)], ["Is there a cyst?"], ["Show me a CT scan of the head."],
        [long_text(40), image, "What does this scan show?"], [long_text(90, 1)],
        [long_text(20), image, "Show me a CT scan of the head."],
    ]  # fmt: skip
    # Greedy where the model does not know the prompt: there, thousands of image tokens are about
    # equally probable, and rounding decides between them.
    greedy = replace(IMAGE, image_greedy=True)
    options = [TEXT, TEXT, IMAGE, TEXT, TEXT, greedy]
    ids = [model.encode_prompt(prompt) for prompt in prompts]
    return [Request(p, o, i) for i, (p, o) in enumerate(zip(ids, options, strict=True))]


@pytest.fixture(scope="module")
def expected(model: Model, requests: list[Request]) -> list[list[int]]:
    """The outputs of whole prompts, one request at a time."""
    engine = make_engine(model)
    return [engine.generate([request])[0].ids for request in requests]


def finish(engine: Engine, tickets: Sequence[int]) -> list[GenerationOutput]:
    """Runs the engine until all requests have ended."""
    outputs: dict[int, GenerationOutput] = {}
    while engine.has_work:
        engine.step()
        for ticket in tickets:
            for _, token, output in engine.poll(ticket):
                if token is None:
                    outputs[ticket] = output
    return [outputs[ticket] for ticket in tickets]


# --- prompts in parts -------------------------------------------------------------------------


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


# --- memory runs out --------------------------------------------------------------------------

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


# --- memory by budget -------------------------------------------------------------------------


def make_scheduler(model: Model, max_bytes: int | None = None, **limits: int) -> Scheduler:
    """`max_bytes` with one byte per token."""
    budget = CacheBudget(1, PrefixCache(1 << 30))
    budget.max_bytes = max_bytes
    return Scheduler(model.vocabulary, 64, **limits, budget=budget)


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
