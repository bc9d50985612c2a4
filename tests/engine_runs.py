"""Helpers of the engine's tests: engines, schedulers, mixed requests, runs to the end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from medley.generation import Engine, GenerationOptions, GenerationOutput, Request
from medley.generation.cache_budget import CacheBudget
from medley.generation.prefix_cache import PrefixCache
from medley.generation.scheduler import Scheduler
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


def make_engine(model: Model, chunk_size: int | None = None, fuse: bool = False) -> Engine:
    codes = model.image_tokenizer.codes_per_image
    engine = Engine(model.engine.decoder, model.vocabulary, codes, fuse)
    if chunk_size is not None:
        engine.set_chunk_size(chunk_size)
    return engine


def long_text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


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


def make_requests(model: Model) -> list[Request]:
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


def make_scheduler(model: Model, max_bytes: int | None = None, **limits: int) -> Scheduler:
    """`max_bytes` with one byte per token."""
    budget = CacheBudget(1, PrefixCache(1 << 30))
    budget.max_bytes = max_bytes
    return Scheduler(model.vocabulary, 64, **limits, budget=budget)
