"""Model runner: forward passes over all branches of all sequences, and the cache they write.

A sequence has one branch for its full context. While an image is generated with guidance it has up
to two more: the images of its context only, and an empty context. All branches take part in the
same forward pass, each at its own position.

Shapes: R branches, B sequences or contexts, T prompt tokens, L longest length, D model width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medley.generation.cuda_graph import (
    GraphCache,
    GraphedForward,
    GraphedImageSteps,
    can_use_graph,
    is_plain_head,
    length_class,
    size_class,
)
from medley.generation.decoder import Decoder
from medley.generation.fused_decode import FusedDecoder, can_fuse
from medley.generation.grammar import TokenMasks
from medley.generation.kv_cache import KeyValueCache, bytes_per_token, round_up_length
from medley.generation.packed_linear import MAX_PACKED_BYTES, PackedLinear
from medley.generation.prefix_cache import MIN_PREFIX, PrefixCache, shared_prefix_length
from medley.generation.sequence import (
    CFGBranch,
    Prefill,
    PrefillPart,
    SequenceState,
    Window,
    image_context,
)

PREFIX_BYTES = 1 << 30  # of cached prefixes, or one full context if that is larger
GRAPH_STEPS = 32  # image-token steps between two host synchronizations
BRANCHES = 3  # of one sequence, at most


class ModelRunner:
    """A decoder with its key-value cache.

    `fuse` runs decode steps with fused weights if the weights are plain. `max_num_seqs` sequences
    are expected at the same time.
    """

    def __init__(self, decoder: Decoder, masks: TokenMasks, fuse: bool, max_num_seqs: int) -> None:
        self.decoder, self.masks, self.vocabulary = decoder, masks, masks.vocabulary
        self.device = masks.device
        self.max_seq_len = int(decoder.config.max_position_embeddings)
        with torch.no_grad():
            self.fused = FusedDecoder(decoder) if fuse and can_fuse(decoder) else None
        dtype = decoder.model.embed_tokens.weight.dtype
        self.cache = KeyValueCache(decoder.config, dtype, self.device, BRANCHES * max_num_seqs)
        self.bytes_per_token = bytes_per_token(decoder.config, dtype)
        full_context = self.max_seq_len * self.bytes_per_token
        self.prefixes = PrefixCache(max(PREFIX_BYTES, full_context))
        self.use_cuda_graph = self.fused is not None and can_use_graph(decoder, self.device)
        self._branches: list[CFGBranch] = []  # by slot
        self._heads: dict[tuple[int | None, int | None], PackedLinear] = {}  # by vocabulary part
        self._graphs = GraphCache(self.device)

    def set_max_num_seqs(self, max_num_seqs: int) -> None:
        self.cache.max_slots = BRANCHES * max_num_seqs

    @property
    def guided_sequence_bytes(self) -> int:
        """Keys and values of one sequence of full context with all its guidance branches."""
        return BRANCHES * round_up_length(self.max_seq_len) * self.bytes_per_token

    # --- branches -------------------------------------------------------------------------

    def _add_branch(self) -> CFGBranch:
        self._branches.append(CFGBranch(self.cache.add_slot(), 0))
        return self._branches[-1]

    def _remove_branch(self, branch: CFGBranch) -> None:
        """Frees a branch's slot; the branch of the last slot moves into it."""
        last = self._branches[-1]
        self.cache.remove_slot(branch.slot, last.length)
        self._branches.pop()
        if last is not branch:
            last.slot = branch.slot
            self._branches[last.slot] = last
        branch.slot = -1

    def release(self, admitted: Prefill | SequenceState) -> None:
        """Frees all branches of a request that has ended or was cancelled."""
        for branch in admitted.branches:
            self._remove_branch(branch)

    def cache_prefix(self, sequence: SequenceState) -> None:
        """Keeps the keys and values of a complete sequence for later prompts."""
        ids = tuple(sequence.ids[: sequence.full.length])
        self.prefixes.add(self.cache.snapshot(sequence.full.slot, ids))

    def open_cfg_branches(self, sequence: SequenceState) -> None:
        """Adds the guidance branches of a sequence that begins an image.

        Their contexts end before the begin-of-image token. Tokens that such a context shares with
        the full one are copied, not prefilled again.
        """
        ids = sequence.ids[:-1]
        bos = self.vocabulary.bos
        images = image_context(ids, self.vocabulary.begin_image, self.vocabulary.end_image)
        sequence.uncond = self._open_cfg_branch(sequence, ids, [bos])
        if images:
            sequence.image_cond = self._open_cfg_branch(sequence, ids, [bos, *images])

    def _open_cfg_branch(
        self, sequence: SequenceState, ids: Sequence[int], context: Sequence[int]
    ) -> CFGBranch:
        branch = self._add_branch()
        try:
            shared = shared_prefix_length(context, ids)
            if shared < len(context) and shared < MIN_PREFIX:  # too few to be worth a copy
                shared = 0
            if shared:
                self.cache.copy(sequence.full.slot, branch.slot, shared)
            if shared < len(context):
                self._prefill_contexts([branch], [context], [shared])
        except BaseException:  # out of memory, or Ctrl-C
            self._remove_branch(branch)
            raise
        branch.length = len(context)
        return branch

    def close_cfg_branches(self, sequence: SequenceState) -> None:
        """Removes the guidance branches of a sequence after its image."""
        for branch in sequence.branches[1:]:
            self._remove_branch(branch)
        sequence.image_cond = sequence.uncond = None

    # --- prefill --------------------------------------------------------------------------

    def prefill(self, parts: Sequence[PrefillPart]) -> list[SequenceState]:
        """Reads parts of prompts; returns the sequences whose prompts are complete then.

        The parts count as read only after `advance_prefills`, so that a failed step can be
        repeated.
        """
        for prefill, _ in parts:
            if prefill.branch is None:
                prefill.branch = self._add_branch()
                self._restore_prefix(prefill.prompt, prefill.branch)
        ends = {id(prefill): _part_end(prefill, count) for prefill, count in parts}
        states: dict[int, Tensor] = {}
        for group in _consecutive([prefill for prefill, _ in parts]):
            branches = [branch for prefill in group for branch in prefill.branches]
            contexts = [prefill.prompt[: ends[id(prefill)]] for prefill in group]
            starts = [branch.length for branch in branches]
            rows = self._prefill_contexts(branches, contexts, starts)
            states |= {id(prefill): row for prefill, row in zip(group, rows, strict=True)}
        complete = [prefill for prefill, count in parts if count >= prefill.remaining]
        return [self._make_sequence(prefill, states[id(prefill)]) for prefill in complete]

    @staticmethod
    def advance_prefills(parts: Sequence[PrefillPart]) -> None:
        """Counts what `prefill` has read."""
        for prefill, count in parts:
            for branch in prefill.branches:
                branch.length = _part_end(prefill, count)

    def _restore_prefix(self, prompt: Sequence[int], branch: CFGBranch) -> None:
        """Fills a new branch with the cached prefix of its prompt, if there is one."""
        found = self.prefixes.find(prompt)
        if found is not None:
            self.cache.restore(branch.slot, *found)
            branch.length = found[1]

    def _make_sequence(self, prefill: Prefill, state: Tensor) -> SequenceState:
        """A running sequence from the state (D,) behind the last token of its prompt."""
        assert prefill.branch is not None
        seen = torch.zeros(self.masks.size, dtype=torch.bool, device=self.device)
        seen[torch.tensor(list(prefill.prompt), device=self.device)] = True
        logits = self.logits(state[None], slice(None))[0]
        return SequenceState(*prefill.admission, prefill.branch, seen & self.masks.text, logits)

    def _prefill_contexts(
        self,
        branches: Sequence[CFGBranch],
        contexts: Sequence[Sequence[int]],
        starts: Sequence[int],
    ) -> Tensor:
        """Runs contexts from their positions `starts` on in one pass, in consecutive slots.

        Returns the state behind the last token of each context, (B, D). Shorter ones are
        right-padded. All padding of a context is written to the position behind it, which its next
        token overwrites.
        """
        rest = [list(ids[start:]) for ids, start in zip(contexts, starts, strict=True)]
        longest = max(map(len, rest))
        pad = self.vocabulary.pad
        tokens = torch.tensor(
            [[*ids, *[pad] * (longest - len(ids))] for ids in rest], device=self.device
        )
        first = torch.tensor(list(starts), device=self.device)
        ends = torch.tensor([len(ids) for ids in contexts], device=self.device)
        positions = torch.arange(longest, device=self.device)[None] + first[:, None]
        positions = torch.minimum(positions, ends[:, None])
        has_padding = [len(ids) < longest for ids in rest]
        length = max(len(ids) + padded for ids, padded in zip(contexts, has_padding, strict=True))
        self.cache.set_write_positions(branches[0].slot, positions, length)
        visible = torch.arange(length, device=self.device)[None, None] <= positions[..., None]
        hidden = self._run_modules(tokens, positions, visible[:, None])
        last = torch.tensor([len(ids) - 1 for ids in rest], device=self.device)
        return hidden[torch.arange(len(rest), device=self.device), last]

    # --- decode ---------------------------------------------------------------------------

    def decode(self, windows: Sequence[Window]) -> Tensor:
        """One pass over the branches of running sequences: states (R, T, D) by slot.

        The branches grow only with `advance`, so that a failed step can be repeated. Slots of
        prompts that are being read may lie between them. Padding is written to the next position
        of a branch, which its next token overwrites.
        """
        count = 1 + max(branch.slot for window in windows for branch in window.sequence.branches)
        width = max(len(window.tokens) for window in windows)
        if self.use_cuda_graph:
            count = size_class(count, self.cache.capacity[0])
            width = size_class(width, self.max_seq_len)
        tokens = [[self.vocabulary.pad] * width for _ in range(count)]
        positions = [[branch.length] * width for branch in self._branches[:count]]
        positions += [[0] * width] * (count - len(positions))  # slots that are not in use
        for window in windows:
            used = len(window.tokens)
            for branch in window.sequence.branches:
                tokens[branch.slot][:used] = window.tokens
                end = branch.length + used
                padding = [end] * (width - used)
                positions[branch.slot] = [*range(branch.length, end), *padding]
        return self._decode(tokens, positions)

    @staticmethod
    def advance(windows: Sequence[Window], drawn: Sequence[Sequence[int]]) -> None:
        """Counts the tokens that `decode` has written to each branch and that the draws confirm."""
        for window, tokens in zip(windows, drawn, strict=True):
            for branch in window.sequence.branches:
                branch.length += window.num_pending + len(tokens) - 1

    def _decode(self, tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        length = max(map(max, positions)) + 1
        if self.use_cuda_graph:
            return self._decode_by_graph(tokens, positions, length)
        ids = torch.tensor(tokens, device=self.device)
        position_ids = torch.tensor(positions, device=self.device)
        self.cache.set_write_positions(0, position_ids, length)
        mask = None
        if min(map(min, positions)) + 1 < length:
            visible = torch.arange(length, device=self.device) <= position_ids[..., None]
            mask = visible[:, None]
        if self.fused is not None:
            return self.fused(ids, position_ids, mask, self.cache)
        if mask is None:  # without a mask the modules would apply a causal one of size 1
            mask = torch.ones(len(ids), 1, 1, length, dtype=torch.bool, device=self.device)
        return self._run_modules(ids, position_ids, mask)

    def _decode_by_graph(
        self, tokens: list[list[int]], positions: list[list[int]], length: int
    ) -> Tensor:
        fused = self.fused
        assert fused is not None
        self.cache.reserve(length)
        length = length_class(length, self.cache.capacity[1])
        step = self._graphs.get(
            self.cache.allocations,
            ("forward", len(tokens), len(tokens[0]), length),
            lambda pool: GraphedForward(
                fused, self.cache, self.device, len(tokens), len(tokens[0]), length, pool
            ),
        )
        try:
            return step(tokens, positions)
        except BaseException:  # the capture may be incomplete
            self._graphs.clear()
            raise

    def graph_steps(self, sequences: Sequence[SequenceState]) -> int:
        """Number of steps that can run without a host synchronization.

        That is possible while all sequences are inside of an image and no prompt is half read:
        the graph would overwrite it. Otherwise 0.
        """
        if not self.use_cuda_graph:
            return 0
        if sum(len(sequence.branches) for sequence in sequences) < self.cache.num_slots:
            return 0
        steps = GRAPH_STEPS
        for sequence in sequences:
            grammar = sequence.grammar
            if grammar.codes_emitted is None:
                return 0
            steps = min(steps, grammar.codes_per_image - grammar.codes_emitted)
        return steps

    def decode_images(
        self, sequences: Sequence[SequenceState], steps: int, image_tokens: slice
    ) -> list[list[int]]:
        """The next `steps` image tokens of every sequence, with one host synchronization.

        `image_tokens` is the part of the vocabulary to sample from.
        """
        fused = self.fused
        assert fused is not None
        longest = max(branch.length for sequence in sequences for branch in sequence.branches)
        self.cache.reserve(longest + steps)
        slot_capacity, length_capacity = self.cache.capacity
        length = length_class(longest + steps, length_capacity)
        slots = size_class(self.cache.num_slots, slot_capacity)
        count = size_class(len(sequences), slots)
        step = self._graphs.get(
            self.cache.allocations,
            ("images", slots, count, length, image_tokens.start, image_tokens.stop),
            lambda pool: GraphedImageSteps(
                fused, self.cache, self.head(image_tokens), image_tokens.start, slots, count,
                length, GRAPH_STEPS, pool,
            ),
        )  # fmt: skip
        try:
            return step(sequences, steps)
        except BaseException:  # the capture may be incomplete
            self._graphs.clear()
            raise

    def _run_modules(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        return self.decoder.model(
            input_ids=tokens, position_ids=positions, attention_mask=mask,
            past_key_values=self.cache, use_cache=True,
        ).last_hidden_state  # fmt: skip

    # --- logits ---------------------------------------------------------------------------

    def logits(self, states: Tensor, part: slice) -> Tensor:
        """States (B, D) -> float32 logits of a part of the vocabulary."""
        head = self.decoder.lm_head
        if not is_plain_head(head):
            logits: Tensor = head(states).float()
            return logits[:, part].to(self.device)
        return self.head(part)(states.to(head.weight.device)).float().to(self.device)

    def head(self, part: slice) -> PackedLinear:
        """The output head for a part of the vocabulary."""
        key, weight = (part.start, part.stop), self.decoder.lm_head.weight
        assert isinstance(weight, Tensor)
        if key not in self._heads:
            pack = self.fused is not None and weight.nbytes <= MAX_PACKED_BYTES
            self._heads[key] = PackedLinear(weight[part], pack)
        return self._heads[key]


def _part_end(prefill: Prefill, count: int) -> int:
    """Number of prompt tokens that have been read after the next `count` ones."""
    return len(prefill.prompt) - prefill.remaining + min(count, prefill.remaining)


def _consecutive(prefills: Sequence[Prefill]) -> list[list[Prefill]]:
    """Groups of prompts in consecutive slots, in the order of their slots."""
    by_slot = {branch.slot: prefill for prefill in prefills for branch in prefill.branches}
    groups: list[list[Prefill]] = []
    for slot, prefill in sorted(by_slot.items()):
        if slot - 1 in by_slot:
            groups[-1].append(prefill)
        else:
            groups.append([prefill])
    return groups


def execution_device(decoder: Decoder) -> torch.device:
    """Where the decoder takes its token ids."""
    embedding = decoder.model.embed_tokens
    hook = getattr(embedding, "_hf_hook", None)  # accelerate's, if the weights are elsewhere
    return embedding.weight.device if hook is None else torch.device(hook.execution_device)
