"""Settings of the web UI: the fields of `GenerationOptions`, each with its widget."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import gradio as gr
from gradio.components import Component

from medley.generation import GenerationOptions
from medley.generation.config import Mode

RANDOM_SEED = -1  # value of the seed for a random one
NO_IMAGE_LIMIT = 0  # value of `max_images` for any number
INTEGER_SETTINGS = (
    "seed", "min_images", "max_images", "max_new_tokens", "text_top_k", "image_top_k",
)  # fmt: skip
MakeWidget = Callable[[int], Component]  # takes the maximum number of tokens of a response


def _slider(name: str, label: str, low: float, high: float, step: float) -> MakeWidget:
    default = getattr(GenerationOptions, name)
    return lambda _: gr.Slider(low, high, value=default, step=step, label=label)


def _checkbox(name: str, label: str) -> MakeWidget:
    return lambda _: gr.Checkbox(getattr(GenerationOptions, name), label=label)


def _max_new_tokens(limit: int) -> Component:
    default = min(limit, GenerationOptions.max_new_tokens)
    return gr.Slider(1, limit, value=default, step=1, label="Maximum tokens")


SETTINGS: dict[str, MakeWidget] = {
    "mode": lambda _: gr.Radio(
        list(get_args(Mode)), value=GenerationOptions.mode, label="Response type"
    ),
    "seed": lambda _: gr.Number(
        RANDOM_SEED, label=f"Seed ({RANDOM_SEED}: random)", precision=0, minimum=RANDOM_SEED
    ),
    "min_images": _slider("min_images", "Minimum images", 0, 8, 1),
    "max_images": lambda _: gr.Slider(
        0, 8, value=NO_IMAGE_LIMIT, step=1, label=f"Maximum images ({NO_IMAGE_LIMIT}: no limit)"
    ),
    "max_new_tokens": _max_new_tokens,
    "text_greedy": _checkbox("text_greedy", "Greedy decoding of text"),
    "text_temperature": _slider("text_temperature", "Text temperature", 0.05, 2, 0.05),
    "text_top_p": _slider("text_top_p", "Text top-p", 0.05, 1, 0.05),
    "text_top_k": _slider("text_top_k", "Text top-k (0: all)", 0, 1000, 1),
    "repetition_penalty": _slider("repetition_penalty", "Repetition penalty", 1, 2, 0.05),
    "guidance_scale_text": _slider("guidance_scale_text", "Text guidance scale", 0, 10, 0.1),
    "guidance_scale_image": _slider("guidance_scale_image", "Image guidance scale", 0, 10, 0.1),
    "image_greedy": _checkbox("image_greedy", "Greedy decoding of images"),
    "image_temperature": _slider("image_temperature", "Image temperature", 0.05, 2, 0.05),
    "image_top_p": _slider("image_top_p", "Image top-p", 0.05, 1, 0.05),
    "image_top_k": _slider("image_top_k", "Image top-k (0: all)", 0, 1000, 1),
}
