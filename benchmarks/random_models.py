"""Random models of given sizes, for benchmarks that need a size and not a skill.

The sizes of the published models are here and nowhere in the package.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medley.checkpoints.checkpoint import open_checkpoint
from medley.data.vocabulary import Vocabulary
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.modeling.dims import ModelDims
from medley.vqgan.files import to_hugging_face_config
from medley.vqgan.model import VQGAN, VQGANConfig

STD = 0.02  # of random weights
_MIN_VOCABULARY = 9472  # the special tokens, all image tokens, and some text


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a decoder and of its VQGAN."""

    name: str
    decoder: ModelDims
    vqgan: VQGANConfig


_CHAMELEON_VQGAN = VQGANConfig(128, (1, 1, 2, 2, 4), 2, 512, 256, 256, 8192)
SIZES = {
    "7b": ModelSize("7b", ModelDims(4096, 32, 32, 32, 11008, 65536, 4096), _CHAMELEON_VQGAN),
    "34b": ModelSize(
        "34b",
        ModelDims(8192, 48, 64, 8, 22016, 65536, 4096, swin_norm=True, shards=4),
        _CHAMELEON_VQGAN,
    ),
    "tiny": ModelSize(
        "tiny",
        ModelDims(128, 2, 2, 2, 256, _MIN_VOCABULARY, 512),
        VQGANConfig(32, (1, 1, 1), 1, 32, 32, 32, 256),
    ),
}


def scaled(size: ModelSize, scale: Fraction) -> ModelSize:
    """About `scale` times the weights: layers and widths by its cube root, heads of equal width."""
    if scale == 1:
        return size
    factor = float(scale) ** (1 / 3)
    dims, own = size.decoder, size.vqgan
    head_width = dims.width // dims.heads
    grouped = dims.heads // dims.key_value_heads
    heads = max(dims.shards * grouped, round(dims.heads * factor / grouped) * grouped)
    decoder = replace(
        dims, width=heads * head_width, heads=heads, key_value_heads=heads // grouped,
        layers=max(1, round(dims.layers * factor)),
        feed_forward=max(1, round(dims.feed_forward * factor / 128)) * 128,
        vocabulary_size=max(_MIN_VOCABULARY, round(dims.vocabulary_size * factor / 128) * 128),
    )  # fmt: skip
    downsampling = own.downsampling
    resolution = max(1, round(own.resolution * factor / downsampling)) * downsampling
    channels = max(1, round(own.ch * factor / 32)) * 32
    vqgan = replace(own, ch=channels, resolution=resolution)
    return ModelSize(f"{size.name} x {scale}", decoder, vqgan)


def num_weights(dims: ModelDims) -> int:
    """Weights of a decoder, without its norms."""
    key_width = dims.width // dims.heads * dims.key_value_heads
    layer = dims.width * (2 * dims.width + 2 * key_width + 3 * dims.feed_forward)
    return dims.layers * layer + 2 * dims.vocabulary_size * dims.width


def resized(size: ModelSize, layers: int | None, width: int | None) -> ModelSize:
    """The same model with other numbers of layers and heads; the heads keep their width."""
    dims = size.decoder
    heads = dims.heads if width is None else max(1, width * dims.heads // dims.width)
    grouped = dims.heads // dims.key_value_heads
    decoder = replace(
        dims, layers=layers or dims.layers, width=dims.width // dims.heads * heads, heads=heads,
        key_value_heads=max(1, heads // grouped),
        feed_forward=max(1, dims.feed_forward * heads // dims.heads // 128) * 128,
    )  # fmt: skip
    return replace(size, decoder=decoder)


def tiny_vocabulary() -> Vocabulary:
    return open_checkpoint("tiny").text_tokenizer().vocabulary


def make_config(size: ModelSize) -> Any:
    """transformers' configuration of a decoder, with the token ids of `tiny`."""
    names = open_checkpoint("tiny").config().vocabulary_map
    return size.decoder.to_config(to_hugging_face_config(size.vqgan), names, tiny_vocabulary())


def make_decoder(
    size: ModelSize, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> ChameleonForConditionalGeneration:
    """A random decoder, made on its device.

    The logits of the tokens that end a text are 0, so that greedy decoding does not take them.
    """
    config = make_config(size)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        decoder = ChameleonForConditionalGeneration(config).to(dtype)
    decoder = decoder.to_empty(device=device)
    # Its buffers are not parameters, and to_empty leaves them without values.
    decoder.model.rotary_emb = type(decoder.model.rotary_emb)(config=config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    vocabulary = tiny_vocabulary()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.fill_(float(name.endswith("weight")))
            else:
                parameter.normal_(0, STD, generator=generator)
        decoder.lm_head.weight[[vocabulary.eos, vocabulary.end_turn]] = 0
    return decoder.eval()


def make_vqgan(config: VQGANConfig, seed: int = 0) -> VQGAN:
    """A random VQGAN in float32 on the CPU whose images use many of its codes."""
    torch.manual_seed(seed)
    vqgan = VQGAN(config).eval()
    with torch.no_grad():  # vectors of equal length: otherwise the shortest one is always nearest
        table = vqgan.quantize.embedding.weight
        table.copy_(F.normalize(table, dim=1))
    return vqgan.requires_grad_(False)


def random_squares(count: int, side: int, seed: int = 0) -> Tensor:
    """Smooth random images uint8 (B, side, side, 3) on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 16, 16, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bilinear")
    noise = torch.rand(count, 3, side, side, generator=generator)
    pixels = (0.8 * smooth + 0.2 * noise) * 255
    return pixels.permute(0, 2, 3, 1).contiguous().to(torch.uint8)
