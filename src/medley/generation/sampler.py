"""Samples the next token of each running sequence, with guidance inside of images.

Sequences in the text state and in the image state are sampled as two groups: the first group needs
the logits of the entire vocabulary, the second only those of the image tokens, about an eighth.

Shapes: B sequences of a group, R branches, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from medley.errors import UserError
from medley.generation.grammar import TokenMasks
from medley.generation.sampling import (
    NONFINITE_LOGITS,
    apply_cfg,
    penalize_repetition,
    philox_uniforms,
    sample,
)
from medley.generation.sequence import SequenceState

Logits = Callable[[Tensor, slice], Tensor]  # states (B, D), part of the vocabulary -> (B, part)
Number = TypeVar("Number", int, float)


class Sampler:
    """`image_tokens` is the part of the vocabulary that is sampled inside of images."""

    def __init__(self, masks: TokenMasks) -> None:
        self.masks = masks
        decodable = masks.decodable_image_tokens
        self.image_tokens = slice(decodable.start, decodable.stop)

    def __call__(
        self, sequences: Sequence[SequenceState], states: Tensor | None, logits: Logits
    ) -> list[int]:
        """States (R, D) by slot, None if all sequences are new -> one token for each sequence.

        Raises UserError if the logits of the allowed tokens are NaN or infinite.
        """
        tokens = [sequence.grammar.forced_token() for sequence in sequences]
        free = [i for i, token in enumerate(tokens) if token is None]
        for in_image in (False, True):
            group = [i for i in free if sequences[i].grammar.in_image == in_image]
            if group:
                sample_group = self._sample_image_tokens if in_image else self._sample_text_state
                sampled = sample_group([sequences[i] for i in group], states, logits)
                for i, token in zip(group, sampled, strict=True):
                    tokens[i] = token
        return [int(token) for token in tokens if token is not None]

    def _sample_text_state(
        self, sequences: Sequence[SequenceState], states: Tensor | None, logits: Logits
    ) -> list[int]:
        options = [sequence.request.options for sequence in sequences]
        slots = [sequence.full.slot for sequence in sequences if sequence.logits is None]
        computed = iter(logits(states[slots], slice(None)) if slots and states is not None else ())
        table = torch.stack([next(computed) if s.logits is None else s.logits for s in sequences])
        if any(o.repetition_penalty != 1 for o in options):
            seen = torch.stack([sequence.seen_text for sequence in sequences])
            penalty = _column([o.repetition_penalty for o in options], table)
            table = penalize_repetition(table, seen, penalty)
        allowed = torch.stack([s.grammar.allowed_tokens(self.masks) for s in sequences])
        return _sample_tokens(
            sequences, table.masked_fill(~allowed, float("-inf")),
            [o.text_greedy for o in options], [o.text_temperature for o in options],
            [o.text_top_k for o in options], [o.text_top_p for o in options],
        )  # fmt: skip

    def _sample_image_tokens(
        self, sequences: Sequence[SequenceState], states: Tensor | None, logits: Logits
    ) -> list[int]:
        assert states is not None  # a sequence in the image state has decoded its begin token
        options = [sequence.request.options for sequence in sequences]
        slots = [slot for sequence in sequences for slot in sequence.cfg_slots]
        distinct = sorted(set(slots))  # equal branches are computed once
        computed = logits(states[distinct], self.image_tokens)
        by_branch = computed[[distinct.index(slot) for slot in slots]]
        full, image_cond, uncond = by_branch.view(len(sequences), 3, -1).unbind(1)
        table = full
        if any(sequence.uncond is not None for sequence in sequences):
            guided = apply_cfg(
                full, image_cond, uncond,
                _column([o.guidance_scale_text for o in options], computed),
                _column([o.guidance_scale_image for o in options], computed),
            )  # fmt: skip
            is_guided = [[sequence.uncond is not None] for sequence in sequences]
            table = torch.where(torch.tensor(is_guided, device=computed.device), guided, full)
        codes = _sample_tokens(
            sequences, table,
            [o.image_greedy for o in options], [o.image_temperature for o in options],
            [o.image_top_k for o in options], [o.image_top_p for o in options],
        )  # fmt: skip
        return [self.image_tokens.start + code for code in codes]


def _sample_tokens(
    sequences: Sequence[SequenceState], table: Tensor, greedy: Sequence[bool],
    temperature: Sequence[float], top_k: Sequence[int], top_p: Sequence[float],
) -> list[int]:  # fmt: skip
    """Logits (B, V or a part of it) -> one index into them for each sequence."""
    if not bool(table.amax(-1).isfinite().all()):
        raise UserError(NONFINITE_LOGITS)
    argmax: list[int] = table.argmax(-1).tolist() if any(greedy) else []
    sampled = [i for i, is_greedy in enumerate(greedy) if not is_greedy]
    if not sampled:
        return argmax
    part = table if len(sampled) == len(sequences) else table[sampled]
    part = part / _column([temperature[i] for i in sampled], table)
    uniforms = philox_uniforms(
        [sequences[i].request.options.seed for i in sampled],
        [sequences[i].request.index for i in sampled],
        [sequences[i].position for i in sampled],
    )
    tokens = sample(
        part, uniforms, _column([top_k[i] for i in sampled], table),
        _column([top_p[i] for i in sampled], table),
    ).tolist()  # fmt: skip
    by_sequence = dict(zip(sampled, tokens, strict=True))
    return [by_sequence[i] if i in by_sequence else argmax[i] for i in range(len(sequences))]


def _column(values: Sequence[Number], like: Tensor) -> Tensor | Number:
    """One number if it is the same for all sequences, else a tensor (B, 1)."""
    if all(value == values[0] for value in values):
        return values[0]
    return torch.tensor(values, device=like.device)[:, None]
