"""One table of weight names: Chameleon's tensors <-> Hugging Face's, and how they are sharded.

Chameleon interleaves the rotary halves of each head (x0 y0 x1 y1 …), Hugging Face splits them
(x0 x1 … y0 y1 …). Chameleon stores one query and key norm for each layer and shard, Hugging Face
one for each head. Both directions follow from the same table.

Shapes: H heads, K head width, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medley.errors import UserError
from medley.modeling.dims import ModelDims

Split = Literal["rows", "columns", "copied", "head norm"]
HeadKind = Literal["query", "key"]
Norms = Literal["equal", "mean"]


@dataclass(frozen=True)
class WeightRule:
    """One tensor under both names.

    Attributes:
        split: the part of the tensor that one of several shards contains
        rotary: the heads whose rotary halves are permuted
    """

    chameleon: str
    hugging_face: str
    split: Split
    rotary: HeadKind | None = None


_LAYER = (
    WeightRule("attention.wq.weight", "self_attn.q_proj.weight", "rows", "query"),
    WeightRule("attention.wk.weight", "self_attn.k_proj.weight", "rows", "key"),
    WeightRule("attention.wv.weight", "self_attn.v_proj.weight", "rows"),
    WeightRule("attention.wo.weight", "self_attn.o_proj.weight", "columns"),
    WeightRule("attention.q_normalization.weight", "self_attn.q_norm.weight", "head norm", "query"),
    WeightRule("attention.q_normalization.bias", "self_attn.q_norm.bias", "head norm", "query"),
    WeightRule("attention.k_normalization.weight", "self_attn.k_norm.weight", "head norm", "key"),
    WeightRule("attention.k_normalization.bias", "self_attn.k_norm.bias", "head norm", "key"),
    WeightRule("feed_forward.w1.weight", "mlp.gate_proj.weight", "rows"),
    WeightRule("feed_forward.w2.weight", "mlp.down_proj.weight", "columns"),
    WeightRule("feed_forward.w3.weight", "mlp.up_proj.weight", "rows"),
    WeightRule("attention_norm.weight", "input_layernorm.weight", "copied"),
    WeightRule("ffn_norm.weight", "post_attention_layernorm.weight", "copied"),
)
_TOP = (
    WeightRule("tok_embeddings.weight", "model.embed_tokens.weight", "columns"),
    WeightRule("norm.weight", "model.norm.weight", "copied"),
    WeightRule("output.weight", "lm_head.weight", "rows"),
)
ROPE = "rope.freqs"  # in Chameleon's files only; Hugging Face computes it from the configuration
_FUSED_QKV = re.compile(r"(layers\.\d+\.attention\.)wqkv\.weight")


def weight_rules(layers: int) -> list[WeightRule]:
    """The rules of every tensor of a decoder with `layers` layers."""
    per_layer = [
        WeightRule(
            f"layers.{i}.{rule.chameleon}",
            f"model.layers.{i}.{rule.hugging_face}",
            rule.split,
            rule.rotary,
        )
        for i in range(layers)
        for rule in _LAYER
    ]
    return [*_TOP, *per_layer]


@dataclass(frozen=True)
class HeadLayout:
    """Number of query heads and of key and value heads in the model, and number of its shards."""

    query: int
    key: int
    shards: int

    def __post_init__(self) -> None:
        if self.query % self.shards or self.key % self.shards:
            raise UserError(
                f"{self.query} query heads and {self.key} heads for keys and values cannot be "
                f"split over {self.shards} shards. Both numbers must be multiples of --shards."
            )

    @classmethod
    def of(cls, dims: ModelDims) -> HeadLayout:
        return cls(dims.heads, dims.key_value_heads, dims.shards)

    def count(self, kind: HeadKind) -> int:
        return self.query if kind == "query" else self.key


def to_hugging_face(rule: WeightRule, shards: Sequence[Tensor], heads: HeadLayout) -> Tensor:
    """The tensor of each shard -> Hugging Face's tensor."""
    if rule.split == "copied":
        return shards[0]
    if rule.split == "head norm":
        assert rule.rotary is not None
        heads_per_shard = heads.count(rule.rotary) // heads.shards
        norms = torch.stack([_split_halves(norm[None], 1)[0] for norm in shards])
        return norms.repeat_interleave(heads_per_shard, dim=0)
    joined = torch.cat(list(shards), dim=0 if rule.split == "rows" else 1)
    return joined if rule.rotary is None else _split_halves(joined, heads.count(rule.rotary))


def to_chameleon(
    rule: WeightRule, tensor: Tensor, heads: HeadLayout, norms: Norms = "equal"
) -> list[Tensor]:
    """Hugging Face's tensor -> the tensor of each shard under Chameleon's name.

    Chameleon's layout has one query norm and one key norm for each shard. If the norms of the
    heads of a shard differ, `norms` "equal" raises UserError and "mean" writes their mean.
    """
    if rule.split == "copied":
        return [tensor] * heads.shards
    if rule.split == "head norm":
        shards = []
        for number, part in enumerate(tensor.chunk(heads.shards, dim=0)):
            if norms == "mean":
                part = part.float().mean(0, keepdim=True).to(part.dtype)
            elif not torch.equal(part, part[:1].expand_as(part)):
                difference = float((part - part[:1]).abs().max())
                raise UserError(
                    f"{rule.hugging_face}: The norms of the heads of shard {number} differ by up "
                    f"to {difference:.3g}. Chameleon's layout stores one norm for each shard, so "
                    "this model (trained with --trainable full?) needs Hugging Face's layout. "
                    "More --shards may help. --norms mean writes the mean and changes the model."
                )
            shards.append(_interleave_halves(part[:1], 1)[0])
        return shards
    if rule.rotary is not None:
        tensor = _interleave_halves(tensor, heads.count(rule.rotary))
    parts = tensor.chunk(heads.shards, 0 if rule.split == "rows" else 1)
    return [part.contiguous() for part in parts]


def _split_halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows x0 y0 x1 y1 … of each head -> x0 x1 … y0 y1 …; columns instead for norms (1, K)."""
    if tensor.shape[0] == 1:
        return tensor.reshape(-1, 2).t().reshape(1, -1)
    rows, columns = tensor.shape
    return (
        tensor.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
    )


def _interleave_halves(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `_split_halves`."""
    if tensor.shape[0] == 1:
        return tensor.reshape(2, -1).t().reshape(1, -1)
    rows, columns = tensor.shape
    return (
        tensor.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
    )


def split_qkv(state: dict[str, Tensor], heads: HeadLayout) -> dict[str, Tensor]:
    """Splits the fused `wqkv` of one shard, which Chameleon's loader reads as well."""
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _FUSED_QKV.fullmatch(name)
        if match is None:
            plain[name] = tensor
            continue
        width = tensor.shape[0] // (heads.query + 2 * heads.key)
        sizes = [heads.query * width, heads.key * width, heads.key * width]
        for letter, part in zip("qkv", torch.split(tensor, sizes), strict=True):
            plain[f"{match[1]}w{letter}.weight"] = part
    return plain


def rope_frequencies(head_width: int, theta: float) -> Tensor:
    """float32 (K / 2): 1 / theta^(2 i / K), as in Chameleon's files."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
    return 1.0 / (theta**exponents)
