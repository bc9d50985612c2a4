"""Speculative decoding of image codes: the same tokens as without it, in fewer passes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from scipy import stats

import medley
from medley.errors import UserError
from medley.generation import Engine, GenerationOptions, Request
from medley.generation.sampler import Sampler
from medley.generation.sampling import apply_cfg, philox_uniforms, sample
from medley.generation.sequence import Window
from medley.generation.speculation import Speculator, _WindowPolicy
from medley.inference.model import Model

PROMPTS = (
    "Draw a chest X-ray.",
    "Show me an MRI scan of the brain with a large marked nodule in the upper left.",
    "Is there a nodule?",
)


def options(**more: Any) -> GenerationOptions:
    values: dict[str, Any] = {"mode": "image", "max_new_tokens": 200}
    return GenerationOptions(**(values | more))


@pytest.fixture(scope="module")
def model() -> Model:
    """A model of its own: its engine's settings change."""
    return medley.load("tiny", device="cpu", dtype="float32")


def with_image(model: Model) -> list[int]:
    """A prompt with an image: its guidance has three branches."""
    image = model.vocabulary.image_token_ids([7] * model.engine.scheduler.codes_per_image)
    return [model.vocabulary.bos, *image, *model.encode_prompt("Draw it again.")[1:]]


def outputs(
    engine: Engine, requests: Sequence[Request], setting: Any, batch: int
) -> tuple[list[list[int]], int]:
    """Token ids of each request, and the number of decoding passes."""
    passes = 0
    decode = engine.runner.decode

    def count(windows: Sequence[Window]) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return decode(windows)

    engine.runner.decode = count  # type: ignore[method-assign]
    try:
        with engine.speculation(setting):
            ids = [output.ids for output in engine.generate(requests, batch)]
    finally:
        del engine.runner.decode  # type: ignore[method-assign]
    return ids, passes


CASES = {
    "unguided": {"guidance_scale_text": 1.0, "guidance_scale_image": 1.0},
    "guided": {},
    "guided, whole distribution": {"image_temperature": 1.0, "image_top_p": 1.0},
    "guided, top-k": {"image_top_k": 20, "image_top_p": 1.0},
    "greedy": {"image_greedy": True},
    "two images": {"min_images": 2},
    "text and images": {"mode": "any", "min_images": 1},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_those_of_sequential_decoding(model: Model, case: str, batch: int) -> None:
    own = options(**CASES[case])
    prompts = [model.encode_prompt(PROMPTS[0]), model.encode_prompt(PROMPTS[1]), with_image(model)]
    requests = [Request(prompt, own, index) for index, prompt in enumerate(prompts)]
    expected, sequential = outputs(model.engine, requests, "off", batch)
    for setting in (2, 16, "auto"):
        found, passes = outputs(model.engine, requests, setting, batch)
        assert found == expected, setting
        if setting == 16 and own.mode == "image":
            assert passes < 0.8 * sequential
    assert model.engine.runner.cache.num_slots == 0


def test_rows_in_text_and_images_run_together(model: Model) -> None:
    text = GenerationOptions(mode="text", max_new_tokens=40)
    requests = [
        Request(model.encode_prompt(PROMPTS[index % 3]), text if index % 2 else options(), index)
        for index in range(6)
    ]
    expected, _ = outputs(model.engine, requests, "off", 4)
    assert outputs(model.engine, requests, 8, 4)[0] == expected


def test_cancelled_requests_leave_the_others_unchanged(model: Model) -> None:
    """Requests come and go at random steps; those that end have the tokens of `off`."""
    engine, choices = model.engine, random.Random(3)
    prompts = [model.encode_prompt(PROMPTS[i % 3]) for i in range(10)]
    requests = [
        Request(prompt, options(mode="any" if i % 3 == 2 else "image", max_new_tokens=80), i)
        for i, prompt in enumerate(prompts)
    ]
    expected, _ = outputs(engine, requests, "off", 4)
    with engine.speculation(16):
        waiting = list(enumerate(requests))
        running: dict[int, int] = {}
        ended = 0
        while waiting or running:
            if waiting and (not running or choices.random() < 0.5):
                number, request = waiting.pop(0)
                running[engine.submit(request)] = number
            engine.step()
            for ticket, number in list(running.items()):
                for step in engine.poll(ticket):
                    if step.token is None:
                        assert step.output.ids == expected[number]
                        ended += 1
                        del running[ticket]
            if running and choices.random() < 0.08:
                ticket = choices.choice(list(running))
                engine.cancel(ticket)
                del running[ticket]
    assert ended >= 4
    assert engine.runner.cache.num_slots == 0


def test_the_last_code_of_an_image_needs_no_more_passes(model: Model) -> None:
    request = Request(model.encode_prompt(PROMPTS[0]), options(max_images=1), 0)
    (ids,), passes = outputs(model.engine, [request], "off", 1)
    codes = model.engine.scheduler.codes_per_image
    assert ids[-1] == model.vocabulary.end_image
    assert (len(ids), passes) == (codes + 2, codes)


def test_windows_end_with_the_image(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = model.engine
    codes, seen = engine.scheduler.codes_per_image, []
    accept = engine.speculator.accept

    def record(windows: Sequence[Window], *rest: Any) -> Any:
        seen.extend((w.sequence.grammar.codes_emitted, w.num_draws) for w in windows)
        return accept(windows, *rest)

    monkeypatch.setattr(engine.speculator, "accept", record)
    outputs(engine, [Request(model.encode_prompt(PROMPTS[0]), options(), 0)], codes, 1)
    assert seen[0] == (0, codes)
    assert all(emitted + draws <= codes for emitted, draws in seen)


# --- mutants: each must change the tokens ------------------------------------------------------


def image_of(model: Model) -> list[int]:
    request = Request(model.encode_prompt(PROMPTS[1]), options(), 0)
    return outputs(model.engine, [request], 16, 1)[0][0]


def test_a_uniform_of_the_next_place_is_noticed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = image_of(model)
    from medley.generation import sampler

    def shifted(seeds: Any, indices: Any, positions: Sequence[int]) -> torch.Tensor:
        first = positions[0]
        return philox_uniforms(seeds, indices, [p + (p > first) for p in positions])

    monkeypatch.setattr(sampler, "philox_uniforms", shifted)
    assert image_of(model) != expected


def test_swapped_branches_are_noticed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = image_of(model)
    from medley.generation import sampler

    def swapped(full: Any, image: Any, uncond: Any, *scales: Any) -> torch.Tensor:
        return apply_cfg(torch.cat([full[:1], uncond[1:]]), image, uncond, *scales)

    monkeypatch.setattr(sampler, "apply_cfg", swapped)
    assert image_of(model) != expected


def test_a_stale_place_of_the_cache_is_noticed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = image_of(model)
    advance = model.engine.runner.advance

    def too_far(windows: Sequence[Window], drawn: Sequence[list[int]]) -> None:
        """Counts the first rejected draft as if it were accepted, under the right token."""
        advance(windows, drawn)
        for window, tokens in zip(windows, drawn, strict=True):
            if len(tokens) < window.num_draws:
                cache, slot = model.engine.runner.cache, window.sequence.full.slot
                length = window.sequence.full.length
                for keys in cache._keys:
                    keys[slot, :, length - 1] = keys[slot, :, length]

    monkeypatch.setattr(model.engine.runner, "advance", too_far)
    assert image_of(model) != expected


@pytest.mark.parametrize(
    ("drafts", "drawn", "accepted", "kept"),
    [
        ([], [4], [4], []),
        ([4, 5, 6], [4, 5, 6, 7], [4, 5, 6, 7], []),
        ([4, 9, 6], [4, 5, 6, 7], [4, 5], [6, 7]),
        ([9, 5, 6], [4, 5, 6, 7], [4], [5, 6, 7]),
    ],
)
def test_draws_are_accepted_up_to_the_first_that_differs_from_its_draft(
    drafts: list[int], drawn: list[int], accepted: list[int], kept: list[int]
) -> None:
    row: Any = _Row()
    window = Window(row, [1, *drafts], 1 + len(drafts))
    assert Speculator(64, can_measure=False).accept([window], [drawn], 0.0) == [accepted]
    assert row.drafts == kept


# --- the distribution ----------------------------------------------------------------------------


def test_the_fixed_point_of_equal_draws_has_the_joint_distribution_of_the_model() -> None:
    """A toy model of 3 tokens and 4 places, guided, with top-p: chi-square over all 81 images."""
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(2, 4, 4, 3, generator=generator)  # branch, place, last token or none

    def logits(place: int, last: int) -> torch.Tensor:
        full, uncond = tables[0, place, last], tables[1, place, last]
        return apply_cfg(full, uncond, uncond, 1.7, 1.0) / 0.8

    exact = {}
    for image in product(range(3), repeat=4):
        probability = 1.0
        for place, token in enumerate(image):
            p = logits(place, image[place - 1] if place else 3).softmax(-1)
            order = p.argsort(descending=True)
            before = p[order].cumsum(-1) - p[order]
            kept = torch.zeros(3).scatter(0, order, p[order] * (before < 0.9))
            probability *= float(kept[token] / kept.sum())
        exact[image] = probability
    # Each round draws all places of all images with the drafts of the round before: Jacobi
    # decoding with the engine's `sample` and uniforms. After 4 rounds it is at its fixed point.
    count = 30_000
    images = torch.zeros(count, 4, dtype=torch.int64)
    uniforms = torch.stack(
        [philox_uniforms([11] * count, range(count), [place] * count) for place in range(4)], 1
    )
    for _ in range(4):
        lasts = torch.cat([torch.full((count, 1), 3), images[:, :-1]], 1)
        full, uncond = (tables[b, torch.arange(4), lasts] for b in (0, 1))
        table = apply_cfg(full, uncond, uncond, 1.7, 1.0) / 0.8
        images = sample(table.flatten(0, 1), uniforms.flatten(), 0, 0.9).view(count, 4)
    found = dict.fromkeys(exact, 0)
    for image in map(tuple, images.tolist()):
        found[image] += 1
    possible = [image for image, probability in exact.items() if probability > 0]
    assert sum(found[image] for image in possible) == count
    whole = sum(exact.values())  # 1 up to rounding
    expected = [count * exact[image] / whole for image in possible]
    assert stats.chisquare([found[image] for image in possible], expected).pvalue > 1e-3


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [0, -3, 65])
def test_numbers_that_no_image_can_use_are_refused(setting: int) -> None:
    with pytest.raises(UserError, match=rf"--speculate {setting}: .*expected 1 to 64"):
        Speculator(64, can_measure=True).set(setting)


def test_auto_is_for_float32_on_cpus(model: Model) -> None:
    assert model.engine.speculator.is_on
    half = medley.load("tiny", device="cpu", dtype="bfloat16").engine
    assert not half.speculator.is_on  # the same seed must give the same image
    on_gpu = Speculator(64, can_measure=False)
    assert Speculator(64, can_measure=True).is_on
    assert not on_gpu.is_on
    on_gpu.set(8)
    assert on_gpu.is_on
    for setting in ("off", 1):
        on_gpu.set(setting)  # type: ignore[arg-type]
        assert not on_gpu.is_on


class _Row:
    """What the policy asks of a sequence."""

    branches = (0, 1)
    drafts: Sequence[int] = ()

    class grammar:  # noqa: N801
        in_image = True


@pytest.mark.parametrize(
    ("seconds", "is_full"),
    [
        (lambda width: 1.0, False),  # wider passes are free
        (lambda width: 1.0 * width, True),  # as in a full batch
        (lambda width: 1.0 + 0.02 * width, False),
    ],
)
def test_the_width_follows_the_measured_time(seconds: Any, is_full: bool) -> None:
    policy, generator = _WindowPolicy(), random.Random(0)
    row: Any = _Row()
    for _ in range(300):
        width = policy.choose([row])
        accepted = 1
        while accepted < width and generator.random() < 0.7:
            accepted += 1
        policy.record([Window(row, [0] * width, width)], [[0] * accepted], seconds(width))
    rates = {w: (1 - 0.7**w) / 0.3 / seconds(w) for w in (1, 2, 4, 8, 16, 32)}
    chosen = policy.choose([row])
    assert rates[chosen] > 0.9 * max(rates.values())
    if is_full:
        assert chosen == 1
        assert {width for _, width in policy._seconds} == {1, 2}


def test_text_passes_and_widths_beyond_an_image_are_not_measured(model: Model) -> None:
    engine = model.engine
    engine.speculator._policy = _WindowPolicy(engine.scheduler.codes_per_image)
    text = GenerationOptions(mode="text", max_new_tokens=12)
    outputs(engine, [Request(model.encode_prompt(PROMPTS[2]), text, 0)], "auto", 1)
    assert not engine.speculator._policy._seconds
    policy, row = _WindowPolicy(4), _Row()
    rows: Any = [row]
    for _ in range(40):
        width = policy.choose(rows)
        assert width <= 4
        policy.record([Window(rows[0], [0] * width, width)], [[0] * width], 1.0)
    assert policy.choose(rows) == 4


def test_places_of_a_window_are_drawn_with_their_own_numbers(model: Model) -> None:
    """A sampler that gets one window of several draws equals one that gets them one by one."""
    engine = model.engine
    sampler = Sampler(engine.sampler.masks)
    ticket = engine.submit(Request(model.encode_prompt(PROMPTS[0]), options(), 5))
    with engine.speculation("off"):
        for _ in range(4):
            engine.step()
    (sequence,) = engine.scheduler.running
    width = engine.decoder.config.hidden_size
    states = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        together = sampler([Window(sequence, [0, 0, 0], 3)], states, engine.runner.logits)[0]
        for ahead in range(3):
            alone = sampler(
                [Window(sequence, [0], 1)], states[:, ahead : ahead + 1], engine.runner.logits
            )[0]
            assert alone == [together[ahead]]
            sequence.output.ids.append(together[ahead])  # the next place
    engine.cancel(ticket)
