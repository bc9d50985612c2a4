"""The engine: many rows at once, each in its own state, one forward pass a step.

A row has one stream of keys and values for its full context and, while it is inside a
picture, up to two more for guidance: its context's pictures only, and nothing. All streams of
all rows take part in the same forward pass, each at its own position. Rows join when there is
room and leave when they end.

Shapes: R streams, B rows, T prompt tokens, L longest stream, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from medley.errors import UserError
from medley.generation.cache import KeyValueCache
from medley.generation.grammar import Grammar, TokenClasses
from medley.generation.options import GenerationOptions
from medley.generation.sampling import choose, guide, keep_top_p, penalise_repetition, uniforms
from medley.vocabulary import Vocabulary


@dataclass(frozen=True)
class Request:
    """Prompt ids of one row and how it is to be continued; `row` seeds its randomness."""

    prompt: Sequence[int]
    options: GenerationOptions
    row: int = 0


@dataclass
class Result:
    """What came out of a row: new ids without prompt, why it ended, why no picture came."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    note: str | None = None


@dataclass
class _Stream:
    slot: int
    length: int


@dataclass
class _Row:
    index: int
    request: Request
    grammar: Grammar
    full: _Stream
    seen: Tensor  # bool (V,): text pieces of prompt and output
    images_only: _Stream | None = None
    nothing: _Stream | None = None
    next_token: int | None = None
    result: Result = field(default_factory=Result)

    @property
    def streams(self) -> list[_Stream]:
        return [s for s in (self.full, self.images_only, self.nothing) if s is not None]

    @property
    def ids(self) -> list[int]:
        return [*self.request.prompt, *self.result.ids]


class Engine:
    """Continues prompts with a decoder. Not safe for use by several threads at once."""

    def __init__(self, decoder: Any, vocabulary: Vocabulary, codes_per_image: int) -> None:
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.codes_per_image = codes_per_image
        weight = decoder.model.embed_tokens.weight
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        self.classes = TokenClasses(vocabulary, decoder.config.vocab_size, self.device)

    @property
    def context(self) -> int:
        return int(self.decoder.config.max_position_embeddings)

    def generate(self, requests: Sequence[Request], batch_size: int = 32) -> list[Result]:
        """Results in the order of the requests."""
        results = [Result() for _ in requests]
        for index, _, result in self.run(requests, batch_size):
            results[index] = result
        return results

    @torch.inference_mode()
    def run(
        self, requests: Sequence[Request], batch_size: int = 32
    ) -> Iterator[tuple[int, int | None, Result]]:
        """Yields (index of the request, new token or None at its end, its result so far)."""
        for request in requests:
            self.check(request.prompt)
        waiting = deque(enumerate(requests))
        rows: list[_Row] = []
        logits: dict[int, Tensor] = {}  # of rows that have just joined: their prompt's last
        cache = KeyValueCache(self.decoder.config, self.dtype, self.device)
        while waiting or rows:
            while waiting and len(rows) < batch_size:
                index, request = waiting.popleft()
                row = self._admit(index, request, cache, logits)
                if row is not None:
                    rows.append(row)
                else:
                    yield index, None, self._refused(request)
            if not rows:
                continue
            tokens = self._next_tokens(rows, self._step(rows, cache, logits))
            still: list[_Row] = []
            for row, token in zip(rows, tokens, strict=True):
                self._take(row, token, rows, cache)
                yield row.index, token, row.result
                if row.grammar.finished is None:
                    still.append(row)
                    continue
                row.result.finish_reason = row.grammar.finished
                row.result.note = row.grammar.missing_picture_note()
                yield row.index, None, row.result
            for row in rows:
                if row.grammar.finished is not None:
                    self._free(row.streams, rows, cache)
            rows = still

    # --- rows -----------------------------------------------------------------------------

    def check(self, prompt: Sequence[int]) -> None:
        """Raises UserError for a prompt that is empty or fills the context."""
        if not prompt:
            raise UserError("an empty prompt: it needs <s> at least")
        if len(prompt) >= self.context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the model's context is "
                f"{self.context}: leave out text, or pictures ({self.codes_per_image + 2} tokens "
                "each)"
            )

    def _grammar(self, request: Request) -> Grammar:
        room = min(request.options.max_new_tokens, self.context - len(request.prompt))
        grammar = Grammar(self.vocabulary, request.options, self.codes_per_image, room)
        grammar.start()
        return grammar

    def _refused(self, request: Request) -> Result:
        grammar = self._grammar(request)
        return Result([], grammar.finished or "length", grammar.missing_picture_note())

    def _admit(
        self, index: int, request: Request, cache: KeyValueCache, logits: dict[int, Tensor]
    ) -> _Row | None:
        grammar = self._grammar(request)
        if grammar.finished is not None:
            return None
        stream, last = self._prefill(list(request.prompt), cache)
        seen = torch.zeros(self.classes.size, dtype=torch.bool, device=self.device)
        seen[torch.tensor(list(request.prompt), device=self.device)] = True
        logits[index] = last
        return _Row(index, request, grammar, stream, seen & self.classes.text)

    def _take(self, row: _Row, token: int, rows: list[_Row], cache: KeyValueCache) -> None:
        row.result.ids.append(token)
        row.next_token = token
        if bool(token in self.vocabulary.text_pieces):
            row.seen[token] = True
        row.grammar.take(token)
        if token == self.vocabulary.begin_image and row.request.options.guided:
            pictures = self._pictures_of(row.ids[:-1])
            row.nothing, _ = self._prefill([self.vocabulary.bos], cache)
            if pictures:
                row.images_only, _ = self._prefill([self.vocabulary.bos, *pictures], cache)
        elif token == self.vocabulary.end_image:
            self._free(row.streams[1:], rows, cache)
            row.images_only = row.nothing = None

    def _pictures_of(self, ids: Sequence[int]) -> list[int]:
        """The ids of whole pictures in a context, with their marks."""
        kept: list[int] = []
        start: int | None = None
        for place, token in enumerate(ids):
            if token == self.vocabulary.begin_image:
                start = place
            elif token == self.vocabulary.end_image and start is not None:
                kept += ids[start : place + 1]
                start = None
        return kept

    def _free(self, streams: list[_Stream], rows: list[_Row], cache: KeyValueCache) -> None:
        for stream in streams:
            moved, freed = cache.remove_stream(stream.slot), stream.slot
            stream.slot = -1
            for other in (s for row in rows for s in row.streams):
                if other.slot == moved:
                    other.slot = freed

    # --- forward passes -------------------------------------------------------------------

    def _prefill(self, ids: list[int], cache: KeyValueCache) -> tuple[_Stream, Tensor]:
        """Reads a context into a new stream; gives the logits (V,) behind its last token."""
        slot, length = cache.add_stream(), len(ids)
        positions = torch.arange(length, device=self.device)
        cache.place(slice(slot, slot + 1), positions, length)
        mask = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()[None, None]
        tokens = torch.tensor([ids], device=self.device)
        hidden = self._forward(tokens, positions[None], mask, cache)
        return _Stream(slot, length), self.decoder.lm_head(hidden[:, -1]).float()[0]

    def _forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: KeyValueCache
    ) -> Tensor:
        out = self.decoder.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _step(
        self, rows: list[_Row], cache: KeyValueCache, fresh: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """One pass for all streams that have a token to read; guided logits (V,) of each row.

        Rows that have just joined bring the logits of their prompt with them.
        """
        moving = [row for row in rows if row.next_token is not None]
        logits = {row.index: fresh.pop(row.index) for row in rows if row.next_token is None}
        if not moving:
            return logits
        # Streams of rows that wait for this pass keep their slots: all slots are stepped, and
        # those without a token write to their next place, which their own token overwrites.
        tokens = torch.full((cache.streams, 1), self.vocabulary.pad, dtype=torch.int64)
        places = torch.zeros(cache.streams, dtype=torch.int64)
        for row in rows:
            for stream in row.streams:
                places[stream.slot] = stream.length
                if row.next_token is not None:
                    tokens[stream.slot] = row.next_token
                    stream.length += 1
        length = int(places.max()) + 1
        places = places.to(self.device)
        cache.place(slice(0, cache.streams), places, length)
        mask = (torch.arange(length, device=self.device)[None] <= places[:, None])[:, None, None]
        hidden = self._forward(tokens.to(self.device), places[:, None], mask, cache)
        every = self.decoder.lm_head(hidden[:, -1]).float()
        logits |= self._guided(moving, every)
        return logits

    def _guided(self, rows: list[_Row], every: Tensor) -> dict[int, Tensor]:
        out = {row.index: every[row.full.slot] for row in rows}
        guided = [row for row in rows if row.nothing is not None]
        if guided:
            full = every[[row.full.slot for row in guided]]
            nothing = every[[row.nothing.slot for row in guided if row.nothing]]
            images = every[[(row.images_only or row.nothing).slot for row in guided]]  # type: ignore[union-attr]
            options = [row.request.options for row in guided]
            mixed = guide(
                full,
                images,
                nothing,
                self._column([o.guidance_scale_text for o in options]),
                self._column([o.guidance_scale_image for o in options]),
            )
            out |= {row.index: mixed[i] for i, row in enumerate(guided)}
        return out

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

    # --- choosing -------------------------------------------------------------------------

    def _next_tokens(self, rows: list[_Row], logits: dict[int, Tensor]) -> list[int]:
        forced = {row.index: row.grammar.forced() for row in rows}
        free = [row for row in rows if forced[row.index] is None]
        chosen: dict[int, int] = {}
        if free:
            table = torch.stack([logits[row.index] for row in free])
            allowed = torch.stack([row.grammar.allowed(self.classes) for row in free])
            in_image = [row.grammar.in_image for row in free]
            options = [row.request.options for row in free]
            pairs = list(zip(options, in_image, strict=True))
            seen = torch.stack([row.seen for row in free])
            # A picture's codes carry no repetition penalty: none of them is ever in `seen`.
            table = penalise_repetition(
                table, seen, self._column([o.repetition_penalty for o in options])
            )
            table = table.masked_fill(~allowed, float("-inf"))
            table = table / self._column(
                [o.image_temperature if image else o.text_temperature for o, image in pairs]
            )
            greedy = torch.tensor(
                [o.image_greedy if image else o.text_greedy for o, image in pairs],
                device=self.device,
            )
            if not bool(greedy.all()):
                top_p = [o.image_top_p if image else o.text_top_p for o, image in pairs]
                table = keep_top_p(table, self._column(top_p))
            drawn = uniforms(
                [o.seed for o in options],
                [row.request.row for row in free],
                [len(row.request.prompt) + len(row.result.ids) for row in free],
            )
            tokens = choose(table, drawn, greedy).tolist()
            chosen = {row.index: token for row, token in zip(free, tokens, strict=True)}
        return [
            chosen[row.index] if forced[row.index] is None else int(forced[row.index] or 0)
            for row in rows
        ]
