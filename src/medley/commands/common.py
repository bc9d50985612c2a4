"""The flags that all commands with a model share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medley.assistant import Model
from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.generation.options import Mode
from medley.loading import load
from medley.quantization import Quantize


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model, and how it generates.

    Args:
        ckpt: checkpoint in any layout, an adapter, or tiny
        adapter: adapter that is laid over the checkpoint
        base: base of a checkpoint that is an adapter
        vqgan: folder of a VQGAN with a decoder, for checkpoints that carry none
        device: auto, cpu, cuda, mps, or map for several GPUs
        dtype: auto, float32, bfloat16 or float16
        quantize: keep the layers' matrices in 4 or 8 bits (bitsandbytes)
        mode: any, text or image
        max_new_tokens: longest answer
        seed: seed of the sampling
        text_greedy: take the likeliest word
        text_temperature: temperature of words
        text_top_p: share of probability that words are sampled from
        text_top_k: likeliest words that are sampled from; 0 for all
        repetition_penalty: penalty of words that stand there already
        image_greedy: take the likeliest image code
        image_temperature: temperature of image codes
        image_top_p: share of probability that image codes are sampled from
        image_top_k: likeliest image codes that are sampled from; 0 for all
        guidance_scale_text: weight of the context's words while drawing
        guidance_scale_image: weight of the context's pictures while drawing
        min_images: pictures that have to come
        max_images: pictures that may come
        stop: words that end the answer, each a single text piece of the vocabulary
    """

    ckpt: str
    adapter: Path | None = None
    base: str | None = None
    vqgan: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: Quantize | None = None
    mode: Mode = "any"
    max_new_tokens: int = GenerationOptions.max_new_tokens
    seed: int = GenerationOptions.seed
    text_greedy: bool = GenerationOptions.text_greedy
    text_temperature: float = GenerationOptions.text_temperature
    text_top_p: float = GenerationOptions.text_top_p
    text_top_k: int = GenerationOptions.text_top_k
    repetition_penalty: float = GenerationOptions.repetition_penalty
    image_greedy: bool = GenerationOptions.image_greedy
    image_temperature: float = GenerationOptions.image_temperature
    image_top_p: float = GenerationOptions.image_top_p
    image_top_k: int = GenerationOptions.image_top_k
    guidance_scale_text: float = GenerationOptions.guidance_scale_text
    guidance_scale_image: float = GenerationOptions.guidance_scale_image
    min_images: int = GenerationOptions.min_images
    max_images: int | None = GenerationOptions.max_images
    stop: list[str] | None = None

    def generation(self, model: Model | None = None) -> GenerationOptions:
        """The options of generation, checked; with `model` also the words that end an answer."""
        names = set(GenerationOptions.__dataclass_fields__) - {"stop"}
        fields: dict[str, Any] = {name: getattr(self, name) for name in names}
        stop = tuple(self._piece(word, model) for word in self.stop or []) if model else ()
        return GenerationOptions(**fields, stop=stop)

    def _piece(self, word: str, model: Model) -> int:
        ids = model.tokenizer.encode(word)
        if len(ids) != 1:
            shown = [model.tokenizer.decode([i]) for i in ids]
            raise UserError(f"--stop {word!r}: not one text piece but {shown}; name one of those")
        return int(ids[0])

    def load(self, rows: int = 1) -> Model:
        """The model; says what memory it and `rows` answers of full length take."""
        model = load(
            self.ckpt, self.device, self.dtype, self.adapter, self.base, self.vqgan, self.quantize
        )
        if self.mode != "text":
            model.image_tokenizer.require_decoder()
        print(memory_line(model, rows), flush=True)
        return model


def memory_line(model: Model, rows: int) -> str:
    """What the weights take, and at most the keys and values of so many rows."""
    config = model.engine.decoder.config
    weights = sum(p.numel() * p.element_size() for p in model.decoder.parameters())
    weights += sum(p.numel() * p.element_size() for p in model.image_tokenizer.vqgan.parameters())
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    size = torch.empty(0, dtype=model.engine.dtype).element_size()
    token = 2 * config.num_hidden_layers * width * size
    return (
        f"memory: weights {weights / 1e9:.2f} GB; keys and values {token / 1e3:.1f} kB a token, "
        f"at most {3 * rows * model.engine.context * token / 1e9:.2f} GB for {rows} "
        f"{'answer' if rows == 1 else 'answers'} with guided pictures"
    )
