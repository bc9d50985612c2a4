"""Keys and values of many streams, each with its own length, in one tensor a layer.

Shapes: R streams in use, H heads of keys and values, L longest length, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

_GROWTH = 256  # room is made in steps of this many places


class KeyValueCache:
    """Speaks the protocol that transformers' attention layers expect of a cache.

    `place` says where the next keys and values go: which slots, and from which position on.
    Slots are kept dense, so that a step reads views and copies nothing.
    """

    is_compileable = False

    def __init__(
        self, config: transformers.ChameleonConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = config.hidden_size // config.num_attention_heads
        shape = (0, config.num_key_value_heads, 0, width)
        layers = range(config.num_hidden_layers)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self._slots = slice(0, 0)
        self._positions = torch.zeros(0, dtype=torch.int64)
        self._length = 0
        self.streams = 0

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
        return last

    def place(self, slots: slice, positions: Tensor, length: int) -> None:
        """Next keys and values: positions int64 (R,) or, for one slot, (T,) from a start on."""
        self._reserve(self.streams, length)
        self._slots, self._positions, self._length = slots, positions, length

    def _reserve(self, streams: int, length: int) -> None:
        have_streams, heads, have_length, width = self._keys[0].shape
        if streams <= have_streams and length <= have_length:
            return
        new_streams = have_streams if streams <= have_streams else max(streams, 2 * have_streams)
        new_length = have_length
        if length > have_length:
            new_length = -(-length // _GROWTH) * _GROWTH
        for tables in (self._keys, self._values):
            for index, old in enumerate(tables):
                # Zeroed: what is masked still enters 0 * value, which must not be a NaN.
                grown = old.new_zeros(new_streams, heads, new_length, width)
                grown[:have_streams, :, :have_length] = old
                tables[index] = grown

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values (R, H, T, K) -> all that their streams hold, (R, H, L, K)."""
        out = []
        for tables, new in ((self._keys, keys), (self._values, values)):
            table = tables[layer_idx][self._slots]
            if new.shape[2] == 1 and len(self._positions) == new.shape[0]:
                rows = torch.arange(new.shape[0], device=new.device)
                table[rows, :, self._positions] = new[:, :, 0]
            else:
                table[:, :, self._positions] = new
            out.append(table[:, :, : self._length])
        return out[0], out[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_length(self) -> int | None:
        return None

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._length, 0
