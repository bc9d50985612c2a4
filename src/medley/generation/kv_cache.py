"""Key-value cache of many branches with individual lengths, one tensor for each layer.

Shapes: S slots, R branches of the current pass, T new tokens of each, H key-value heads,
L longest length, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import transformers

_LENGTH_STEP = 256  # the tensors grow by multiples of this many positions


@dataclass(frozen=True)
class CachedPrefix:
    """Token ids of a context, and their keys and values: (2, H, T, K) for each layer."""

    ids: tuple[int, ...]
    layers: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class KeyValueCache:
    """Implements the protocol that transformers' attention layers expect of a cache.

    `set_write_positions` sets where the next keys and values are written. Slots in use are kept
    contiguous, so that a step reads views and copies nothing.
    """

    is_compileable = False

    def __init__(
        self,
        config: transformers.ChameleonConfig,
        dtype: torch.dtype,
        device: torch.device,
        max_slots: int,
    ) -> None:
        self.max_slots = max_slots  # expected limit: more slots are allocated only one by one
        width = config.hidden_size // config.num_attention_heads
        shape = (0, config.num_key_value_heads, 0, width)
        layers = range(config.num_hidden_layers)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self._slots = torch.zeros(0, dtype=torch.int64)
        self._positions = torch.zeros(0, 0, dtype=torch.int64)
        self._first_slot = self._num_written = self._length = 0
        self.num_slots = 0  # in use
        self.allocations = 0  # how many times the tensors were reallocated

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    # --- slots ----------------------------------------------------------------------------

    def add_slot(self) -> int:
        """Takes the next slot and returns its number."""
        self.num_slots += 1
        self._grow(self.num_slots, 0)
        return self.num_slots - 1

    def remove_slot(self, slot: int) -> int:
        """Frees a slot. The content of the last slot moves into it; returns the last slot."""
        last = self.num_slots - 1
        if slot != last:
            for tensor in (*self._keys, *self._values):
                tensor[slot] = tensor[last]
        self.num_slots -= 1
        if self.num_slots == 0:  # an idle engine holds no memory
            self.allocations += 1
            for tensors in (self._keys, self._values):
                tensors[:] = [t.new_empty(0, t.shape[1], 0, t.shape[3]) for t in tensors]
        return last

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot to another."""
        self._grow(self.num_slots, length)
        for tensor in (*self._keys, *self._values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def snapshot(self, slot: int, ids: tuple[int, ...]) -> CachedPrefix:
        """Copies the keys and values of the first `len(ids)` positions of a slot."""
        pairs = zip(self._keys, self._values, strict=True)
        return CachedPrefix(
            ids, tuple(torch.stack([t[slot, :, : len(ids)] for t in pair]) for pair in pairs)
        )

    def restore(self, slot: int, prefix: CachedPrefix, length: int) -> None:
        """Writes the first `length` positions of a snapshot into a slot."""
        self._grow(self.num_slots, length)
        for tensors, side in ((self._keys, 0), (self._values, 1)):
            for tensor, saved in zip(tensors, prefix.layers, strict=True):
                tensor[slot, :, :length] = saved[side, :, :length]

    def _grow(self, slots: int, length: int) -> None:
        old_slots, heads, old_length, width = self._keys[0].shape
        if slots <= old_slots and length <= old_length:
            return
        new_slots, new_length = old_slots, old_length
        if slots > old_slots:
            new_slots = max(slots, min(2 * old_slots, self.max_slots))
        if length > old_length:
            new_length = _round_up(length)
        self.allocations += 1
        for tensors in (self._keys, self._values):
            for index, old in enumerate(tensors):
                # Zeros: masked positions still enter the product 0 * value, which must not be NaN.
                grown = old.new_zeros(new_slots, heads, new_length, width)
                grown[:old_slots, :, :old_length] = old
                tensors[index] = grown

    # --- forward passes -------------------------------------------------------------------

    def reserve(self, length: int) -> int:
        """Makes room for `length` positions in each slot; returns the rounded-up length."""
        self._grow(self.num_slots, length)
        return _round_up(length)

    def set_write_positions(self, first_slot: int, positions: Tensor, length: int) -> None:
        """Sets where `update` writes: slots from `first_slot` on, at `positions` int64 (R, T).

        `update` returns the first `length` positions of each of these slots.
        """
        self._grow(self.num_slots, length)
        self._first_slot, self._num_written = first_slot, len(positions)
        self._slots = torch.arange(len(positions), device=positions.device)[:, None]
        self._positions, self._length = positions, length

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values (R, H, T, K) -> all of their branches, (R, H, L, K)."""
        result = []
        for tensors, new in ((self._keys, keys), (self._values, values)):
            if tensors[layer_idx].device != new.device:  # a layer on another device
                tensors[layer_idx] = tensors[layer_idx].to(new.device)
            own = tensors[layer_idx][self._first_slot : self._first_slot + self._num_written]
            slots, positions = self._slots.to(new.device), self._positions.to(new.device)
            own[slots, :, positions] = new.transpose(1, 2)
            result.append(own[:, :, : self._length])
        return result[0], result[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_length(self) -> int | None:
        return None

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._length, 0


def bytes_per_token(config: transformers.ChameleonConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token of one branch, over all layers."""
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return int(2 * config.num_hidden_layers * width * dtype.itemsize)


def _round_up(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP
