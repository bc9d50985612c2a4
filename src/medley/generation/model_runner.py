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
from torch import Tensor, nn

from medley.generation.cuda_graph import GraphedDecode
from medley.generation.decoder import Decoder
from medley.generation.fused_decode import FusedDecoder, can_fuse
from medley.generation.grammar import TokenMasks
from medley.generation.kv_cache import KeyValueCache, bytes_per_token
from medley.generation.packed_linear import MAX_PACKED_BYTES, PackedLinear
from medley.generation.prefix_cache import MIN_PREFIX, PrefixCache, shared_prefix_length
from medley.generation.sequence import Admission, CFGBranch, SequenceState, image_context

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
        full_context = self.max_seq_len * bytes_per_token(decoder.config, dtype)
        self.prefixes = PrefixCache(max(PREFIX_BYTES, full_context))
        # A host synchronization after every token costs a GPU more than the step; a CPU nothing.
        has_plain_head = type(decoder.lm_head) is nn.Linear
        self.use_cuda_graph = self.device.type == "cuda" and has_plain_head
        self._branches: list[CFGBranch] = []  # by slot
        self._heads: dict[tuple[int | None, int | None], PackedLinear] = {}  # by vocabulary part
        self._graph_key: tuple[object, ...] | None = None
        self._graph: GraphedDecode | None = None

    def set_max_num_seqs(self, max_num_seqs: int) -> None:
        self.cache.max_slots = BRANCHES * max_num_seqs

    # --- branches -------------------------------------------------------------------------

    def _add_branch(self, length: int) -> CFGBranch:
        self._branches.append(CFGBranch(self.cache.add_slot(), length))
        return self._branches[-1]

    def _remove_branch(self, branch: CFGBranch) -> None:
        """Frees a branch's slot; the branch of the last slot moves into it."""
        self.cache.remove_slot(branch.slot)
        last = self._branches.pop()
        if last is not branch:
            last.slot = branch.slot
            self._branches[last.slot] = last
        branch.slot = -1

    def release(self, sequence: SequenceState) -> None:
        """Frees all branches of a sequence that has ended or was cancelled."""
        for branch in sequence.branches:
            self._remove_branch(branch)

    def cache_prefix(self, sequence: SequenceState) -> None:
        """Keeps the keys and values of a complete sequence for later prompts."""
        ids = tuple(sequence.ids[: sequence.full.length])
        self.prefixes.add(self.cache.snapshot(sequence.full.slot, ids))

    def open_cfg_branches(self, sequences: Sequence[SequenceState]) -> None:
        """Adds the guidance branches of sequences that begin an image.

        Their contexts end before the begin-of-image token. Tokens that such a context shares with
        the full one are copied, not prefilled again.
        """
        pending: list[tuple[CFGBranch, list[int], int]] = []
        for sequence in sequences:
            ids = sequence.ids[:-1]
            bos = self.vocabulary.bos
            images = image_context(ids, self.vocabulary.begin_image, self.vocabulary.end_image)
            for context in ([bos], [bos, *images]) if images else ([bos],):
                branch = self._add_branch(len(context))
                shared = shared_prefix_length(context, ids)
                if shared < len(context) and shared < MIN_PREFIX:  # too few to be worth a copy
                    shared = 0
                if shared:
                    self.cache.copy(sequence.full.slot, branch.slot, shared)
                if shared < len(context):
                    pending.append((branch, context, shared))
                if len(context) == 1:
                    sequence.uncond = branch
                else:
                    sequence.image_cond = branch
        for branch, context, start in pending:
            self._prefill_contexts([branch], [context], [start])

    def close_cfg_branches(self, sequence: SequenceState) -> None:
        """Removes the guidance branches of a sequence after its image."""
        for branch in sequence.branches[1:]:
            self._remove_branch(branch)
        sequence.image_cond = sequence.uncond = None

    # --- prefill --------------------------------------------------------------------------

    def prefill(self, admissions: Sequence[Admission]) -> list[SequenceState]:
        """Prefills prompts in one pass. Frees their slots if the pass fails."""
        prompts = [list(admission.request.prompt) for admission in admissions]
        branches: list[CFGBranch] = []
        starts = []
        try:
            for ids in prompts:
                branches.append(self._add_branch(0))
                found = self.prefixes.find(ids)
                if found is not None:
                    self.cache.restore(branches[-1].slot, *found)
                starts.append(0 if found is None else found[1])
            states = self._prefill_contexts(branches, prompts, starts)
            return [
                self._make_sequence(admission, branch, state)
                for admission, branch, state in zip(admissions, branches, states, strict=True)
            ]
        except BaseException:  # out of memory, or Ctrl-C
            for branch in branches[::-1]:
                self._remove_branch(branch)
            raise

    def _make_sequence(
        self, admission: Admission, branch: CFGBranch, state: Tensor
    ) -> SequenceState:
        """A running sequence from the state (D,) behind the last token of its prompt."""
        seen = torch.zeros(self.masks.size, dtype=torch.bool, device=self.device)
        seen[torch.tensor(list(admission.request.prompt), device=self.device)] = True
        logits = self.logits(state[None], slice(None))[0]
        return SequenceState(*admission, branch, seen & self.masks.text, logits)

    def _prefill_contexts(
        self,
        branches: Sequence[CFGBranch],
        contexts: Sequence[Sequence[int]],
        starts: Sequence[int],
    ) -> Tensor:
        """Runs contexts from their positions `starts` on in one pass, into consecutive slots.

        Returns the state behind the last token of each context, (B, D). Shorter prompts are
        right-padded. The padding's keys and values lie past the branch length and are overwritten
        by later tokens.
        """
        rest = [list(ids[start:]) for ids, start in zip(contexts, starts, strict=True)]
        longest = max(map(len, rest))
        pad = self.vocabulary.pad
        tokens = torch.tensor(
            [[*ids, *[pad] * (longest - len(ids))] for ids in rest], device=self.device
        )
        first = torch.tensor(list(starts), device=self.device)
        positions = first[:, None] + torch.arange(longest, device=self.device)
        length = int(max(starts)) + longest
        self.cache.set_write_positions(branches[0].slot, positions, length)
        visible = torch.arange(length, device=self.device)[None, None] <= positions[..., None]
        positions = positions.clamp(max=self.max_seq_len - 1)  # padding may exceed the context
        hidden = self._run_modules(tokens, positions, visible[:, None])
        for branch, ids in zip(branches, contexts, strict=True):
            branch.length = len(ids)
        ends = torch.tensor([len(ids) - 1 for ids in rest], device=self.device)
        return hidden[torch.arange(len(rest), device=self.device), ends]

    # --- decode ---------------------------------------------------------------------------

    def decode(self, sequences: Sequence[SequenceState]) -> Tensor | None:
        """One pass over all branches: states (R, D) by slot; None if all sequences are new.

        All slots take part. A new sequence has no token to decode yet: its slot writes to the next
        position, which its first token overwrites later.
        """
        if all(sequence.next_token is None for sequence in sequences):
            return None
        count = self.cache.num_slots
        tokens, positions = [self.vocabulary.pad] * count, [0] * count
        for sequence in sequences:
            for branch in sequence.branches:
                positions[branch.slot] = branch.length
                if sequence.next_token is not None:
                    tokens[branch.slot] = sequence.next_token
                    branch.length += 1
        return self._decode(tokens, positions)

    def _decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        length = max(positions) + 1
        ids = torch.tensor(tokens, device=self.device)
        position_ids = torch.tensor(positions, device=self.device)
        self.cache.set_write_positions(0, position_ids[:, None], length)
        mask = None
        if min(positions) + 1 < length:
            visible = torch.arange(length, device=self.device)[None] <= position_ids[:, None]
            mask = visible[:, None, None]
        if self.fused is not None:
            return self.fused(ids, position_ids, mask, self.cache)
        if mask is None:  # without a mask the modules would apply a causal one of size 1
            mask = torch.ones(len(ids), 1, 1, length, dtype=torch.bool, device=self.device)
        return self._run_modules(ids[:, None], position_ids[:, None], mask)[:, -1]

    def graph_steps(self, sequences: Sequence[SequenceState]) -> int:
        """Number of steps that can run without a host synchronization.

        That is possible while all sequences are inside of an image; otherwise 0.
        """
        if not self.use_cuda_graph or self.fused is None:
            return 0
        steps = GRAPH_STEPS
        for sequence in sequences:
            grammar = sequence.grammar
            if sequence.next_token is None or grammar.codes_emitted is None:
                return 0
            steps = min(steps, grammar.codes_per_image - grammar.codes_emitted)
        return steps

    def decode_images(
        self, sequences: Sequence[SequenceState], steps: int, image_tokens: slice
    ) -> list[list[int]]:
        """The next `steps` image tokens of every sequence, with one host synchronization.

        `image_tokens` is the part of the vocabulary to sample from.
        """
        assert self.fused is not None
        longest = max(branch.length for sequence in sequences for branch in sequence.branches)
        length = self.cache.reserve(longest + steps)
        slots = tuple((s.ticket, *(branch.slot for branch in s.branches)) for s in sequences)
        key = (slots, self.cache.allocations, length)
        if self._graph is None or self._graph_key != key:
            self._graph = GraphedDecode(
                sequences, self.fused, self.cache, self.head(image_tokens), image_tokens.start,
                length, GRAPH_STEPS,
            )  # fmt: skip
            self._graph_key = key
        return self._graph(sequences, steps)

    def _run_modules(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        return self.decoder.model(
            input_ids=tokens, position_ids=positions, attention_mask=mask,
            past_key_values=self.cache, use_cache=True,
        ).last_hidden_state  # fmt: skip

    # --- logits ---------------------------------------------------------------------------

    def logits(self, states: Tensor, part: slice) -> Tensor:
        """States (B, D) -> float32 logits of a part of the vocabulary."""
        head = self.decoder.lm_head
        if not isinstance(head, nn.Linear) or hasattr(head, "_hf_hook"):
            # An adapter wraps it, or accelerate keeps it on another device.
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


def execution_device(decoder: Decoder) -> torch.device:
    """Where the decoder takes its token ids."""
    embedding = decoder.model.embed_tokens
    hook = getattr(embedding, "_hf_hook", None)  # accelerate's, if the weights are elsewhere
    return embedding.weight.device if hook is None else torch.device(hook.execution_device)
