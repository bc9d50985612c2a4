"""One decode step by hand: the decoder's layers with fewer, larger operations.

Queries, keys and values are one product, gate and up another; both norms of the heads and both
rotations are one operation each. The modules' weights become views of the joined ones, so nothing
is held twice. The result is that of transformers' modules up to rounding.

Shapes: R streams, D model width, H heads, G heads of keys and values, K head width, L longest
length, F width of the feed-forward part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medley.generation.kv_cache import KeyValueCache
from medley.generation.packed_linear import LARGEST, PackedLinear

_HEAD_NORM_EPS = 1e-5  # of Chameleon's query and key norms


class _Layer(NamedTuple):
    query_key_value: PackedLinear  # ((H + 2 G) K, D)
    head_scale: Tensor  # (H + G, K): of queries, then keys
    head_shift: Tensor
    output: PackedLinear  # (D, H K)
    gate_up: PackedLinear  # (2 F, D)
    down: PackedLinear  # (D, F)
    attention_norm: Tensor
    feed_forward_norm: Tensor


def can_fuse(decoder: Any) -> bool:
    """Whether all matrices are plain: no adapter, no quantised weights, one device."""
    linear = [
        module
        for layer in decoder.model.layers
        for block in (layer.self_attn, layer.mlp)
        for name, module in block.named_children()
        if name.endswith("_proj")
    ]
    plain = all(type(m) is nn.Linear and m.bias is None for m in linear)
    hooked = any(hasattr(m, "_hf_hook") for m in decoder.modules())
    return plain and not hooked and decoder.config.hidden_act == "silu"


def _join(*modules: nn.Linear) -> Tensor:
    """The weights of modules, one below the other; each then is a view of the whole."""
    joined = torch.cat([module.weight.data for module in modules])
    start = 0
    for module in modules:
        rows = module.out_features
        module.weight.data = joined[start : start + rows]
        start += rows
    return joined


class FusedDecoder:
    """Tokens of all streams of a cache -> their last hidden states, normed, (R, D)."""

    def __init__(self, decoder: Any) -> None:
        config = decoder.config
        self._embedding = decoder.model.embed_tokens.weight
        self._norm, self._eps = decoder.model.norm.weight, config.rms_norm_eps
        self._swin = bool(config.swin_norm)
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._width = config.hidden_size // self._heads
        size = sum(p.nbytes for p in decoder.model.layers.parameters())
        self._layers = [self._of(layer, size <= LARGEST) for layer in decoder.model.layers]
        positions = torch.arange(config.max_position_embeddings, device=self._embedding.device)
        cos, sin = decoder.model.rotary_emb(self._embedding, positions[None])
        half = self._width // 2
        self._cos = cos[0]
        self._sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)  # for halves changed over

    @staticmethod
    def _of(layer: Any, pack: bool) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            PackedLinear(_join(attention.q_proj, attention.k_proj, attention.v_proj), pack),
            torch.cat([attention.q_norm.weight, attention.k_norm.weight]).detach(),
            torch.cat([attention.q_norm.bias, attention.k_norm.bias]).detach(),
            PackedLinear(attention.o_proj.weight, pack),
            PackedLinear(_join(mlp.gate_proj, mlp.up_proj), pack),
            PackedLinear(mlp.down_proj.weight, pack),
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
        )

    def __call__(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: KeyValueCache
    ) -> Tensor:
        """Tokens and positions int64 (R,), mask bool (R, 1, 1, L) or None where all is seen.

        `cache.place` has been told of the positions.
        """
        states = F.embedding(tokens, self._embedding)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        for index, layer in enumerate(self._layers):
            if self._swin:
                attended = self._attend(states, layer, index, cos, sin, mask, cache)
                states = states + self._rms_norm(attended, layer.attention_norm)
                fed = self._feed(states, layer)
                states = states + self._rms_norm(fed, layer.feed_forward_norm)
            else:
                normed = self._rms_norm(states, layer.attention_norm)
                states = states + self._attend(normed, layer, index, cos, sin, mask, cache)
                states = states + self._feed(self._rms_norm(states, layer.feed_forward_norm), layer)
        return self._rms_norm(states, self._norm)

    def _rms_norm(self, states: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(states, weight.shape, weight, self._eps)

    def _attend(
        self, states: Tensor, layer: _Layer, index: int, cos: Tensor, sin: Tensor,
        mask: Tensor | None, cache: KeyValueCache,
    ) -> Tensor:  # fmt: skip
        heads = self._heads + 2 * self._groups
        joined = layer.query_key_value(states).view(-1, heads, self._width)
        turned = joined[:, : self._heads + self._groups]  # queries and keys
        turned = F.layer_norm(turned, (self._width,), None, None, _HEAD_NORM_EPS)
        turned = torch.addcmul(layer.head_shift, turned, layer.head_scale)
        turned = torch.addcmul(turned * cos, turned.roll(self._width // 2, -1), sin)
        query, key = turned[:, : self._heads, None], turned[:, self._heads :, None]
        value = joined[:, self._heads + self._groups :, None]
        keys, values = cache.update(key, value, index)
        attended = F.scaled_dot_product_attention(
            query, keys, values, mask, enable_gqa=self._groups != self._heads
        )
        return layer.output(attended.flatten(1))

    def _feed(self, states: Tensor, layer: _Layer) -> Tensor:
        gate, up = layer.gate_up(states).chunk(2, -1)
        return layer.down(F.silu(gate) * up)
