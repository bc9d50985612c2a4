"""Plain speculative Jacobi decoding (SJD, arXiv 2410.01699): a baseline for speculation.py.

It replaces the engine's speculator and sampler. A draft x is accepted with probability
min(1, p(x) / q(x)): p is the distribution of its place behind the drafts before it, q the one that
it was drawn from a pass ago. The first rejected place is drawn from the normalized positive part of
p - q. The places behind it are drawn from their own p, as the next drafts. First drafts are copies,
as in the engine; their q is 1. One image at a time.

Shapes: T tokens to draw in a pass, C image tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medley.generation import Engine
from medley.generation.sampler import Logits, Sampler
from medley.generation.sampling import apply_cfg, top_k_top_p
from medley.generation.sequence import Window
from medley.generation.speculation import Speculator


def image_logits(sampler: Sampler, window: Window, states: Tensor, logits: Logits) -> Tensor:
    """Guided logits of the tokens of a window, divided by the temperature: float64 (T, C)."""
    sequence = window.sequence
    options = sequence.request.options
    columns = slice(window.num_pending - 1, window.num_pending - 1 + window.num_draws)
    full, image_cond, uncond = (
        logits(states[slot, columns], sampler.image_tokens) for slot in sequence.cfg_slots
    )
    scales = options.guidance_scale_text, options.guidance_scale_image
    guided = full if sequence.uncond is None else apply_cfg(full, image_cond, uncond, *scales)
    return guided.double() / options.image_temperature


def image_distributions(window: Window, table: Tensor) -> Tensor:
    """What tokens are drawn from, behind top-k and top-p: logits (T, C) -> float64 (T, C)."""
    options = window.sequence.request.options
    limits = options.image_top_k, options.image_top_p
    ids, kept, _ = top_k_top_p(table, *limits, table.shape[-1])
    probabilities = torch.zeros_like(table).scatter(-1, ids, kept)
    return probabilities / probabilities.sum(-1, keepdim=True)


def speculative_draws(
    p: Tensor, q: Tensor, drafts: Sequence[int], generator: torch.Generator
) -> tuple[list[int], int]:
    """p (T, C), q (T - 1, C) and the drafts of the first T - 1 places -> T draws, number accepted.

    The draws behind the accepted ones are drafts of the next pass. A negative draft is rejected.
    """
    accepted: list[int] = []
    for place, draft in enumerate(drafts):
        ratio = torch.rand((), generator=generator, dtype=torch.float64)
        if draft >= 0 and ratio * q[place, draft] < p[place, draft]:
            accepted.append(draft)
            continue
        residual = (p[place] - q[place]).clamp_min(0)
        accepted.append(int(residual.multinomial(1, generator=generator)))
        break
    else:
        accepted.append(int(p[-1].multinomial(1, generator=generator)))
    rest = p[len(accepted) :]
    drawn = rest.multinomial(1, generator=generator).flatten().tolist() if len(rest) else []
    return [*accepted, *drawn], len(accepted)


class _SJDSampler(Sampler):
    """Draws windows by SJD's rule, and keeps how many draws are accepted."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.sampler.masks)
        self.generator = torch.Generator().manual_seed(0)
        self.num_accepted = 0
        self._q: Tensor | None = None  # (at most T - 1, C): of the drafts that were drawn

    def __call__(
        self, windows: Sequence[Window], states: Tensor | None, logits: Logits
    ) -> list[list[int]]:
        (window,) = windows
        if states is None or not window.sequence.grammar.in_image:
            self._q, self.num_accepted = None, 1
            return super().__call__(windows, states, logits)
        first = self.image_tokens.start
        p = image_distributions(window, image_logits(self, window, states, logits))
        # The begin-of-image token, which the engine copies where it has no code, is rejected: -1.
        drafts = [
            d - first if d in self.masks.decodable_image_tokens else -1 for d in window.drafts
        ]
        q = torch.zeros(len(drafts), p.shape[1], dtype=p.dtype)
        stale = 0 if self._q is None else min(len(self._q), len(drafts))
        if self._q is not None:
            q[:stale] = self._q[:stale]
        for place in range(stale, len(drafts)):
            if drafts[place] >= 0:
                q[place, drafts[place]] = 1
        drawn, self.num_accepted = speculative_draws(p, q, drafts, self.generator)
        self._q = p[self.num_accepted :]
        return [[first + token for token in drawn]]


class _SJDSpeculator(Speculator):
    """The engine's windows and first drafts, with SJD's rule of acceptance."""

    def __init__(self, engine: Engine, sampler: _SJDSampler, width: int) -> None:
        super().__init__(engine.speculator.codes_per_image, can_measure=True)
        self._sampler = sampler
        self.set(width)

    def accept(
        self, windows: Sequence[Window], drawn: Sequence[Sequence[int]], seconds: float
    ) -> list[list[int]]:
        ((window,), (tokens,)) = windows, drawn
        count = self._sampler.num_accepted
        window.sequence.drafts = list(tokens[count:])
        return [list(tokens[:count])]


def use_plain_sjd(engine: Engine, width: int) -> None:
    """Replaces speculator and sampler of an engine."""
    sampler = _SJDSampler(engine)
    engine.sampler, engine.speculator = sampler, _SJDSpeculator(engine, sampler, width)
