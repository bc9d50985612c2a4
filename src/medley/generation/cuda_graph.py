"""Many steps inside of pictures without a word to the host: the next code of every row stays on the
device and is read at once. On CUDA one step is captured as a graph and replayed.

Shapes: R streams, B rows, N steps, C image codes, L longest stream.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medley.errors import UserError
from medley.generation.fused_decode import FusedDecoder
from medley.generation.kv_cache import KeyValueCache
from medley.generation.packed_linear import PackedLinear
from medley.generation.sampling import apply_cfg, philox_uniforms, sample_full_sort
from medley.generation.sequence import SequenceState

NONFINITE_LOGITS = (
    "the model's logits are no finite numbers: its weights are broken, or too large for float16 "
    "(take bfloat16 or float32)"
)

_CAPTURE = threading.Lock()  # CUDA captures one graph at a time in a process


class GraphedDecode:
    """Steps of rows that are all inside of pictures, up to a length of their streams.

    It holds for these rows in these slots, and for a cache whose memory has not moved.
    """

    def __init__(
        self, rows: Sequence[SequenceState], fused: FusedDecoder, cache: KeyValueCache, head: PackedLinear,
        codes: slice, length: int, steps: int,
    ) -> None:  # fmt: skip
        self.fused, self.cache, self.head, self.length = fused, cache, head, length
        device = head.weight.device
        self.first = codes.start
        options = [row.request.options for row in rows]
        three, owner = [], [0] * cache.streams
        for number, row in enumerate(rows):
            nothing = row.full if row.uncond is None else row.uncond
            three.append([row.full.slot, (row.image_cond or nothing).slot, nothing.slot])
            for stream in row.streams:
                owner[stream.slot] = number

        def column(values: Sequence[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        self.three, self.owner = torch.tensor(three).to(device), torch.tensor(owner).to(device)
        self.guided = column([row.uncond is not None for row in rows], torch.bool)
        self.scale_text = column([o.guidance_scale_text for o in options], torch.float32)
        self.scale_image = column([o.guidance_scale_image for o in options], torch.float32)
        self.temperature = column([o.image_temperature for o in options], torch.float32)
        self.top_k = column([o.image_top_k for o in options], torch.int64)
        self.top_p = column([o.image_top_p for o in options], torch.float32)
        self.greedy = column([o.image_greedy for o in options], torch.bool)[:, 0]
        self.places = torch.arange(length, device=device)
        self.tokens = torch.zeros(cache.streams, dtype=torch.int64, device=device)
        self.positions = torch.zeros(cache.streams, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(steps, len(rows), dtype=torch.float64, device=device)
        self.codes = torch.zeros(steps, len(rows), dtype=torch.int64, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.finite = torch.ones(1, dtype=torch.bool, device=device)
        self.graph: Any = None  # torch.cuda.CUDAGraph, once it is captured

    def __call__(self, rows: Sequence[SequenceState], steps: int) -> list[list[int]]:
        """The next `steps` codes of every row. Raises UserError where logits are no numbers."""
        tokens, positions = [0] * len(self.owner), [0] * len(self.owner)
        for row in rows:
            for stream in row.streams:
                assert row.next_token is not None
                tokens[stream.slot], positions[stream.slot] = row.next_token, stream.length
        self.tokens.copy_(torch.tensor(tokens))
        self.positions.copy_(torch.tensor(positions))
        drawn = [
            philox_uniforms(
                [row.request.options.seed for row in rows],
                [row.request.row for row in rows],
                [len(row.request.prompt) + len(row.result.ids) + step for row in rows],
            )
            for step in range(steps)
        ]
        self.uniforms[:steps].copy_(torch.stack(drawn))
        self.index.zero_()
        self.finite.fill_(True)
        for _ in range(steps):
            self._next()
        if not bool(self.finite):
            raise UserError(NONFINITE_LOGITS)
        for row in rows:
            for stream in row.streams:
                stream.length += steps
        found: list[list[int]] = (self.codes[:steps] + self.first).T.tolist()
        return found

    def _next(self) -> None:
        if self.tokens.device.type != "cuda":
            self._step()
        elif self.graph is None:  # the first step warms up what a capture needs, and counts
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._step()
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            # Records, and does not run. One at a time, and other models' threads may go on.
            with _CAPTURE, torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self._step()
        else:
            self.graph.replay()

    def _step(self) -> None:
        """One step from and to the buffers: nothing in it depends on a value of theirs."""
        self.cache.place(0, self.positions[:, None], self.length)
        mask = (self.places <= self.positions[:, None])[:, None, None]
        states = self.fused(self.tokens, self.positions, mask, self.cache)
        full, images, nothing = self.head(states).float()[self.three].unbind(1)
        mixed = apply_cfg(full, images, nothing, self.scale_text, self.scale_image)
        table = torch.where(self.guided, mixed, full)
        self.finite &= table.amax(-1).isfinite().all()
        drawn = self.uniforms.index_select(0, self.index)[0]
        sampled = sample_full_sort(table / self.temperature, drawn, self.top_k, self.top_p)
        codes = torch.where(self.greedy, table.argmax(-1), sampled)
        self.codes.index_copy_(0, self.index, codes[None])
        self.tokens.copy_(codes[self.owner] + self.first)
        self.positions += 1
        self.index += 1
