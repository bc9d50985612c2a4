"""Bytes that a layer keeps for the backward pass, by the decoder's configuration.

Each term is the result of an operation whose backward pass needs it. A test adds up the tensors
that autograd really saves and compares them with these formulas.

Shapes: D model width, F feed-forward width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

FLOAT32, HALF = 4, 2
# Modules with the same input, which is kept once unless each makes a copy of its own.
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"),
                  ("down_proj",))  # fmt: skip


@dataclass(frozen=True)
class ActivationEstimate:
    """What the activations of a layer depend on.

    Attributes:
        config: the decoder's configuration
        itemsize: bytes of a number in the computation's dtype
        full: whether all weights are trained
        adapted: names of the modules with a LoRA adapter
        rank: rank of the adapters
        dropout: whether the adapters have dropout
        autocast: whether trained weights in float32 are computed with in half precision, as
            Trainer does without DeepSpeed; every matrix then keeps its own copy of its input
        keeps_inputs: whether the frozen matrices keep their inputs, as those of 8 bits do
        on_cuda: CUDA's dropout keeps a byte for each number, its autocast computes LayerNorm in
            float32, and its attention computes in half precision
    """

    config: transformers.ChameleonConfig
    itemsize: int
    full: bool = False
    adapted: Collection[str] = ()
    rank: int = 0
    dropout: bool = False
    autocast: bool = False
    keeps_inputs: bool = False
    on_cuda: bool = False

    @property
    def residual_bytes(self) -> int:
        """Bytes of a layer's input for each token: all that gradient checkpointing keeps."""
        return int(self.config.hidden_size) * self._residual_itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer keeps for each token."""
        parts = (self._norms(), self._attention(), self._feed_forward(), self._inputs())
        return int(sum(parts))

    @property
    def backward_bytes(self) -> int:
        """Bytes of the gradients for each token while the backward pass is in one layer."""
        config = self.config
        in_dtype = 2 * (config.intermediate_size + config.hidden_size) * self.itemsize
        return int(in_dtype + FLOAT32 * config.hidden_size)

    @property
    def _residual_itemsize(self) -> int:
        return FLOAT32 if self.full and self.autocast else self.itemsize

    def _norms(self) -> int:
        """Two RMS norms in float32, and LayerNorm of queries and keys."""
        config = self.config
        width, heads = config.hidden_size, config.num_attention_heads
        kv_heads = config.num_key_value_heads
        itemsize = FLOAT32 if self.autocast and self.on_cuda else self.itemsize
        normalized = (width + kv_heads * (width // heads)) * itemsize
        total = 2 * FLOAT32 * (width + 1) + normalized + 2 * FLOAT32 * (heads + kv_heads)
        if self.full:  # a norm's weight needs its factor
            total += 2 * width * self._residual_itemsize + normalized
        return int(total)

    def _attention(self) -> int:
        """Queries, keys, values and output of every head, and a log-partition for each head."""
        itemsize = self.itemsize if self.on_cuda else FLOAT32
        return int(4 * self.config.hidden_size * itemsize) + FLOAT32 * int(
            self.config.num_attention_heads
        )

    def _feed_forward(self) -> int:
        """The results of gate, of the activation function, and of up."""
        return int(3 * self.config.intermediate_size * self.itemsize)

    def _inputs(self) -> int:
        """Inputs of trained matrices, and dropout's masks."""
        total = 0
        for modules in _SHARED_INPUTS:
            is_down = modules == ("down_proj",)
            width = int(self.config.intermediate_size if is_down else self.config.hidden_size)
            if self.full:
                total += self._full_input(modules, width)
                continue
            adapted = [module for module in modules if module in self.adapted]
            # The input of o_proj is the output of attention, which is kept already.
            is_shared = adapted and not self.dropout and not self.autocast
            if modules != ("o_proj",) and (is_shared or self.keeps_inputs):
                total += width * self.itemsize
            total += 0 if is_shared else len(adapted) * self._copy_bytes(width)
            total += len(adapted) * self.rank * (HALF if self.autocast else self.itemsize)
        return total

    def _full_input(self, modules: tuple[str, ...], width: int) -> int:
        if modules == ("o_proj",):  # kept by attention
            return 0
        if not self.autocast:
            return width * self.itemsize
        if modules == ("down_proj",):  # is in half precision already
            return width * HALF
        # Each matrix keeps a copy in half precision.
        return len(modules) * width * HALF

    def _copy_bytes(self, width: int) -> int:
        """An adapter's own copy of its input, and the mask of its dropout."""
        itemsize = HALF if self.autocast else self.itemsize
        mask = 1 if self.on_cuda else (FLOAT32 if self.autocast else self.itemsize)
        return width * (itemsize + mask * self.dropout)
