"""One table of names: Chameleon's tensors <-> Hugging Face's, with how they are sharded.

Chameleon interleaves the rotary halves of each head (x0 y0 x1 y1 …) where Hugging Face splits
them (x0 x1 … y0 y1 …), and keeps one query and key norm a layer and shard where Hugging Face
keeps one a head. The inverse of every step is derived from the same row of the table.

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

Split = Literal["rows", "columns", "copied", "head norm"]
HeadKind = Literal["query", "key"]
Norms = Literal["equal", "mean"]


@dataclass(frozen=True)
class WeightRule:
    """`split` says what one shard of several holds; `rotary` whose heads are permuted."""

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
ROPE = "rope.freqs"  # kept in Chameleon's files, computed from the configuration elsewhere
_FUSED_QKV = re.compile(r"(layers\.\d+\.attention\.)wqkv\.weight")


def weight_rules(layers: int) -> list[WeightRule]:
    """Every tensor of a decoder of so many layers."""
    per_layer = [
        WeightRule(
            f"layers.{i}.{e.chameleon}", f"model.layers.{i}.{e.hugging_face}", e.split, e.rotary
        )
        for i in range(layers)
        for e in _LAYER
    ]
    return [*_TOP, *per_layer]


@dataclass(frozen=True)
class HeadLayout:
    """Numbers of heads of the whole model, and of shards that it is kept in."""

    query: int
    key: int
    shards: int

    def __post_init__(self) -> None:
        if self.query % self.shards or self.key % self.shards:
            raise UserError(
                f"{self.query} heads with {self.key} for keys and values cannot be split over "
                f"{self.shards} shards: every shard holds the same number of whole heads"
            )

    def count(self, kind: HeadKind) -> int:
        return self.query if kind == "query" else self.key


def to_hugging_face(entry: WeightRule, shards: Sequence[Tensor], heads: HeadLayout) -> Tensor:
    """The tensors of one name from every shard -> Hugging Face's tensor."""
    if entry.split == "copied":
        return shards[0]
    if entry.split == "head norm":
        assert entry.rotary is not None
        each = heads.count(entry.rotary) // heads.shards
        split = torch.stack([_split_halves(norm[None], 1)[0] for norm in shards])
        return split.repeat_interleave(each, dim=0)
    whole = torch.cat(list(shards), dim=0 if entry.split == "rows" else 1)
    return whole if entry.rotary is None else _split_halves(whole, heads.count(entry.rotary))


def to_chameleon(
    entry: WeightRule, tensor: Tensor, heads: HeadLayout, norms: Norms = "equal"
) -> list[Tensor]:
    """Hugging Face's tensor -> what each shard holds under Chameleon's name.

    Raises UserError for query or key norms that differ between the heads of one shard, which
    Chameleon's layout cannot hold, unless `norms` is `mean` and takes their mean.
    """
    if entry.split == "copied":
        return [tensor] * heads.shards
    if entry.split == "head norm":
        shards = []
        for number, part in enumerate(tensor.chunk(heads.shards, dim=0)):
            if norms == "mean":
                part = part.float().mean(0, keepdim=True).to(part.dtype)
            elif not torch.equal(part, part[:1].expand_as(part)):
                difference = float((part - part[:1]).abs().max())
                raise UserError(
                    f"{entry.hugging_face}: the norms of the heads of shard {number} differ (by "
                    f"up to {difference:.3g}); Chameleon's layout keeps one norm a shard, so "
                    "that this model (trained in full?) stays in Hugging Face's layout; more "
                    "--shards may hold it, --norms mean takes the mean and changes the model"
                )
            shards.append(_interleave_halves(part[:1], 1)[0])
        return shards
    whole = tensor
    if entry.rotary is not None:
        whole = _interleave_halves(tensor, heads.count(entry.rotary))
    return [
        part.contiguous() for part in whole.chunk(heads.shards, 0 if entry.split == "rows" else 1)
    ]


def _split_halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows x0 y0 x1 y1 … of each head -> x0 x1 … y0 y1 …; norms (1, K) go along their width."""
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
    """One shard's tensors with `wqkv`, as Chameleon's loader also reads it, taken apart."""
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
    """float32 (K / 2): 1 / theta^(2 i / K), as Chameleon keeps it in its files."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
    return 1.0 / (theta**exponents)
