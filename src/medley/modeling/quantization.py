"""Quantization of the decoder's layers with bitsandbytes.

The matrices of the layers are stored in 4 bits (nf4, Dettmers et al. 2023) or 8 bits. Embedding,
norms, output head and VQGAN are not quantized. With 4 bits, the products are those of the other
dtype. With 8 bits, CUDA rounds the inputs of a product to 8 bits as well, except for outliers
(Dettmers et al. 2022), which are multiplied in float16.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import nn

from medley.utils.extras import require_extra

Quantize = Literal["4bit", "8bit"]
OUTLIER = 6.0  # inputs of at least this size are not rounded to 8 bits (the published threshold)


def require_quantization(kind: Quantize) -> None:
    """Raises UserError where bitsandbytes is not installed."""
    require_extra("bitsandbytes", "quantize", f"Quantization to {kind}")


def quantize_layers(decoder: Any, kind: Quantize, dtype: torch.dtype) -> None:
    """Replaces every matrix of the layers. `dtype` is the dtype of the matrix products.

    The weights are quantized when the decoder is moved to its device.
    """
    require_quantization(kind)
    kinds = importlib.import_module("bitsandbytes").nn  # bitsandbytes has no types

    def quantize_linear(linear: nn.Linear) -> nn.Module:
        sizes = (linear.in_features, linear.out_features)
        if kind == "4bit":
            new: Any = kinds.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4")
            new.weight = kinds.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = kinds.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=OUTLIER)
            new.weight = kinds.Int8Params(
                linear.weight.data, requires_grad=False, has_fp16_weights=False
            )
        module: nn.Module = new
        return module

    for layer in decoder.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, quantize_linear(child))
    # PEFT and Trainer read these attributes.
    decoder.is_loaded_in_4bit, decoder.is_loaded_in_8bit = kind == "4bit", kind == "8bit"
