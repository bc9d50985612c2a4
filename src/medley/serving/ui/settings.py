"""The settings of an answer, as the page offers them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from medley.generation import GenerationOptions

_D = GenerationOptions()


def _slider(name: str, label: str, low: float, high: float, step: float) -> Any:
    return lambda _: gr.Slider(low, high, value=getattr(_D, name), step=step, label=label)


# Fields of GenerationOptions in the order of the page, each made for the most tokens of an answer.
SETTINGS: dict[str, Any] = {
    "mode": lambda _: gr.Radio(["any", "text", "image"], value=_D.mode, label="Answer with"),
    "seed": lambda _: gr.Number(-1, label="Seed (-1: another one each time)", precision=0,
                              minimum=-1),
    "min_images": _slider("min_images", "Pictures, at least", 0, 8, 1),
    "max_images": lambda _: gr.Slider(0, 8, 0, step=1, label="Pictures, at most (0: any)"),
    "max_new_tokens": lambda most: gr.Slider(1, most, min(most, _D.max_new_tokens), step=1,
                                             label="Tokens, at most"),
    "text_greedy": lambda _: gr.Checkbox(_D.text_greedy, label="Likeliest word only (greedy)"),
    "text_temperature": _slider("text_temperature", "Temperature of words", 0.05, 2, 0.05),
    "text_top_p": _slider("text_top_p", "Top-p of words", 0.05, 1, 0.05),
    "text_top_k": _slider("text_top_k", "Top-k of words (0: all)", 0, 1000, 1),
    "repetition_penalty": _slider("repetition_penalty", "Repetition penalty", 1, 2, 0.05),
    "guidance_scale_text": _slider("guidance_scale_text", "Guidance by words", 0, 10, 0.1),
    "guidance_scale_image": _slider("guidance_scale_image", "Guidance by pictures", 0, 10, 0.1),
    "image_greedy": lambda _: gr.Checkbox(_D.image_greedy, label="Likeliest code only (greedy)"),
    "image_temperature": _slider("image_temperature", "Temperature of pictures", 0.05, 2, 0.05),
    "image_top_p": _slider("image_top_p", "Top-p of pictures", 0.05, 1, 0.05),
    "image_top_k": _slider("image_top_k", "Top-k of pictures (0: all)", 0, 1000, 1),
}  # fmt: skip
