"""The next token of every row: logits where there is a choice, guided inside of pictures.

Rows in text and rows in pictures are two groups: the first need the logits of all words, the
second those of the image codes alone, an eighth of the vocabulary.

Shapes: B rows of a group, R streams, D model width, V vocabulary, C image codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from medley.errors import UserError
from medley.generation.cuda_graph import NONFINITE_LOGITS
from medley.generation.grammar import TokenMasks
from medley.generation.sampling import apply_cfg, penalize_repetition, philox_uniforms, sample
from medley.generation.sequence import SequenceState

Logits = Callable[[Tensor, slice], Tensor]


class Sampler:
    def __init__(self, classes: TokenMasks) -> None:
        self.classes = classes
        self.codes = slice(
            classes.decodable_image_tokens.start, classes.decodable_image_tokens.stop
        )

    def __call__(
        self, rows: Sequence[SequenceState], states: Tensor | None, logits: Logits, streams: int
    ) -> list[int]:
        """States (R, D) by slot, None where all rows are new -> a token for each row.

        Raises UserError where what may come has no likeliest token: logits that are no numbers.
        """
        tokens = [row.grammar.forced() for row in rows]
        free = [i for i, token in enumerate(tokens) if token is None]
        for in_image in (False, True):
            group = [i for i in free if rows[i].grammar.in_image == in_image]
            if group:
                own = [rows[i] for i in group]
                chosen = self._pictures(own, states, logits) if in_image else self._words(
                    own, states, logits
                )  # fmt: skip
                for i, token in zip(group, chosen, strict=True):
                    tokens[i] = token
        return [int(token) for token in tokens if token is not None]

    def _words(
        self, rows: Sequence[SequenceState], states: Tensor | None, logits: Logits
    ) -> list[int]:
        options = [row.request.options for row in rows]
        moving = [row.full.slot for row in rows if row.logits is None]
        found = iter(logits(states[moving], slice(None)) if moving and states is not None else ())
        table = torch.stack([next(found) if r.logits is None else r.logits for r in rows])
        if any(o.repetition_penalty != 1 for o in options):
            seen = torch.stack([row.seen for row in rows])
            penalty = self._column([o.repetition_penalty for o in options], table)
            table = penalize_repetition(table, seen, penalty)
        allowed = [row.grammar.allowed(self.classes) for row in rows]
        table = table.masked_fill(~torch.stack(allowed), float("-inf"))
        return self._draw(
            rows, table, [o.text_greedy for o in options], [o.text_temperature for o in options],
            [o.text_top_k for o in options], [o.text_top_p for o in options],
        )  # fmt: skip

    def _pictures(
        self, rows: Sequence[SequenceState], states: Tensor | None, logits: Logits
    ) -> list[int]:
        assert states is not None  # a row inside of a picture has read its begin mark
        options = [row.request.options for row in rows]
        slots: list[int] = []
        for row in rows:
            nothing = row.full if row.uncond is None else row.uncond
            slots += [row.full.slot, (row.image_cond or nothing).slot, nothing.slot]
        used = sorted(set(slots))  # without pictures two streams are one, unguided all three
        made = logits(states[used], self.codes)
        full, images, nothing_ = (
            made[[used.index(s) for s in slots]].view(len(rows), 3, -1).unbind(1)
        )
        table = full
        if any(row.uncond is not None for row in rows):
            mixed = apply_cfg(
                full, images, nothing_,
                self._column([o.guidance_scale_text for o in options], made),
                self._column([o.guidance_scale_image for o in options], made),
            )  # fmt: skip
            guided = [[row.uncond is not None] for row in rows]
            table = torch.where(torch.tensor(guided, device=made.device), mixed, full)
        codes = self._draw(
            rows, table, [o.image_greedy for o in options], [o.image_temperature for o in options],
            [o.image_top_k for o in options], [o.image_top_p for o in options],
        )  # fmt: skip
        return [self.codes.start + code for code in codes]

    def _draw(
        self, rows: Sequence[SequenceState], table: Tensor, greedy: Sequence[bool],
        temperature: Sequence[float], top_k: Sequence[int], top_p: Sequence[float],
    ) -> list[int]:  # fmt: skip
        if not bool(table.amax(-1).isfinite().all()):
            raise UserError(NONFINITE_LOGITS)
        likeliest: list[int] = table.argmax(-1).tolist() if any(greedy) else []
        sampled = [i for i, is_greedy in enumerate(greedy) if not is_greedy]
        if not sampled:
            return likeliest
        part = table if len(sampled) == len(rows) else table[sampled]
        part = part / self._column([temperature[i] for i in sampled], table)
        drawn = philox_uniforms(
            [rows[i].request.options.seed for i in sampled],
            [rows[i].request.row for i in sampled],
            [len(rows[i].request.prompt) + len(rows[i].result.ids) for i in sampled],
        )
        chosen = sample(
            part, drawn, self._column([top_k[i] for i in sampled], table),
            self._column([top_p[i] for i in sampled], table),
        ).tolist()  # fmt: skip
        found = dict(zip(sampled, chosen, strict=True))
        return [found[i] if i in found else likeliest[i] for i in range(len(rows))]

    @staticmethod
    def _column(values: Sequence[Any], like: Tensor) -> Any:
        """One number where all rows have the same, else a tensor (B, 1)."""
        if all(value == values[0] for value in values):
            return values[0]
        return torch.tensor(values, device=like.device)[:, None]
