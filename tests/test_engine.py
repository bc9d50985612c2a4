"""The engine: scheduler, model runner, sequences that join and leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import make_scheduler
from PIL import Image

import medley
from medley.checkpoints.checkpoint import open_checkpoint
from medley.errors import UserError
from medley.generation import Engine, GenerationOptions, Request
from medley.generation.fused_decode import FusedDecoder
from medley.generation.kv_cache import KeyValueCache
from medley.generation.model_runner import GRAPH_STEPS
from medley.generation.scheduler import PREFILL_TOKENS, Scheduler
from medley.generation.sequence import Prefill
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


# --- model runner -----------------------------------------------------------------------------


@pytest.mark.parametrize("swin_norm", [False, True])
def test_fused_step_equals_the_modules(layout: Path, swin_norm: bool) -> None:
    """With grouped heads (the 30b layout), both norm positions, branches of unequal length."""
    decoder = open_checkpoint(layout / "input").decoder(torch.float32)
    if swin_norm:
        state, decoder.config.swin_norm = decoder.state_dict(), True
        decoder = type(decoder)(decoder.config).eval()
        decoder.load_state_dict(state)
    ids = torch.randint(8720, 8790, (3, 40), generator=torch.Generator().manual_seed(0))
    delays = torch.tensor([0, 3, 11])  # steps by which each branch starts after the first
    cache = KeyValueCache(decoder.config, torch.float32, torch.device("cpu"), 3)
    with torch.inference_mode():
        expected = decoder.model(ids, use_cache=False).last_hidden_state
        step = FusedDecoder(decoder)
        for _ in ids:
            cache.add_slot()
        for time in range(ids.shape[1] + int(delays.max())):
            positions = (time - delays).clamp(0, ids.shape[1] - 1)  # waiting ones rewrite it
            length = int(positions.max()) + 1
            cache.set_write_positions(0, positions[:, None], length)
            mask = torch.arange(length) <= positions[:, None]
            branches = torch.arange(len(ids))
            states = step(ids[branches, positions], positions, mask[:, None, None], cache)
            assert torch.allclose(states, expected[branches, positions], atol=1e-5)


def test_prompts_of_unequal_length_are_prefilled_in_one_pass(
    model: Model, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = GenerationOptions(mode="text", max_new_tokens=24, **GREEDY)
    engine = make_engine(model.engine.decoder, False, model)
    batch_sizes = []
    prefill = engine.runner.prefill

    def record(parts: Any) -> Any:
        batch_sizes.append(len(parts))
        return prefill(parts)

    monkeypatch.setattr(engine.runner, "prefill", record)
    together = engine.generate([Request(ids, options, i) for i, ids in enumerate(prompts)])
    assert batch_sizes == [3]
    alone = [engine.generate([Request(ids, options, 0)])[0] for ids in prompts]
    assert [o.ids for o in together] == [o.ids for o in alone]


def test_layers_on_several_devices_give_the_same_output(
    model: Model, prompts: list[list[int]]
) -> None:
    """accelerate's hooks move a layer's inputs. Weights with hooks are not fused."""
    from accelerate import dispatch_model

    decoder = open_checkpoint("tiny").decoder(torch.float32)
    names = [n for n, _ in decoder.named_children() if n != "model"]
    inner = [f"model.{n}" for n, _ in decoder.model.named_children() if n != "layers"]
    layers = [f"model.layers.{i}" for i in range(len(decoder.model.layers))]
    device_map = dict.fromkeys([*names, *inner, *layers], "cpu")
    dispatched = dispatch_model(decoder, device_map, main_device="cpu", force_hooks=True)
    engine = make_engine(dispatched, True, model)
    assert engine.runner.fused is None
    options = GenerationOptions(mode="text", max_new_tokens=12, **GREEDY)
    requests = [Request(ids, options) for ids in prompts]
    expected = [o.ids for o in model.engine.generate(requests)]
    assert [o.ids for o in engine.generate(requests)] == expected


def test_interrupted_prefill_frees_its_slots(
    model: Model, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model.engine.decoder, False, model)

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "_prefill_contexts", interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            engine.generate([Request(ids, GenerationOptions()) for ids in prompts])
    assert engine.runner.cache.num_slots == 0
    assert not engine.has_work


def test_nonfinite_logits_raise(model: Model) -> None:
    decoder = open_checkpoint("tiny").decoder(torch.float32)
    with torch.no_grad():
        decoder.lm_head.weight[9000].fill_(float("inf"))
    engine = make_engine(decoder, False, model)
    with pytest.raises(UserError, match="NaN or infinite"):
        engine.generate([Request([model.vocabulary.bos, 8720], GenerationOptions(min_images=1))])
    assert not engine.has_work


def test_graphed_decode_gives_the_same_image_tokens_as_single_steps(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, but without the graph: sequences with different options that join and leave."""
    decoder = open_checkpoint("tiny").decoder(torch.float32)
    options = [
        GenerationOptions(min_images=1, max_images=1, max_new_tokens=150, seed=4),
        GenerationOptions(mode="image", max_images=2, image_top_k=50, seed=4),
        GenerationOptions(mode="image", image_greedy=True, guidance_scale_text=1.0),
        GenerationOptions(
            mode="image", guidance_scale_text=1.0, guidance_scale_image=1.0, image_top_p=1.0
        ),
    ]
    # Prompts that the model was trained on: for others thousands of image tokens are about equally
    # probable, and rounding decides.
    texts = [f"Show me a {m} scan of the {o}." for m, o in (("CT", "head"), ("MR", "chest"))]
    known = [model.encode_prompt([text]) for text in texts]
    requests = [Request(known[i % 2], o, i) for i, o in enumerate(options * 2)]
    outputs, steps = [], []
    for use_cuda_graph in (False, True):
        engine = make_engine(decoder, True, model)
        engine.set_speculation("off")
        engine.runner.use_cuda_graph = use_cuda_graph
        decode_images = engine.runner.decode_images

        def record(sequences: Any, count: int, part: slice, decode: Any = decode_images) -> Any:
            steps.append(count)
            return decode(sequences, count, part)

        monkeypatch.setattr(engine.runner, "decode_images", record)
        outputs.append([o.ids for o in engine.generate(requests, batch_size=5)])
        assert engine.runner.cache.num_slots == 0
    assert outputs[0] == outputs[1]
    assert len(steps) >= 3
    assert max(steps) == GRAPH_STEPS


# --- sequences that join and leave --------------------------------------------------------------


def test_request_that_joins_later_changes_no_output(model: Model, prompts: list[list[int]]) -> None:
    options = GenerationOptions(min_images=1, max_images=1, max_new_tokens=120, seed=8)
    engine = make_engine(model.engine.decoder, False, model)
    expected = [engine.generate([Request(p, options, i)])[0].ids for i, p in enumerate(prompts)]
    first = engine.submit(Request(prompts[0], options, 0))
    for _ in range(7):
        engine.step()
    others = [engine.submit(Request(p, options, i)) for i, p in enumerate(prompts[1:], 1)]
    outputs: dict[int, list[int]] = {}
    while engine.has_work:
        engine.step()
        for ticket in (first, *others):
            for _, token, output in engine.poll(ticket):
                if token is None:
                    outputs[ticket] = output.ids
    assert [outputs[ticket] for ticket in (first, *others)] == expected


def test_cancelled_sequence_is_freed_and_others_continue(
    model: Model, prompts: list[list[int]]
) -> None:
    options = GenerationOptions(min_images=1, max_images=1, max_new_tokens=120, seed=8)
    engine = make_engine(model.engine.decoder, False, model)
    expected = engine.generate([Request(prompts[2], options, 5)])[0].ids
    cancelled = engine.submit(Request(prompts[1], options, 1))
    other = engine.submit(Request(prompts[2], options, 5))
    for _ in range(4):
        engine.step()
    waiting = engine.submit(Request(prompts[0], options, 2))
    slots = engine.runner.cache.num_slots
    engine.cancel(cancelled)
    engine.cancel(waiting)
    engine.cancel(cancelled)  # no effect
    assert engine.runner.cache.num_slots < slots
    ids: list[int] = []
    while engine.has_work:
        engine.step()
        assert not list(engine.poll(cancelled))
        for _, token, output in engine.poll(other):
            ids = output.ids if token is None else ids
    assert ids == expected
    assert engine.runner.cache.num_slots == 0


def test_closing_a_stream_cancels_its_request(model: Model) -> None:
    events = model.stream(["Show me a CT scan."], mode="image", max_new_tokens=100)
    assert next(events).progress is not None
    assert model.engine.has_work
    events.close()
    assert not model.engine.has_work
    assert model.engine.runner.cache.num_slots == 0


def test_idle_engine_frees_kv_cache(model: Model, prompts: list[list[int]]) -> None:
    options = GenerationOptions(mode="text", max_new_tokens=4)
    engine = make_engine(model.engine.decoder, False, model)
    engine.generate([Request(ids, options) for ids in prompts * 5], batch_size=4)
    cache = engine.runner.cache
    assert cache.nbytes == 0
    allocated = []
    add_slot = cache.add_slot

    def record() -> int:
        slot = add_slot()
        allocated.append(len(cache._keys[0]))
        return slot

    cache.add_slot = record  # type: ignore[method-assign]
    engine.generate([Request(ids, options) for ids in prompts * 5], batch_size=40)
    assert max(allocated) <= 3 * 40


def record_batch_sizes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of sequences of the following decode steps."""
    sizes: list[int] = []
    decode = engine.runner.decode

    def record(sequences: Any) -> Any:
        sizes.append(len(sequences))
        return decode(sequences)

    monkeypatch.setattr(engine.runner, "decode", record)
    return sizes


def test_batch_size_may_exceed_the_default(
    model: Model, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model.engine.decoder, False, model)
    sizes = record_batch_sizes(engine, monkeypatch)
    options = GenerationOptions(mode="text", max_new_tokens=3, **GREEDY)
    engine.generate([Request(prompts[0], options) for _ in range(50)], batch_size=50)
    assert max(sizes) == 50


def test_deterministic_runs_one_sequence_at_a_time(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = record_batch_sizes(model.engine, monkeypatch)
    options = [GenerationOptions(mode="text", max_new_tokens=5)] * 3
    model.generate_responses([["a"], ["b"], ["c"]], options, deterministic=True)
    assert set(sizes) == {1}


def admit(scheduler: Scheduler) -> list[int]:
    """The tickets of newly admitted requests."""
    before = [prefill.admission.ticket for prefill in scheduler.reading]
    scheduler.admit()
    tickets = [prefill.admission.ticket for prefill in scheduler.reading]
    assert tickets[: len(before)] == before
    return tickets[len(before) :]


def test_scheduler_limits_sequences_and_prefill_tokens(model: Model) -> None:
    scheduler = make_scheduler(model, max_seq_len=PREFILL_TOKENS, max_num_seqs=3)
    options = GenerationOptions(mode="text")
    long = [model.vocabulary.bos] * (PREFILL_TOKENS // 2 - 1)
    tickets = [scheduler.add(Request(ids, options)) for ids in (long, long[:9], long, long[:9])]
    assert admit(scheduler) == tickets[:3]
    parts = scheduler.next_parts()  # with the third, 3 * 4095 tokens
    assert [part.prefill.admission.ticket for part in parts] == tickets[:2]
    assert [part.num_tokens for part in parts] == [len(long), 9]
    for ticket in tickets[:2]:
        scheduler.cancel(ticket)
    assert admit(scheduler) == tickets[3:]
    for ticket in tickets[2:]:
        (removed,) = scheduler.cancel(ticket)
        assert isinstance(removed, Prefill)
        assert removed.branches == []
    assert not scheduler.has_work


def test_request_that_cannot_start_ends_without_a_sequence(model: Model) -> None:
    scheduler = make_scheduler(model, max_seq_len=4096, max_num_seqs=3)
    ticket = scheduler.add(Request([0], GenerationOptions(mode="image", max_new_tokens=5)))
    assert admit(scheduler) == []
    (step,) = scheduler.poll(ticket)
    assert (step.token, step.output.finish_reason) == (None, "length")
    assert not list(scheduler.poll(ticket))


def test_empty_prompt_is_rejected(model: Model) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        model.engine.submit(Request([], GenerationOptions()))


# --- options --------------------------------------------------------------------------------------


def test_top_k_of_one_is_greedy(model: Model, prompts: list[list[int]]) -> None:
    common = {"mode": "text", "max_new_tokens": 16, "repetition_penalty": 1.0}
    top_1 = GenerationOptions(**common, text_top_k=1, text_temperature=3.0)
    greedy = GenerationOptions(**common, text_greedy=True)
    outputs = [
        [o.ids for o in model.engine.generate([Request(p, options) for p in prompts])]
        for options in (top_1, greedy)
    ]
    assert outputs[0] == outputs[1]
    common = {"mode": "image", "max_images": 1, "max_new_tokens": 80}
    images = [
        model.engine.generate([Request(prompts[2], GenerationOptions(**common, **own))])[0].ids
        for own in ({"image_top_k": 1, "image_temperature": 2.0}, {"image_greedy": True})
    ]
    assert images[0] == images[1]


def test_stop_token_ends_the_output(model: Model, prompts: list[list[int]]) -> None:
    options = {"mode": "text", "max_new_tokens": 30, **GREEDY}
    outputs = model.engine.generate([Request(p, GenerationOptions(**options)) for p in prompts])
    prompt, ids = max(zip(prompts, (o.ids for o in outputs), strict=True), key=lambda x: len(x[1]))
    stop = ids[1]
    request = Request(prompt, GenerationOptions(**options, stop=(stop,)))
    (output,) = model.engine.generate([request])
    assert output.ids == ids[: ids.index(stop) + 1]
    assert len(output.ids) < len(ids)
    assert output.finish_reason == "stop"
