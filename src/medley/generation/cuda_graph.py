"""Decode steps that are captured as CUDA graphs and replayed, without a launch for each kernel.

A graph has fixed sizes and fixed addresses. Its inputs are buffers that are filled before each
replay, and its sizes are taken from a few classes, so that a graph serves any sequences that fit.
On other devices, the same steps run without a graph.

Shapes: R branches, B sequences, N steps, L longest length.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from medley.errors import UserError
from medley.generation.decoder import Decoder
from medley.generation.fused_decode import FusedDecoder
from medley.generation.kv_cache import LENGTH_STEP, KeyValueCache
from medley.generation.packed_linear import PackedLinear
from medley.generation.sampling import (
    NONFINITE_LOGITS,
    apply_cfg,
    philox_uniforms,
    sample_full_sort,
)
from medley.generation.sequence import SequenceState

MAX_GRAPHS = 16  # of one model; each takes some megabytes
_CAPTURE_LOCK = threading.Lock()  # CUDA captures one graph at a time in a process

Step = TypeVar("Step")


def can_use_graph(decoder: Decoder, device: torch.device) -> bool:
    """Whether decode steps on a device are worth a graph, and the output head is plain.

    Launching the kernels of a step takes a GPU longer than running them; a CPU has no launches.
    """
    return device.type == "cuda" and is_plain_head(decoder.lm_head)


def is_plain_head(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether no adapter wraps an output head, and accelerate does not keep it elsewhere."""
    return isinstance(head, nn.Linear) and not hasattr(head, "_hf_hook")


def size_class(size: int, limit: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is at least `size`; `limit` at most."""
    power = 1 << (size - 1).bit_length()
    between = power * 3 // 4
    return min(between if size <= between else power, limit)


def length_class(length: int, limit: int) -> int:
    """`size_class` in units of the cache's length step. A few graphs serve all lengths."""
    units = -(-length // LENGTH_STEP)
    return min(size_class(units, limit) * LENGTH_STEP, limit)


@cache
def _capture_stream(device: torch.device) -> Any:
    """The stream on which all graphs of a device are captured.

    torch's default for captures is one stream in a process, which belongs to one device. Each
    stream has a cuBLAS workspace of its own.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CapturedStep:
    """A step that reads and writes fixed buffers. Its control flow must not depend on values."""

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self._device, self._pool = device, pool
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Callable[[], None]) -> None:
        """Runs `step`, which is the same in every call.

        It is not kept: a bound method would be a cycle, and the memory of a graph that is not used
        any more would not be freed at once.
        """
        if self._device.type != "cuda":
            step()
            return
        with torch.cuda.device(self._device):  # streams and graphs are those of the current device
            if self._graph is None:
                self._graph = self._run_and_capture(step)
            else:
                self._graph.replay()

    def _run_and_capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The first step runs eagerly, which warms up for the capture. The capture only records."""
        stream, current = _capture_stream(self._device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local lets the threads of other models use CUDA meanwhile.
        capture = torch.cuda.graph(
            graph, self._pool, stream=stream, capture_error_mode="thread_local"
        )
        with _CAPTURE_LOCK, capture:
            step()
        return graph


class GraphCache:
    """The graphs of one model by their sizes. They are valid until the cache is reallocated."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: dict[Hashable, Any] = {}
        self._allocations: int | None = None
        self._pool: Any = None

    def get(self, allocations: int, key: Hashable, make: Callable[[Any], Step]) -> Step:
        """The step for a key. `make` makes one whose graph uses the given memory pool."""
        if allocations != self._allocations:
            self.clear()
            self._allocations = allocations
        if key not in self._steps:
            if len(self._steps) >= MAX_GRAPHS:
                del self._steps[next(iter(self._steps))]  # unused for the longest time
            if self._pool is None and self._device.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()  # one graph runs at a time
            self._steps[key] = make(self._pool)
        step: Step = self._steps.pop(key)
        self._steps[key] = step  # the last used is the last one
        return step

    def clear(self) -> None:
        self._steps.clear()


class GraphedForward:
    """One decode step of any sequences: tokens and positions (R, T) -> states (R, T, D)."""

    def __init__(
        self, fused: FusedDecoder, cache: KeyValueCache, device: torch.device, slots: int,
        width: int, length: int, pool: Any,
    ) -> None:  # fmt: skip
        self._fused, self._cache, self._length = fused, cache, length
        self._inputs = torch.zeros(2, slots, width, dtype=torch.int64, device=device)
        self._states: Tensor | None = None
        self._run = CapturedStep(device, pool)

    def __call__(
        self, tokens: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> Tensor:
        """Tokens and positions of each slot -> their states (R, T, D), until the next call."""
        self._inputs.copy_(torch.tensor([tokens, positions]))
        self._run(self._decode)
        assert self._states is not None
        return self._states

    def _decode(self) -> None:
        tokens, positions = self._inputs
        states = decode_at(self._fused, self._cache, tokens, positions, self._length)
        if self._states is None:
            self._states = torch.empty_like(states)
        self._states.copy_(states)


class GraphedImageSteps:
    """Decode steps of sequences that are all inside of images, with one host synchronization.

    The next token of every sequence stays on the device.
    """

    def __init__(
        self, fused: FusedDecoder, cache: KeyValueCache, head: PackedLinear,
        first_image_token: int, slots: int, sequences: int, length: int, max_steps: int, pool: Any,
    ) -> None:  # fmt: skip
        self._fused, self._cache, self._head, self._length = fused, cache, head, length
        self._first_image_token = first_image_token
        device = head.weight.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # By slot: inputs of the next step, and the sequence of each slot.
        self._tokens, self._positions, self._owners = (zeros(slots) for _ in range(3))
        # By sequence: its slots and options.
        self._cfg_slots = zeros(sequences, 3)
        self._top_k = zeros(sequences, 1)
        self._is_guided, self._greedy = (zeros(sequences, 1, dtype=torch.bool) for _ in range(2))
        self._scale_text, self._scale_image, self._temperature, self._top_p = (
            zeros(sequences, 1, dtype=torch.float32) for _ in range(4)
        )
        # By step: random numbers and results.
        self._uniforms = zeros(max_steps, sequences, dtype=torch.float64)
        self._codes = zeros(max_steps, sequences)
        self._step = zeros(1)
        self._is_finite = zeros(1, dtype=torch.bool)
        self._run = CapturedStep(device, pool)

    def __call__(self, sequences: Sequence[SequenceState], steps: int) -> list[list[int]]:
        """The next `steps` image tokens of every sequence.

        Raises UserError if logits are NaN or infinite.
        """
        self._fill(sequences, steps)
        for _ in range(steps):
            self._run(self._decode)
        # One read from the device.
        host = torch.cat([self._is_finite.long(), self._codes[:steps].flatten()]).tolist()
        if not host[0]:
            raise UserError(NONFINITE_LOGITS)
        for sequence in sequences:
            for branch in sequence.branches:
                branch.length += steps
        by_step = torch.tensor(host[1:]).view(steps, -1)[:, : len(sequences)]
        result: list[list[int]] = (by_step + self._first_image_token).T.tolist()
        return result

    def _fill(self, sequences: Sequence[SequenceState], steps: int) -> None:
        """Copies the state and the options of the sequences to the buffers.

        Rows without a sequence repeat the last one. Slots without a branch decode a token of the
        first one, into positions that no sequence reads.
        """
        slots = len(self._tokens)
        tokens, positions, owners = [0] * slots, [0] * slots, [0] * slots
        for number, sequence in enumerate(sequences):
            (token,) = sequence.pending
            for branch in sequence.branches:
                tokens[branch.slot], positions[branch.slot] = token, branch.length
                owners[branch.slot] = number
        rows = [*sequences, *[sequences[-1]] * (len(self._cfg_slots) - len(sequences))]
        options = [row.request.options for row in rows]
        uniforms = philox_uniforms(
            [option.seed for option in options] * steps,
            [row.request.index for row in rows] * steps,
            [row.position + step for step in range(steps) for row in rows],
        )
        for buffer, values in (
            (self._tokens, tokens),
            (self._positions, positions),
            (self._owners, owners),
            (self._cfg_slots, [row.cfg_slots for row in rows]),
            (self._top_k, [[o.image_top_k] for o in options]),
            (self._is_guided, [[row.uncond is not None] for row in rows]),
            (self._greedy, [[o.image_greedy] for o in options]),
            (self._scale_text, [[o.guidance_scale_text] for o in options]),
            (self._scale_image, [[o.guidance_scale_image] for o in options]),
            (self._temperature, [[o.image_temperature] for o in options]),
            (self._top_p, [[o.image_top_p] for o in options]),
        ):
            buffer.copy_(torch.tensor(values, dtype=buffer.dtype))
        self._uniforms[:steps].copy_(uniforms.view(steps, -1))
        self._step.zero_()
        self._is_finite.fill_(True)

    def _decode(self) -> None:
        """One step on the buffers."""
        states = decode_at(
            self._fused, self._cache, self._tokens[:, None], self._positions[:, None], self._length
        )[:, 0]
        logits = self._head(states).float()
        full, image_cond, uncond = logits[self._cfg_slots].unbind(1)
        guided = apply_cfg(full, image_cond, uncond, self._scale_text, self._scale_image)
        table = torch.where(self._is_guided, guided, full)
        self._is_finite &= table.amax(-1).isfinite().all()
        uniforms = self._uniforms.index_select(0, self._step)[0]
        sampled = sample_full_sort(table / self._temperature, uniforms, self._top_k, self._top_p)
        codes = torch.where(self._greedy[:, 0], table.argmax(-1), sampled)
        self._codes.index_copy_(0, self._step, codes[None])
        self._tokens.copy_(codes[self._owners] + self._first_image_token)
        self._positions += 1
        self._step += 1


def decode_at(
    fused: FusedDecoder, cache: KeyValueCache, tokens: Tensor, positions: Tensor, length: int
) -> Tensor:
    """Tokens of the first slots at positions (R, T) below `length` -> states (R, T, D)."""
    cache.set_write_positions(0, positions, length)
    visible = torch.arange(length, device=positions.device) <= positions[..., None]
    return fused(tokens, positions, visible[:, None], cache)
