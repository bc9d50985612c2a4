"""The engine's own machinery: fused step, remembered contexts, rows that join and leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import medley
from medley.checkpoints.checkpoint import open_checkpoint
from medley.commands.model_options import MemoryEstimate
from medley.errors import UserError
from medley.generation import Engine, GenerationOptions, Request
from medley.generation.fused_decode import FusedDecoder
from medley.generation.kv_cache import CachedPrefix, KeyValueCache
from medley.generation.prefix_cache import PrefixCache
from medley.inference.model import Model

GREEDY = {"text_greedy": True, "repetition_penalty": 1.0}


def engine(decoder: Any, fuse: bool, model: Model) -> Engine:
    return Engine(decoder, model.vocabulary, model.image_tokenizer.codes_per_image, fuse)


@pytest.fixture(scope="module")
def model() -> Model:
    return medley.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    """Of different lengths, one with a picture."""
    picture = Image.new("RGB", (64, 64), "navy")
    talks = [["Is there a cyst?"], [picture, "What does this scan show?"], ["Show me a head."]]
    return [model.encode_prompt(parts) for parts in talks]


@pytest.mark.parametrize("swin_norm", [False, True])
def test_the_fused_step_gives_what_the_modules_give(layout: Path, swin_norm: bool) -> None:
    """Grouped heads (the layout of 30b), both places of the norms, streams of unequal length."""
    decoder = open_checkpoint(layout / "input").decoder(torch.float32)
    if swin_norm:
        state, decoder.config.swin_norm = decoder.state_dict(), True
        decoder = type(decoder)(decoder.config).eval()
        decoder.load_state_dict(state)
    ids = torch.randint(8720, 8790, (3, 40), generator=torch.Generator().manual_seed(0))
    late = torch.tensor([0, 3, 11])  # steps by which each stream begins after the first
    cache = KeyValueCache(decoder.config, torch.float32, torch.device("cpu"), 3)
    with torch.inference_mode():
        wanted = decoder.model(ids, use_cache=False).last_hidden_state
        step = FusedDecoder(decoder)
        for _ in ids:
            cache.add_stream()
        for time in range(ids.shape[1] + int(late.max())):
            places = (time - late).clamp(0, ids.shape[1] - 1)  # those that wait write over it
            length = int(places.max()) + 1
            cache.place(0, places[:, None], length)
            mask = torch.arange(length) <= places[:, None]
            rows = torch.arange(len(ids))
            found = step(ids[rows, places], places, mask[:, None, None], cache)
            assert torch.allclose(found, wanted[rows, places], atol=1e-5)


def test_prompts_of_unequal_length_are_read_in_one_pass(
    model: Model, prompts: list[list[int]]
) -> None:
    options = GenerationOptions(mode="text", max_new_tokens=24, **GREEDY)
    reads = []
    own = engine(model.engine.decoder, False, model)
    read = own._passes.read
    own._passes.read = lambda *a: reads.append(len(a[0])) or read(*a)  # type: ignore[method-assign,func-returns-value]
    together = own.generate([Request(ids, options, i) for i, ids in enumerate(prompts)])
    assert reads == [3]
    alone = [own.generate([Request(ids, options, 0)])[0] for ids in prompts]
    assert [r.ids for r in together] == [r.ids for r in alone]


def test_a_request_that_joins_later_changes_nothing(model: Model, prompts: list[list[int]]) -> None:
    options = GenerationOptions(min_images=1, max_images=1, max_new_tokens=120, seed=8)
    own = engine(model.engine.decoder, False, model)
    wanted = [own.generate([Request(p, options, i)])[0].ids for i, p in enumerate(prompts)]
    first = own.submit(Request(prompts[0], options, 0))
    for _ in range(7):
        own.step()
    others = [own.submit(Request(p, options, i)) for i, p in enumerate(prompts[1:], 1)]
    results: dict[int, list[int]] = {}
    while own.has_work:
        own.step()
        for ticket in (first, *others):
            for _, token, result in own.poll(ticket):
                if token is None:
                    results[ticket] = result.ids
    assert [results[ticket] for ticket in (first, *others)] == wanted


def test_a_cancelled_row_is_free_at_once_and_others_go_on(
    model: Model, prompts: list[list[int]]
) -> None:
    options = GenerationOptions(min_images=1, max_images=1, max_new_tokens=120, seed=8)
    own = engine(model.engine.decoder, False, model)
    wanted = own.generate([Request(prompts[2], options, 5)])[0].ids
    gone, waiting = own.submit(Request(prompts[1], options, 1)), []
    kept = own.submit(Request(prompts[2], options, 5))
    for _ in range(4):
        own.step()
    waiting.append(own.submit(Request(prompts[0], options, 2)))
    streams = own._cache.streams
    own.cancel(gone)
    own.cancel(waiting[0])
    own.cancel(gone)  # twice is no harm
    assert own._cache.streams < streams
    found: list[int] = []
    while own.has_work:
        own.step()
        assert not list(own.poll(gone))
        for _, token, result in own.poll(kept):
            found = result.ids if token is None else found
    assert found == wanted
    assert own._cache.streams == 0


def test_closing_a_stream_frees_its_row(model: Model) -> None:
    events = model.stream(["Show me a CT scan."], mode="image", max_new_tokens=100)
    assert next(events).progress is not None
    assert model.engine.has_work
    events.close()  # type: ignore[attr-defined]
    assert not model.engine.has_work
    assert model.engine._cache.streams == 0


def test_a_talk_reads_only_what_is_new_and_says_the_same(model: Model) -> None:
    picture = Image.new("RGB", (64, 64), "gray")
    talk = model.chat(mode="text", max_new_tokens=20, **GREEDY)
    reads: list[int] = []
    own = model.engine
    read = own._passes.read
    own._passes.read = lambda s, c, b: (  # type: ignore[method-assign]
        reads.append(sum(len(x) - y for x, y in zip(c, b, strict=True))),  # type: ignore[func-returns-value]
        read(s, c, b),
    )[1]
    try:
        answers, ids = [], []
        for turn in ((picture, "Is there a cyst?"), ("Where is it?",), ("How large?",)):
            before = list(talk.ids)
            *_, last = talk.send(*turn)
            assert last.answer is not None
            answers.append(last.answer.ids)
            ids.append([*before, *model.encode_prompt(list(turn))[1:]])
    finally:
        del own._passes.read  # type: ignore[method-assign]
    assert reads[0] == len(ids[0])
    assert all(count < 25 for count in reads[1:])
    fresh = engine(model.engine.decoder, False, model)
    options = GenerationOptions(mode="text", max_new_tokens=20, **GREEDY)
    assert answers == [fresh.generate([Request(i, options)])[0].ids for i in ids]


def test_remembered_contexts_stay_within_their_bytes() -> None:
    def prefix(*ids: int) -> CachedPrefix:
        return CachedPrefix(ids, (torch.zeros(2, 1, len(ids), 4),))

    size = prefix(*range(20)).nbytes
    kept = PrefixCache(3 * size)
    for start in range(4):
        kept.keep(prefix(*range(start, start + 20)))
    assert len(kept) == 3
    assert kept.find([0, *range(1, 20)]) is None  # the oldest is gone
    found = kept.find([*range(3, 20), 99, 100])
    assert found is not None
    assert found[1] == 17
    kept.keep(prefix(*range(3, 24)))  # longer, and begins with one that is there
    assert sum(p.ids[:20] == tuple(range(3, 23)) for p in kept._kept) == 1


def test_previews_come_while_a_picture_is_drawn(model: Model) -> None:
    events = list(model.stream(["Show me a CT scan."], mode="image", preview_every=16))
    previews = [e.preview for e in events if e.preview is not None]
    codes = model.image_tokenizer.codes_per_image
    assert len(previews) == codes // 16
    assert previews[0].size == (model.image_tokenizer.size,) * 2
    images = [e.image for e in events if e.image is not None]
    assert len(images) == 1
    assert images[0].tobytes() == previews[-1].tobytes()  # with all codes there
    assert events[-1].answer is not None
    assert [e.progress for e in events if e.progress][-1] == 1.0


def test_top_k_of_one_is_greedy(model: Model, prompts: list[list[int]]) -> None:
    common = {"mode": "text", "max_new_tokens": 16, "repetition_penalty": 1.0}
    one = GenerationOptions(**common, text_top_k=1, text_temperature=3.0)
    greedy = GenerationOptions(**common, text_greedy=True)
    found = [
        [r.ids for r in model.engine.generate([Request(p, o) for p in prompts])]
        for o in (one, greedy)
    ]
    assert found[0] == found[1]
    images = {"mode": "image", "max_images": 1, "max_new_tokens": 80}
    drawn = [
        model.engine.generate([Request(prompts[2], GenerationOptions(**images, **more))])[0].ids
        for more in ({"image_top_k": 1, "image_temperature": 2.0}, {"image_greedy": True})
    ]
    assert drawn[0] == drawn[1]


def test_a_stop_token_ends_the_answer_and_says_so(model: Model, prompts: list[list[int]]) -> None:
    options = {"mode": "text", "max_new_tokens": 30, **GREEDY}
    found = model.engine.generate([Request(p, GenerationOptions(**options)) for p in prompts])
    prompt, whole = max(zip(prompts, (r.ids for r in found), strict=True), key=lambda x: len(x[1]))
    stop = whole[1]
    found = model.engine.generate([Request(prompt, GenerationOptions(**options, stop=(stop,)))])
    assert found[0].ids == whole[: whole.index(stop) + 1]
    assert len(found[0].ids) < len(whole)
    assert found[0].finish_reason == "stop"


def test_layers_may_live_on_several_devices(model: Model, prompts: list[list[int]]) -> None:
    """accelerate's hooks move what a layer reads; the step by hand is not used there."""
    from accelerate import dispatch_model

    decoder = open_checkpoint("tiny").decoder(torch.float32)
    names = [n for n, _ in decoder.named_children() if n != "model"]
    inner = [f"model.{n}" for n, _ in decoder.model.named_children() if n != "layers"]
    layers = [f"model.layers.{i}" for i in range(len(decoder.model.layers))]
    places = dict.fromkeys([*names, *inner, *layers], "cpu")
    spread = dispatch_model(decoder, places, main_device="cpu", force_hooks=True)
    own = engine(spread, True, model)
    assert own._passes.fused is None
    options = GenerationOptions(mode="text", max_new_tokens=12, **GREEDY)
    requests = [Request(ids, options) for ids in prompts]
    wanted = [r.ids for r in model.engine.generate(requests)]
    assert [r.ids for r in own.generate(requests)] == wanted


def test_the_memory_a_model_takes_is_known_before_it_is_read(model: Model) -> None:
    checkpoint = open_checkpoint("tiny")
    need = MemoryEstimate.of(checkpoint, torch.float32, None, torch.device("cpu"))
    decoder = model.engine.decoder
    parts = [*decoder.model.layers, decoder.model.embed_tokens, decoder.lm_head]
    weights = sum(p.nbytes for part in parts for p in part.parameters())
    packed = weights - decoder.model.embed_tokens.weight.nbytes
    assert need.weights == pytest.approx(weights + packed, rel=0.01)
    config = decoder.config
    assert need.token == 2 * config.num_hidden_layers * config.hidden_size * 4
    assert f"{need.token / 1e3:.1f} kB a token" in need.line(4, 1 << 30)
    assert "4 answers" in need.line(4, 1 << 30)
    eighth = MemoryEstimate.of(checkpoint, torch.float32, "8bit", torch.device("cpu"))
    assert eighth.weights < 0.7 * weights


def test_the_cache_is_given_back_when_nobody_is_at_work(
    model: Model, prompts: list[list[int]]
) -> None:
    options = GenerationOptions(mode="text", max_new_tokens=4)
    own = engine(model.engine.decoder, False, model)
    own.generate([Request(ids, options) for ids in prompts * 5], batch_size=4)
    assert sum(table.nbytes for table in own._cache._keys) == 0
    slots = []
    grow = own._cache.add_stream
    own._cache.add_stream = lambda: (grow(), slots.append(len(own._cache._keys[0])))[0]  # type: ignore[method-assign,func-returns-value]
    own.generate([Request(ids, options) for ids in prompts * 5], batch_size=40)
    assert max(slots) <= 3 * 40


def test_an_interrupted_prefill_leaves_no_streams(
    model: Model, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = engine(model.engine.decoder, False, model)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(own._passes, "read", stop)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            own.generate([Request(ids, GenerationOptions()) for ids in prompts])
    assert own._cache.streams == 0
    assert not own.has_work


def test_more_rows_at_once_than_usual(model: Model, prompts: list[list[int]]) -> None:
    own = engine(model.engine.decoder, False, model)
    options = GenerationOptions(mode="text", max_new_tokens=3, **GREEDY)
    most = 0
    for _ in own.run([Request(prompts[0], options) for _ in range(50)], batch_size=50):
        most = max(most, len(own._rows))
    assert most == 50


def test_alone_and_in_company_bit_for_bit_where_that_is_asked(
    model: Model, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    step = model.engine.step
    monkeypatch.setattr(
        model.engine, "step", lambda: (step(), seen.append(len(model.engine._rows)))[0]
    )
    options = [GenerationOptions(mode="text", max_new_tokens=5)] * 3
    model.generate_responses([["a"], ["b"], ["c"]], options, deterministic=True)
    assert max(seen) == 1


def test_logits_that_are_no_numbers_stop_with_a_word(model: Model) -> None:
    decoder = open_checkpoint("tiny").decoder(torch.float32)
    with torch.no_grad():
        decoder.lm_head.weight[9000].fill_(float("inf"))
    own = engine(decoder, False, model)
    marks = model.vocabulary
    with pytest.raises(UserError, match="no finite numbers"):
        own.generate([Request([marks.bos, 8720], GenerationOptions(min_images=1))])
    assert not own.has_work


def test_a_talk_without_room_for_its_pictures_is_remembered_whole(model: Model) -> None:
    own = engine(model.engine.decoder, False, model)
    token = own.prefixes.limit / own.context
    config = model.engine.decoder.config
    assert token >= 2 * config.num_hidden_layers * config.hidden_size * 4


def test_the_engine_refuses_no_prompt(model: Model) -> None:
    with pytest.raises(UserError, match="empty prompt"):
        model.engine.submit(Request([], GenerationOptions()))


def test_many_codes_at_once_are_those_of_one_after_another(model: Model) -> None:
    """As on CUDA, but without the graph: rows of different options, that end and join."""
    decoder = open_checkpoint("tiny").decoder(torch.float32)
    options = [
        GenerationOptions(min_images=1, max_images=1, max_new_tokens=150, seed=4),
        GenerationOptions(mode="image", max_images=2, image_top_k=50, seed=4),
        GenerationOptions(mode="image", image_greedy=True, guidance_scale_text=1.0),
        GenerationOptions(
            mode="image", guidance_scale_text=1.0, guidance_scale_image=1.0, image_top_p=1.0
        ),
    ]
    # Of what the model knows: elsewhere thousands of codes are about as likely, and rounding draws.
    asked = [f"Show me a {m} scan of the {o}." for m, o in (("CT", "head"), ("MR", "chest"))]
    known = [model.encode_prompt([text]) for text in asked]
    requests = [Request(known[i % 2], o, i) for i, o in enumerate(options * 2)]
    found, bursts = [], []
    for with_bursts in (False, True):
        own = engine(decoder, True, model)
        own.use_cuda_graph = with_bursts
        draw = own._decode_images
        own._decode_images = lambda steps, draw=draw: (bursts.append(steps), draw(steps))[1]  # type: ignore[method-assign,misc]
        found.append([result.ids for result in own.generate(requests, batch_size=5)])
        assert own._cache.streams == 0
    assert found[0] == found[1]
    assert len(bursts) >= 3
    assert max(bursts) == 32
