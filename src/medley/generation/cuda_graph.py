"""Several image-token decode steps without a host synchronization.

The next token of every sequence stays on the device. On CUDA, one step is captured as a graph and
replayed.

Shapes: R branches, B sequences, N steps, L longest length.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from medley.errors import UserError
from medley.generation.fused_decode import FusedDecoder
from medley.generation.kv_cache import KeyValueCache
from medley.generation.packed_linear import PackedLinear
from medley.generation.sampling import (
    NONFINITE_LOGITS,
    apply_cfg,
    philox_uniforms,
    sample_full_sort,
)
from medley.generation.sequence import SequenceState

_CAPTURE_LOCK = threading.Lock()  # CUDA captures one graph at a time in a process


class GraphedDecode:
    """Decode steps of sequences that are all in the image state, up to a branch length.

    Valid for these sequences in these slots, as long as the cache is not reallocated.
    """

    def __init__(
        self, sequences: Sequence[SequenceState], fused: FusedDecoder, cache: KeyValueCache,
        head: PackedLinear, first_image_token: int, length: int, max_steps: int,
    ) -> None:  # fmt: skip
        self.fused, self.cache, self.head, self.length = fused, cache, head, length
        self.first_image_token = first_image_token
        device = head.weight.device
        options = [sequence.request.options for sequence in sequences]
        owners = [0] * cache.num_slots  # the sequence of each slot
        for number, sequence in enumerate(sequences):
            for branch in sequence.branches:
                owners[branch.slot] = number

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        self.cfg_slots = torch.tensor([s.cfg_slots for s in sequences]).to(device)  # (B, 3)
        self.owners = torch.tensor(owners).to(device)
        self.is_guided = column([s.uncond is not None for s in sequences], torch.bool)
        self.scale_text = column([o.guidance_scale_text for o in options], torch.float32)
        self.scale_image = column([o.guidance_scale_image for o in options], torch.float32)
        self.temperature = column([o.image_temperature for o in options], torch.float32)
        self.top_k = column([o.image_top_k for o in options], torch.int64)
        self.top_p = column([o.image_top_p for o in options], torch.float32)
        self.greedy = column([o.image_greedy for o in options], torch.bool)[:, 0]
        self.all_positions = torch.arange(length, device=device)
        # Buffers that a step reads and writes: inputs by slot, results by step.
        self.tokens = torch.zeros(cache.num_slots, dtype=torch.int64, device=device)
        self.positions = torch.zeros(cache.num_slots, dtype=torch.int64, device=device)
        shape = (max_steps, len(sequences))
        self.uniforms = torch.zeros(shape, dtype=torch.float64, device=device)
        self.codes = torch.zeros(shape, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.is_finite = torch.ones(1, dtype=torch.bool, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None  # after the first step on CUDA

    def __call__(self, sequences: Sequence[SequenceState], steps: int) -> list[list[int]]:
        """The next `steps` image tokens of every sequence.

        Raises UserError if logits are NaN or infinite.
        """
        tokens, positions = [0] * len(self.owners), [0] * len(self.owners)
        for sequence in sequences:
            for branch in sequence.branches:
                assert sequence.next_token is not None
                tokens[branch.slot], positions[branch.slot] = sequence.next_token, branch.length
        self.tokens.copy_(torch.tensor(tokens))
        self.positions.copy_(torch.tensor(positions))
        uniforms = [
            philox_uniforms(
                [sequence.request.options.seed for sequence in sequences],
                [sequence.request.index for sequence in sequences],
                [sequence.position + step for sequence in sequences],
            )
            for step in range(steps)
        ]
        self.uniforms[:steps].copy_(torch.stack(uniforms))
        self.step.zero_()
        self.is_finite.fill_(True)
        for _ in range(steps):
            self._run_step()
        if not bool(self.is_finite):
            raise UserError(NONFINITE_LOGITS)
        for sequence in sequences:
            for branch in sequence.branches:
                branch.length += steps
        result: list[list[int]] = (self.codes[:steps] + self.first_image_token).T.tolist()
        return result

    def _run_step(self) -> None:
        if self.tokens.device.type != "cuda":
            self._decode()
        elif self.graph is None:  # the first step runs eagerly, which warms up for the capture
            side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                self._decode()
            torch.cuda.current_stream().wait_stream(side_stream)
            self.graph = torch.cuda.CUDAGraph()
            # The capture records without running. The lock allows one capture at a time;
            # thread_local lets the threads of other models use CUDA meanwhile.
            with _CAPTURE_LOCK, torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self._decode()
        else:
            self.graph.replay()

    def _decode(self) -> None:
        """One step on the buffers. Its control flow does not depend on their values."""
        self.cache.set_write_positions(0, self.positions[:, None], self.length)
        mask = (self.all_positions <= self.positions[:, None])[:, None, None]
        states = self.fused(self.tokens, self.positions, mask, self.cache)
        full, image_cond, uncond = self.head(states).float()[self.cfg_slots].unbind(1)
        guided = apply_cfg(full, image_cond, uncond, self.scale_text, self.scale_image)
        table = torch.where(self.is_guided, guided, full)
        self.is_finite &= table.amax(-1).isfinite().all()
        uniforms = self.uniforms.index_select(0, self.step)[0]
        sampled = sample_full_sort(table / self.temperature, uniforms, self.top_k, self.top_p)
        codes = torch.where(self.greedy, table.argmax(-1), sampled)
        self.codes.index_copy_(0, self.step, codes[None])
        self.tokens.copy_(codes[self.owners] + self.first_image_token)
        self.positions += 1
        self.step += 1
