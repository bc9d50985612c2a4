"""The decoder that generation needs, as a type: transformers' Chameleon layout.

Shapes: B sequences, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    import transformers

    from medley.generation.kv_cache import KeyValueCache


class HiddenStates(Protocol):
    @property
    def last_hidden_state(self) -> Tensor:
        """(B, T, D)."""


class RotaryEmbedding(Protocol):
    def __call__(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions int64 (B, T) -> cosines and sines, each (B, T, head width)."""


class Attention(Protocol):
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.LayerNorm
    k_norm: nn.LayerNorm

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...


class FeedForward(Protocol):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...


class RMSNorm(Protocol):
    weight: nn.Parameter


class DecoderLayer(Protocol):
    self_attn: Attention
    mlp: FeedForward
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm

    def parameters(self) -> Iterator[nn.Parameter]: ...


class DecoderStack(Protocol):
    """Embedding, layers and final norm: everything below the output head."""

    embed_tokens: nn.Embedding
    norm: RMSNorm
    rotary_emb: RotaryEmbedding

    @property
    def layers(self) -> Iterable[DecoderLayer]: ...

    def __call__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: KeyValueCache,
        use_cache: bool,
    ) -> HiddenStates: ...


class Logits(Protocol):
    @property
    def logits(self) -> Tensor:
        """(B, T, V)."""


class Decoder(Protocol):
    """`ChameleonForConditionalGeneration`, also with LoRA or quantized layers."""

    config: transformers.ChameleonConfig
    lm_head: nn.Module

    @property
    def model(self) -> DecoderStack: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def __call__(self, input_ids: Tensor) -> Logits: ...
