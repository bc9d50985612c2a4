"""Weight-only quantisation of the decoder's layers, by bitsandbytes: half a byte or one a weight.

The matrices of the layers are kept in 4 bits (nf4, Dettmers et al. 2023) or 8 bits; embedding,
norms, output head and VQGAN stay as they are.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Literal

import torch
from torch import nn

from medley.errors import UserError

Quantize = Literal["4bit", "8bit"]


def quantize_layers(decoder: Any, kind: Quantize, dtype: torch.dtype) -> None:
    """Replaces every matrix of the layers; `dtype` is what products are computed in.

    The weights are quantised when the decoder is moved to its device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantising to {kind} needs bitsandbytes: pip install 'medley-mm[quantize]'"
        )
    kinds = importlib.import_module("bitsandbytes").nn  # untyped: held as Any

    def is_quantized(linear: nn.Linear) -> nn.Module:
        sizes = (linear.in_features, linear.out_features)
        if kind == "4bit":
            new: Any = kinds.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4")
            new.weight = kinds.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = kinds.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            new.weight = kinds.Int8Params(
                linear.weight.data, requires_grad=False, has_fp16_weights=False
            )
        module: nn.Module = new
        return module

    for layer in decoder.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, is_quantized(child))
    # PEFT and Trainer look at these.
    decoder.is_loaded_in_4bit, decoder.is_loaded_in_8bit = kind == "4bit", kind == "8bit"
