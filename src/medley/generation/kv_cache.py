"""Keys and values of many streams, each with its own length, in one tensor a layer.

Shapes: S slots, R streams that take part, T new tokens of each, H heads of keys and values,
L longest length, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

_GROWTH = 256  # room is made in steps of this many places


@dataclass(frozen=True)
class CachedPrefix:
    """Ids of the beginning of a context, and their keys and values: (2, H, T, K) a layer."""

    ids: tuple[int, ...]
    layers: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class KeyValueCache:
    """Speaks the protocol that transformers' attention layers expect of a cache.

    `place` says where the next keys and values go. Slots in use are kept dense, so that a step
    reads views and copies nothing.
    """

    is_compileable = False

    def __init__(
        self,
        config: transformers.ChameleonConfig,
        dtype: torch.dtype,
        device: torch.device,
        most: int,
    ) -> None:
        self.most = most  # streams that are expected at once: no room is made ahead for more
        width = config.hidden_size // config.num_attention_heads
        shape = (0, config.num_key_value_heads, 0, width)
        layers = range(config.num_hidden_layers)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self._slots = torch.zeros(0, dtype=torch.int64)
        self._positions = torch.zeros(0, 0, dtype=torch.int64)
        self._length = 0
        self.streams = 0
        self.moves = 0  # how often the tables have got other memory

    # --- slots ----------------------------------------------------------------------------

    def add_stream(self) -> int:
        """Takes the next slot."""
        self.streams += 1
        self._reserve(self.streams, 0)
        return self.streams - 1

    def remove_stream(self, slot: int) -> int:
        """Frees a slot; gives the slot whose stream has moved into it (the last one)."""
        last = self.streams - 1
        if slot != last:
            for table in (*self._keys, *self._values):
                table[slot] = table[last]
        self.streams -= 1
        if self.streams == 0:  # nobody is at work: the memory is others' now
            self.moves += 1
            for tables in (self._keys, self._values):
                tables[:] = [
                    table.new_empty(0, table.shape[1], 0, table.shape[3]) for table in tables
                ]
        return last

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` places of one slot to another."""
        self._reserve(self.streams, length)
        for table in (*self._keys, *self._values):
            table[target, :, :length] = table[source, :, :length]

    def export(self, slot: int, ids: tuple[int, ...]) -> CachedPrefix:
        """A copy of what a slot holds of the first tokens of its context."""
        pairs = zip(self._keys, self._values, strict=True)
        return CachedPrefix(
            ids, tuple(torch.stack([t[slot, :, : len(ids)] for t in p]) for p in pairs)
        )

    def restore(self, slot: int, prefix: CachedPrefix, length: int) -> None:
        """The first `length` places of what was exported, into a slot."""
        self._reserve(self.streams, length)
        for tables, side in ((self._keys, 0), (self._values, 1)):
            for table, saved in zip(tables, prefix.layers, strict=True):
                table[slot, :, :length] = saved[side, :, :length]

    def _reserve(self, streams: int, length: int) -> None:
        have_streams, heads, have_length, width = self._keys[0].shape
        if streams <= have_streams and length <= have_length:
            return
        new_streams = have_streams
        if streams > have_streams:
            new_streams = max(streams, min(2 * have_streams, self.most))
        self.moves += 1
        new_length = have_length
        if length > have_length:
            new_length = -(-length // _GROWTH) * _GROWTH
        for tables in (self._keys, self._values):
            for index, old in enumerate(tables):
                # Zeroed: what is masked still enters 0 * value, which must not be a NaN.
                grown = old.new_zeros(new_streams, heads, new_length, width)
                grown[:have_streams, :, :have_length] = old
                tables[index] = grown

    # --- forward passes -------------------------------------------------------------------

    def make_room(self, length: int) -> int:
        """Places for streams of a length, in whole steps of growth; gives how many there are."""
        self._reserve(self.streams, length)
        return -(-length // _GROWTH) * _GROWTH

    def place(self, first_slot: int, positions: Tensor, length: int) -> None:
        """The next keys and values belong to the slots from `first_slot` on, at `positions`
        int64 (R, T); `length` places of each are read back."""
        self._reserve(self.streams, length)
        self._first, self._count = first_slot, len(positions)
        self._slots = torch.arange(len(positions), device=positions.device)[:, None]
        self._positions, self._length = positions, length

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values (R, H, T, K) -> all that their streams hold, (R, H, L, K)."""
        out = []
        for tables, new in ((self._keys, keys), (self._values, values)):
            if tables[layer_idx].device != new.device:  # a layer that lives on another device
                tables[layer_idx] = tables[layer_idx].to(new.device)
            table = tables[layer_idx][self._first : self._first + self._count]
            slots, positions = self._slots.to(new.device), self._positions.to(new.device)
            table[slots, :, positions] = new.transpose(1, 2)
            out.append(table[:, :, : self._length])
        return out[0], out[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_length(self) -> int | None:
        return None

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._length, 0


def bytes_per_token(config: transformers.ChameleonConfig, dtype: torch.dtype) -> int:
    """What one token of one stream takes, in all layers."""
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return int(2 * config.num_hidden_layers * width * dtype.itemsize)
