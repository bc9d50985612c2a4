"""One decode step with fused weights: the decoder's layers in fewer, larger operations.

Query, key and value projections are one product, gate and up projections another; the norms and
the rotations of query and key heads are one operation each. The modules' weights become views of
the fused weights, so that no weight is stored twice. The result equals that of transformers'
modules up to rounding.

Shapes: R branches, T new tokens of each, D model width, H query heads, G key-value heads, K head
width, L longest length, F width of the feed-forward part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medley.generation.decoder import Decoder, DecoderLayer
from medley.generation.kv_cache import KeyValueCache
from medley.generation.packed_linear import MAX_PACKED_BYTES, PackedLinear

_HEAD_NORM_EPS = 1e-5  # of Chameleon's query and key norms


class _Layer(NamedTuple):
    query_key_value: PackedLinear  # ((H + 2 G) K, D)
    head_scale: Tensor  # (H + G, K): query heads, then key heads
    head_shift: Tensor
    output: PackedLinear  # (D, H K)
    gate_up: PackedLinear  # (2 F, D)
    down: PackedLinear  # (D, F)
    attention_norm: Tensor
    feed_forward_norm: Tensor


def can_fuse(decoder: Decoder) -> bool:
    """Whether all projections are plain: no adapter, no quantized weights, one device."""
    projections = [
        module
        for layer in decoder.model.layers
        for block in (layer.self_attn, layer.mlp)
        for name, module in block.named_children()
        if name.endswith("_proj")
    ]
    are_plain = all(type(m) is nn.Linear and m.bias is None for m in projections)
    has_hooks = any(hasattr(m, "_hf_hook") for m in decoder.modules())
    return are_plain and not has_hooks and decoder.config.hidden_act == "silu"


def _fuse_weights(*modules: nn.Linear) -> Tensor:
    """Concatenates the weights of modules; each module's weight becomes a view of the result."""
    fused = torch.cat([module.weight.data for module in modules])
    start = 0
    for module in modules:
        end = start + module.out_features
        module.weight.data = fused[start:end]
        start = end
    return fused


class FusedDecoder:
    """New tokens of each branch -> normalized last hidden states (R, T, D)."""

    def __init__(self, decoder: Decoder) -> None:
        config = decoder.config
        self._embedding = decoder.model.embed_tokens.weight
        self._norm, self._eps = decoder.model.norm.weight, config.rms_norm_eps
        self._swin = bool(config.swin_norm)
        self._query_heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._width = config.hidden_size // self._query_heads
        nbytes = sum(p.nbytes for layer in decoder.model.layers for p in layer.parameters())
        pack = nbytes <= MAX_PACKED_BYTES
        self._layers: list[_Layer] = []
        for layer in decoder.model.layers:
            self._layers.append(self._fuse_layer(layer, pack))
            if self._embedding.device.type == "cuda":
                # The freed matrices are too small for the next joined one: without this, a third
                # of the weights stays reserved in pieces.
                torch.cuda.empty_cache()
        positions = torch.arange(config.max_position_embeddings, device=self._embedding.device)
        cos, sin = decoder.model.rotary_emb(self._embedding, positions[None])
        half = self._width // 2
        self._cos = cos[0]
        self._sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)  # for swapped halves

    @staticmethod
    def _fuse_layer(layer: DecoderLayer, pack: bool) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            PackedLinear(_fuse_weights(attention.q_proj, attention.k_proj, attention.v_proj), pack),
            torch.cat([attention.q_norm.weight, attention.k_norm.weight]).detach(),
            torch.cat([attention.q_norm.bias, attention.k_norm.bias]).detach(),
            PackedLinear(attention.o_proj.weight, pack),
            PackedLinear(_fuse_weights(mlp.gate_proj, mlp.up_proj), pack),
            PackedLinear(mlp.down_proj.weight, pack),
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
        )

    def __call__(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: KeyValueCache
    ) -> Tensor:
        """Tokens and positions int64 (R, T), mask bool (R, 1, T, L), None if nothing is masked.

        Call `cache.set_write_positions` before.
        """
        if mask is not None:
            mask = additive_mask(mask, self._embedding.dtype)
        states = F.embedding(tokens.flatten(), self._embedding)  # (R T, D), as all below
        rotations = positions.flatten()
        cos, sin = self._cos[rotations][:, None], self._sin[rotations][:, None]
        for index, layer in enumerate(self._layers):
            if self._swin:
                attended = self._attend(states, layer, index, cos, sin, mask, cache, len(tokens))
                states = states + self._rms_norm(attended, layer.attention_norm)
                fed = self._feed_forward(states, layer)
                states = states + self._rms_norm(fed, layer.feed_forward_norm)
            else:
                normed = self._rms_norm(states, layer.attention_norm)
                states = states + self._attend(
                    normed, layer, index, cos, sin, mask, cache, len(tokens)
                )
                normed = self._rms_norm(states, layer.feed_forward_norm)
                states = states + self._feed_forward(normed, layer)
        return self._rms_norm(states, self._norm).view(*tokens.shape, -1)

    def _rms_norm(self, states: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(states, weight.shape, weight, self._eps)

    def _attend(
        self, states: Tensor, layer: _Layer, index: int, cos: Tensor, sin: Tensor,
        mask: Tensor | None, cache: KeyValueCache, branches: int,
    ) -> Tensor:  # fmt: skip
        num_rotated = self._query_heads + self._key_heads
        heads = layer.query_key_value(states).view(-1, num_rotated + self._key_heads, self._width)
        rotated = heads[:, :num_rotated]  # queries and keys
        rotated = F.layer_norm(rotated, (self._width,), None, None, _HEAD_NORM_EPS)
        rotated = torch.addcmul(layer.head_shift, rotated, layer.head_scale)
        rotated = torch.addcmul(rotated * cos, rotated.roll(self._width // 2, -1), sin)
        by_branch = rotated.view(branches, -1, num_rotated, self._width).transpose(1, 2)
        query, key = by_branch[:, : self._query_heads], by_branch[:, self._query_heads :]
        value = heads.view(branches, -1, num_rotated + self._key_heads, self._width)
        value = value[:, :, num_rotated:].transpose(1, 2)
        keys, values = cache.update(key, value, index)
        attended = F.scaled_dot_product_attention(
            query, keys, values, mask, enable_gqa=self._key_heads != self._query_heads
        )
        return layer.output(attended.transpose(1, 2).reshape(len(states), -1))

    def _feed_forward(self, states: Tensor, layer: _Layer) -> Tensor:
        gate, up = layer.gate_up(states).chunk(2, -1)
        return layer.down(F.silu(gate) * up)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask bool -> 0 where it is true, else minus infinity.

    torch's attention converts a boolean mask at each call, which is in each layer.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, float("-inf")
    )
