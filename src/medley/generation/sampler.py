"""Samples the next token of each running sequence, with guidance inside of images.

Sequences in the text state and in the image state are sampled as two groups: the first group needs
the logits of the entire vocabulary, the second only those of the image tokens, about an eighth.

Shapes: B places of a group, R branches, T input tokens of each, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from medley.errors import UserError
from medley.generation.grammar import TokenMasks
from medley.generation.sampling import (
    NONFINITE_LOGITS,
    apply_cfg,
    penalize_repetition,
    philox_uniforms,
    sample_candidates,
    sample_full_sort,
)
from medley.generation.sequence import SequenceState, Window

Logits = Callable[[Tensor, slice], Tensor]  # states (B, D), part of the vocabulary -> (B, part)
Number = TypeVar("Number", int, float)


class Sampler:
    """`image_tokens` is the part of the vocabulary that is sampled inside of images."""

    def __init__(self, masks: TokenMasks) -> None:
        self.masks = masks
        decodable = masks.decodable_image_tokens
        self.image_tokens = slice(decodable.start, decodable.stop)

    def __call__(
        self, windows: Sequence[Window], states: Tensor | None, logits: Logits
    ) -> list[list[int]]:
        """States (R, T, D) by slot, None if all sequences are new -> the draws of each window.

        A window of several draws lies within an image. Raises UserError if the logits of the
        allowed tokens are NaN or infinite.
        """
        places = [
            _Place(window.sequence, window.num_pending - 1 + ahead, ahead)
            for window in windows
            for ahead in range(window.num_draws)
        ]
        tokens = [place.sequence.grammar.forced_token() for place in places]
        free = [i for i, token in enumerate(tokens) if token is None]
        drawn: list[tuple[list[int], _Draw]] = []
        for in_image in (False, True):
            group = [i for i in free if places[i].sequence.grammar.in_image == in_image]
            if group:
                draw = self._draw_image_tokens if in_image else self._draw_text_state
                drawn.append((group, draw([places[i] for i in group], states, logits)))
        for (group, _), sampled in zip(drawn, _read([draw for _, draw in drawn]), strict=True):
            for i, token in zip(group, sampled, strict=True):
                tokens[i] = token
        chosen = iter([int(token) for token in tokens if token is not None])
        return [list(islice(chosen, window.num_draws)) for window in windows]

    def _draw_text_state(
        self, places: Sequence[_Place], states: Tensor | None, logits: Logits
    ) -> _Draw:
        sequences = [place.sequence for place in places]
        options = [sequence.request.options for sequence in sequences]
        rows: Iterator[Tensor] = iter(())
        old = [place for place in places if place.sequence.logits is None]
        if old and states is not None:
            indices = [place.state(place.sequence.full.slot, states) for place in old]
            rows = iter(_logits_of(states, indices, slice(None), logits))
        table = torch.stack([next(rows) if s.logits is None else s.logits for s in sequences])
        if any(o.repetition_penalty != 1 for o in options):
            seen = torch.stack([sequence.seen_text for sequence in sequences])
            penalty = _column([o.repetition_penalty for o in options], table.device)
            table = penalize_repetition(table, seen, penalty)
        allowed = torch.stack([s.grammar.allowed_tokens(self.masks) for s in sequences])
        return _Draw.of(
            places, table.masked_fill(~allowed, float("-inf")),
            [o.text_greedy for o in options], [o.text_temperature for o in options],
            [o.text_top_k for o in options], [o.text_top_p for o in options],
        )  # fmt: skip

    def _draw_image_tokens(
        self, places: Sequence[_Place], states: Tensor | None, logits: Logits
    ) -> _Draw:
        assert states is not None  # a sequence in the image state has decoded its begin token
        sequences = [place.sequence for place in places]
        options = [sequence.request.options for sequence in sequences]
        indices = [place.state(s, states) for place in places for s in place.sequence.cfg_slots]
        distinct = sorted(set(indices))  # equal branches are computed once
        computed = _logits_of(states, distinct, self.image_tokens, logits)
        device = computed.device
        number = {index: i for i, index in enumerate(distinct)}
        by_branch = computed.index_select(0, _constant([number[i] for i in indices], device))
        full, image_cond, uncond = by_branch.view(len(places), 3, -1).unbind(1)
        table = full
        if any(sequence.uncond is not None for sequence in sequences):
            guided = apply_cfg(
                full, image_cond, uncond,
                _column([o.guidance_scale_text for o in options], device),
                _column([o.guidance_scale_image for o in options], device),
            )  # fmt: skip
            is_guided = [sequence.uncond is not None for sequence in sequences]
            table = torch.where(_constant(is_guided, device)[:, None], guided, full)
        return _Draw.of(
            places, table,
            [o.image_greedy for o in options], [o.image_temperature for o in options],
            [o.image_top_k for o in options], [o.image_top_p for o in options],
            self.image_tokens.start,
        )  # fmt: skip


class _Place(NamedTuple):
    """One token to draw: input token whose state it follows, and number of draws before it."""

    sequence: SequenceState
    column: int
    ahead: int

    def state(self, slot: int, states: Tensor) -> int:
        """Index of the state (T, D) of a slot among all states (R T, D)."""
        return slot * states.shape[1] + self.column


def _logits_of(states: Tensor, indices: Sequence[int], part: slice, logits: Logits) -> Tensor:
    """Logits (B, part) of some of the states (R, T, D)."""
    flat = states.flatten(0, 1)
    return logits(flat.index_select(0, _constant(indices, flat.device)), part)


class _Draw(NamedTuple):
    """The tokens of a group on the device, before the host reads them.

    Attributes:
        tokens: int64 (B,), indices into the logits
        is_finite: bool (), of all logits
        is_complete: bool (), whether the candidates contained all tokens to choose from
        full_sort: `tokens` from the fully sorted logits, for a draw that is not complete
        offset: token id of the first logit
    """

    tokens: Tensor
    is_finite: Tensor
    is_complete: Tensor
    full_sort: Callable[[], Tensor]
    offset: int

    @classmethod
    def of(
        cls, places: Sequence[_Place], table: Tensor, greedy: Sequence[bool],
        temperature: Sequence[float], top_k: Sequence[int], top_p: Sequence[float],
        offset: int = 0,
    ) -> _Draw:  # fmt: skip
        """From logits (B, V or a part of it) and the options of each place."""
        is_finite = table.amax(-1).isfinite().all()
        if all(greedy):
            argmax = table.argmax(-1)
            return cls(argmax, is_finite, torch.ones_like(is_finite), lambda: argmax, offset)
        device = table.device
        if device.type == "mps":  # MPS does not support float64
            table, device = table.cpu(), torch.device("cpu")
        uniforms = philox_uniforms(
            [place.sequence.request.options.seed for place in places],
            [place.sequence.request.index for place in places],
            [place.sequence.position + place.ahead for place in places],
        ).to(device, non_blocking=True)
        scaled = table / _column(temperature, device)
        limits = (_column(top_k, device), _column(top_p, device))
        sampled, complete = sample_candidates(scaled, uniforms, *limits)
        if not any(greedy):
            return cls(
                sampled, is_finite, complete.all(),
                lambda: sample_full_sort(scaled, uniforms, *limits), offset,
            )  # fmt: skip
        is_greedy, argmax = _constant(greedy, device), table.argmax(-1)
        return cls(
            torch.where(is_greedy, argmax, sampled), is_finite, (complete | is_greedy).all(),
            lambda: torch.where(is_greedy, argmax, sample_full_sort(scaled, uniforms, *limits)),
            offset,
        )  # fmt: skip


def _read(draws: Sequence[_Draw]) -> list[list[int]]:
    """Token ids of each draw, with one host synchronization unless a draw is not complete.

    Raises UserError if logits are NaN or infinite.
    """
    if not draws:
        return []
    device = draws[0].tokens.device
    flags = [flag.to(device) for draw in draws for flag in (draw.is_finite, draw.is_complete)]
    host = torch.cat([torch.stack(flags).long(), *[draw.tokens for draw in draws]]).tolist()
    start, results = len(flags), []
    if not all(host[0:start:2]):
        raise UserError(NONFINITE_LOGITS)
    for draw, is_complete in zip(draws, host[1:start:2], strict=True):
        end = start + len(draw.tokens)
        tokens = host[start:end] if is_complete else draw.full_sort().tolist()
        results.append([draw.offset + token for token in tokens])
        start = end
    return results


def _column(values: Sequence[Number], device: torch.device) -> Tensor | Number:
    """One number if it is the same for all sequences, else a tensor (B, 1)."""
    if all(value == values[0] for value in values):
        return values[0]
    return _constant(values, device)[:, None]


@lru_cache(maxsize=256, typed=True)  # typed: (0,) equals (False,) and (0.0,)
def _constant_of(device: torch.device, *values: float) -> Tensor:
    with torch.inference_mode(False):  # engines in and outside of inference mode share it
        return torch.tensor(values, device=device)


def _constant(values: Sequence[float], device: torch.device) -> Tensor:
    """A tensor of numbers that stay the same for many steps, copied to the device once."""
    return _constant_of(device, *values)
