"""Embeddings of texts and images: the mean of the decoder's hidden states at one layer.

The model is trained to predict the next token, not to embed; this is what its hidden states are
worth for retrieval without any training.

Shapes: N inputs, S positions of a sequence, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from medley.errors import UserError
from medley.generation.decoder import Decoder
from medley.generation.model_runner import execution_device
from medley.generation.sampling import NONFINITE_LOGITS


def num_layers(decoder: Decoder) -> int:
    return int(decoder.config.num_hidden_layers)


def check_layer(decoder: Decoder, layer: int | None) -> int:
    """The number of the layer; the middle one for None. Raises UserError for an unknown layer.

    Later layers predict the next token; in the middle, images are closest to the texts about them.
    """
    count = num_layers(decoder)
    if layer is None:
        return (count + 1) // 2
    if not 0 <= layer <= count:
        raise UserError(
            f"layer is {layer}, expected 0 (the token embeddings) to {count} (the last layer, "
            "after the final norm)"
        )
    return layer


@torch.inference_mode()
def embed_sequence(decoder: Decoder, ids: Sequence[int], layer: int | None = None) -> Tensor:
    """Token ids that begin with `<s>` -> a unit vector float32 (D,) on the CPU.

    It is the mean of the hidden states of all positions but `<s>`, whose state is large and the
    same in every sequence. Raises UserError for a sequence of `<s>` alone, and for states that are
    NaN or infinite.
    """
    if len(ids) < 2:
        raise UserError("An empty input has no embedding. Give a text or an image.")
    layer = check_layer(decoder, layer)
    tokens = torch.tensor([list(ids)], device=execution_device(decoder))
    hidden = _hidden_states(decoder, tokens, layer)[0]
    mean = hidden[1:].float().mean(0)
    if not bool(mean.isfinite().all()):
        raise UserError(NONFINITE_LOGITS)
    return nn.functional.normalize(mean, dim=0).cpu()


def _hidden_states(decoder: Decoder, tokens: Tensor, layer: int) -> Tensor:
    """Token ids (1, S) -> hidden states (1, S, D) after `layer` layers."""
    stack: Any = decoder.model
    if layer == 0:
        return decoder.model.embed_tokens(tokens)
    if layer == num_layers(decoder):
        return stack(input_ids=tokens, use_cache=False).last_hidden_state
    with _stop_after(stack.layers[layer - 1]) as outputs, suppress(_Stop):
        stack(input_ids=tokens, use_cache=False)
    return outputs[0]


class _Stop(Exception):
    """Ends a forward pass whose remaining layers are not needed."""


@contextmanager
def _stop_after(module: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        raise _Stop

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
