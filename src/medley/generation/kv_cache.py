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

LENGTH_STEP = 256  # lengths of the tensors are multiples of this many positions


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

    Attributes:
        max_slots: expected limit; more slots are allocated only one by one
        max_length: no slot in use will become longer than this
        max_bytes: limit of the tensors while slots and lengths stay within what was announced;
            None for no limit
        idle_bytes: tensors up to this size are kept while no slot is in use
        allocations: how many times the tensors were reallocated
    """

    is_compileable = False

    def __init__(
        self,
        config: transformers.ChameleonConfig,
        dtype: torch.dtype,
        device: torch.device,
        max_slots: int,
    ) -> None:
        self.max_slots, self.max_length = max_slots, int(config.max_position_embeddings)
        self.max_bytes: int | None = None
        self.idle_bytes = 0
        self._bytes_per_token = bytes_per_token(config, dtype)
        width = config.hidden_size // config.num_attention_heads
        shape = (0, config.num_key_value_heads, 0, width)
        layers = range(config.num_hidden_layers)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self._slots = torch.zeros(0, dtype=torch.int64)
        self._positions = torch.zeros(0, 0, dtype=torch.int64)
        self._first_slot = self._num_written = self._length = 0
        self._slot_capacity = self._length_capacity = 0  # that every tensor has
        self._is_suspect = False
        self.num_slots = 0  # in use
        self.allocations = 0

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    @property
    def capacity(self) -> tuple[int, int]:
        """Slots, and positions of each, that are allocated."""
        return self._slot_capacity, self._length_capacity

    # --- slots ----------------------------------------------------------------------------

    def add_slot(self) -> int:
        """Takes the next slot and returns its number."""
        self._grow(self.num_slots + 1, 0)
        self.num_slots += 1  # last: the allocation may fail
        return self.num_slots - 1

    def remove_slot(self, slot: int, last_length: int) -> int:
        """Frees a slot and returns the last slot, whose content moves into the free one.

        `last_length` is the number of positions of the last slot that are in use.
        """
        last = self.num_slots - 1
        if slot != last:
            for tensor in (*self._keys, *self._values):
                tensor[slot, :, :last_length] = tensor[last, :, :last_length]
        self.num_slots -= 1
        if self.num_slots == 0 and (self._is_suspect or self.nbytes > self.idle_bytes):
            self._free()
        return last

    def suspect(self) -> None:
        """Frees the tensors once no slot is in use, because a pass failed.

        They may contain NaN, which would reach later sequences through 0 * value.
        """
        self._is_suspect = True
        if self.num_slots == 0:
            self._free()

    def _free(self) -> None:
        self.allocations += 1
        for tensors in (self._keys, self._values):
            tensors[:] = [t.new_empty(0, t.shape[1], 0, t.shape[3]) for t in tensors]
        self._slot_capacity = self._length_capacity = 0
        self._is_suspect = False

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
        """Makes room for `slots` slots and `length` positions of each.

        One tensor is replaced at a time, so that old and new ones need not fit together. If an
        allocation fails, the cache keeps its content and the capacity that all tensors have.
        """
        if slots <= self._slot_capacity and length <= self._length_capacity:
            return
        new_slots, new_length = self._target_capacity(slots, length)
        self.allocations += 1
        try:
            for tensors in (self._keys, self._values):
                for index, old in enumerate(tensors):
                    tensors[index] = _resize(old, new_slots, new_length)
        finally:
            every = (*self._keys, *self._values)
            self._slot_capacity = min(tensor.shape[0] for tensor in every)
            self._length_capacity = min(tensor.shape[2] for tensor in every)

    def _target_capacity(self, slots: int, length: int) -> tuple[int, int]:
        """Slots and positions to allocate: twice as many as before, within the limits.

        What ended sequences have left beyond the limits is given up.
        """
        length_limit = round_up_length(self.max_length)
        slot_limit = self.max_slots
        if self.max_bytes is not None:
            slot_limit = min(slot_limit, self.max_bytes // (length_limit * self._bytes_per_token))
        new_slots, new_length = self._slot_capacity, self._length_capacity
        if slots > new_slots:
            new_slots *= 2
        if length > new_length:
            new_length *= 2
        new_slots = max(slots, self.num_slots, min(new_slots, slot_limit))
        return new_slots, max(round_up_length(length), min(new_length, length_limit))

    # --- forward passes -------------------------------------------------------------------

    def reserve(self, length: int) -> int:
        """Makes room for `length` positions in each slot; returns the rounded-up length."""
        self._grow(self.num_slots, length)
        return round_up_length(length)

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
            # CUDA autocast returns float32 from layer norms, and so float32 keys.
            own[slots, :, positions] = new.transpose(1, 2).to(own.dtype)
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


def round_up_length(length: int) -> int:
    """The allocated length of a slot of `length` positions."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _resize(old: Tensor, slots: int, length: int) -> Tensor:
    """A table (S, H, L, K) with the content of another one, as far as it fits."""
    # Zeros: masked positions still enter the product 0 * value, which must not be NaN.
    new = old.new_zeros(slots, old.shape[1], length, old.shape[3])
    kept_slots, kept_length = min(slots, old.shape[0]), min(length, old.shape[2])
    new[:kept_slots, :, :kept_length] = old[:kept_slots, :, :kept_length]
    return new
