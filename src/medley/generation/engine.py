"""The engine: many rows at once, each in its own state, one forward pass a step.

A row has one stream of keys and values for its full context and, while it is inside a
picture, up to two more for guidance: its context's pictures only, and nothing. All streams of
all rows take part in the same forward pass, each at its own position. Rows join when there is
room and leave when they end, or when nobody wants them any more.

Shapes: R streams, B rows, T prompt tokens, L longest stream, D model width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from medley.errors import UserError
from medley.generation.burst import Burst
from medley.generation.cache import KeyValueCache, bytes_a_token
from medley.generation.choosing import Chooser
from medley.generation.decode_step import FusedStep, can_fuse
from medley.generation.grammar import Grammar, TokenClasses
from medley.generation.packed import LARGEST, Matrix
from medley.generation.prefixes import LEAST, Prefixes, shared
from medley.generation.rows import Request, Result, Row, Stream
from medley.vocabulary import Vocabulary

ROWS = 32  # that are worked on at once, unless said otherwise
PREFILL_TOKENS = 8192  # of all prompts that are read in one pass
PREFIX_BYTES = 1 << 30  # of remembered contexts, or one whole context where that takes more
BURST = 32  # codes of a picture between two looks of the host
STREAMS = 3  # of a row, at most

Step = tuple[int, int | None, Result]  # ticket, new token or None at the end, result so far


class Engine:
    """Continues prompts with a decoder. Not safe for use by several threads at once.

    `fuse` joins the weights of the layers for a faster step, where they are plain; it must not be
    used on a decoder that is being trained.
    """

    def __init__(
        self,
        decoder: Any,
        vocabulary: Vocabulary,
        codes_per_image: int,
        fuse: bool = False,
        rows: int = ROWS,
    ) -> None:
        self.decoder, self.vocabulary = decoder, vocabulary
        self.codes_per_image, self.capacity = codes_per_image, rows
        weight = decoder.model.embed_tokens.weight
        hook = getattr(
            decoder.model.embed_tokens, "_hf_hook", None
        )  # accelerate's, if it lies elsewhere
        self.device = weight.device if hook is None else torch.device(hook.execution_device)
        self.dtype: torch.dtype = weight.dtype
        self.classes = TokenClasses(vocabulary, decoder.config.vocab_size, self.device)
        self._chooser = Chooser(self.classes)
        with torch.no_grad():
            self._fused = FusedStep(decoder) if fuse and can_fuse(decoder) else None
        self._heads: dict[tuple[Any, Any], Matrix] = {}  # by the part of the vocabulary
        self._cache = KeyValueCache(decoder.config, self.dtype, self.device, STREAMS * rows)
        whole = self.context * bytes_a_token(decoder.config, self.dtype)
        self.prefixes = Prefixes(max(PREFIX_BYTES, whole))
        # A look up at every code costs a GPU more than the step; a CPU loses nothing by it.
        self.bursts = self.device.type == "cuda" and type(decoder.lm_head) is nn.Linear
        self._burst: tuple[Any, Burst] | None = None
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[Row] = []
        self._tickets = 0
        self._inbox: dict[int, deque[Step]] = {}

    @property
    def context(self) -> int:
        return int(self.decoder.config.max_position_embeddings)

    # --- one request ----------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Takes a request in; gives its ticket. Raises UserError for a prompt that cannot be."""
        self.check(request.prompt)
        self._tickets += 1
        self._waiting.append((self._tickets, request))
        self._inbox[self._tickets] = deque()
        return self._tickets

    @torch.inference_mode()  # what the cache holds was made in it
    def cancel(self, ticket: int) -> None:
        """Forgets a request: its row is free at once. Nothing happens for one that has ended."""
        self._inbox.pop(ticket, None)
        self._waiting = deque((t, r) for t, r in self._waiting if t != ticket)
        for row in [row for row in self._rows if row.ticket == ticket]:
            self._rows.remove(row)
            self._free(row.streams, [*self._rows, row])

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows)

    def news(self, ticket: int) -> Iterator[Step]:
        """What has become of a request since it was asked last, without any work."""
        inbox = self._inbox.get(ticket)
        while inbox:
            step = inbox.popleft()
            if step[1] is None:
                del self._inbox[ticket]
            yield step

    # --- many requests --------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], batch_size: int = ROWS) -> list[Result]:
        """Results in the order of the requests. Raises UserError before the first step for a
        prompt that cannot be."""
        for request in requests:
            self.check(request.prompt)
        results = [Result() for _ in requests]
        for index, _, result in self.run(requests, batch_size):
            results[index] = result
        return results

    def run(
        self, requests: Iterable[Request], batch_size: int = ROWS
    ) -> Generator[Step, None, None]:
        """Yields (index of the request, new token or None at its end, its result so far).

        Requests are taken as there is room for them. Closing the iterator cancels what has not
        ended.
        """
        self.capacity = max(self.capacity, batch_size)
        self._cache.most = STREAMS * self.capacity
        left = enumerate(requests)
        own: dict[int, int] = {}
        try:
            while True:
                for index, request in islice(left, batch_size - len(own)):
                    own[self.submit(request)] = index
                if not own:
                    return
                self.step()
                for ticket, index in list(own.items()):
                    for _, token, result in self.news(ticket):
                        if token is None:
                            del own[ticket]
                        yield index, token, result
        finally:
            for ticket in own:
                self.cancel(ticket)

    @torch.inference_mode()
    def step(self) -> None:
        """Takes waiting requests in, and gives every row its next token."""
        self._admit()
        if not self._rows:
            return
        if steps := self._steps_in_pictures():
            self._draw_on(steps)
            return
        states = self._decode()
        tokens = self._chooser(self._rows, states, self._logits, self._cache.streams)
        beginning = []
        for row, token in zip(self._rows, tokens, strict=True):
            self._take(row, token)
            if token == self.vocabulary.begin_image and row.request.options.guided:
                beginning.append(row)
            elif token == self.vocabulary.end_image:
                self._free(row.streams[1:], self._rows)
                row.images_only = row.nothing = None
        self._open_guidance([row for row in beginning if row.grammar.finished is None])
        for row in [row for row in self._rows if row.grammar.finished is not None]:
            self._end(row)

    def _steps_in_pictures(self) -> int:
        """How many steps all rows stay inside of pictures, where it is worth not to look up: 0
        where it is not."""
        if not self.bursts or self._fused is None or (self._waiting and self._has_room):
            return 0
        least = BURST
        for row in self._rows:
            if row.next_token is None or row.grammar.drawn is None:
                return 0
            least = min(least, self.codes_per_image - row.grammar.drawn)
        return least

    @property
    def _has_room(self) -> bool:
        return len(self._rows) < self.capacity

    def _draw_on(self, steps: int) -> None:
        """So many codes of every row, read by the host when all of them are there."""
        assert self._fused is not None
        longest = max(stream.length for row in self._rows for stream in row.streams)
        length = self._cache.make_room(longest + steps)
        slots = tuple((row.ticket, *(s.slot for s in row.streams)) for row in self._rows)
        key = (slots, self._cache.moves, length)
        if self._burst is None or self._burst[0] != key:
            head = self._head(self._chooser.codes)
            made = Burst(
                self._rows, self._fused, self._cache, head, self._chooser.codes, length, BURST
            )
            self._burst = (key, made)
        for row, tokens in zip(self._rows, self._burst[1](self._rows, steps), strict=True):
            for token in tokens:
                self._take(row, token)

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

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self.capacity:
            joining: list[tuple[int, Request, Grammar]] = []
            while self._waiting and len(self._rows) + len(joining) < self.capacity:
                longest = max([len(r.prompt) for _, r, _ in joining] + [0])
                longest = max(longest, len(self._waiting[0][1].prompt))
                if joining and longest * (len(joining) + 1) > PREFILL_TOKENS:
                    break
                ticket, request = self._waiting.popleft()
                grammar = self._grammar(request)
                if grammar.finished is None:
                    joining.append((ticket, request, grammar))
                else:
                    result = Result([], grammar.finished, grammar.missing_picture_note())
                    self._inbox[ticket].append((ticket, None, result))
            self._join(joining)

    def _join(self, joining: Sequence[tuple[int, Request, Grammar]]) -> None:
        """Reads prompts and begins their rows."""
        prompts = [list(request.prompt) for _, request, _ in joining]
        if not prompts:
            return
        streams: list[Stream] = []
        begun = []
        try:
            for ids in prompts:
                streams.append(Stream(self._cache.add_stream(), 0))
                found = self.prefixes.find(ids)
                if found is not None:
                    self._cache.restore(streams[-1].slot, *found)
                begun.append(0 if found is None else found[1])
            last = self._read(streams, prompts, begun)
        except BaseException:  # out of memory, or somebody's Ctrl-C
            self._free(streams[::-1], self._rows)
            raise
        for (ticket, request, grammar), stream, state in zip(joining, streams, last, strict=True):
            seen = torch.zeros(self.classes.size, dtype=torch.bool, device=self.device)
            seen[torch.tensor(list(request.prompt), device=self.device)] = True
            logits = self._logits(state[None], slice(None))[0]
            seen &= self.classes.text
            self._rows.append(Row(ticket, request, grammar, stream, seen, logits))

    def _take(self, row: Row, token: int) -> None:
        row.result.ids.append(token)
        row.next_token, row.logits = token, None
        if token in self.vocabulary.text_pieces:
            row.seen[token] = True
        row.grammar.take(token)
        if row.ticket in self._inbox:
            self._inbox[row.ticket].append((row.ticket, token, row.result))

    def _end(self, row: Row) -> None:
        row.result.finish_reason = row.grammar.finished or ""
        row.result.note = row.grammar.missing_picture_note()
        if row.request.keep:
            ids = tuple(row.ids[: row.full.length])
            self.prefixes.keep(self._cache.export(row.full.slot, ids))
        self._rows.remove(row)
        self._free(row.streams, [*self._rows, row])
        if row.ticket in self._inbox:
            self._inbox[row.ticket].append((row.ticket, None, row.result))

    def _open_guidance(self, rows: Sequence[Row]) -> None:
        """Streams of the context's pictures only and of nothing, up to before the begin mark.

        What such a context shares with the full one is copied, not read again.
        """
        streams: list[Stream] = []
        contexts: list[list[int]] = []
        begun: list[int] = []
        for row in rows:
            ids = row.ids[:-1]
            pictures = self._pictures_of(ids)
            bos = self.vocabulary.bos
            for context in ([bos], [bos, *pictures]) if pictures else ([bos],):
                stream = Stream(self._cache.add_stream(), len(context))
                same = shared(context, ids)
                if 0 < same < len(context):  # copies are worth it from a few tokens on
                    same = same if same >= LEAST else 0
                if same:
                    self._cache.copy(row.full.slot, stream.slot, same)
                if same < len(context):
                    streams.append(stream)
                    contexts.append(context)
                    begun.append(same)
                if len(context) == 1:
                    row.nothing = stream
                else:
                    row.images_only = stream
        for stream, context, start in zip(streams, contexts, begun, strict=True):
            self._read([stream], [context], [start])

    def _pictures_of(self, ids: Sequence[int]) -> list[int]:
        """The ids of whole pictures in a context, with their marks."""
        found: list[int] = []
        start: int | None = None
        for place, token in enumerate(ids):
            if token == self.vocabulary.begin_image:
                start = place
            elif token == self.vocabulary.end_image and start is not None:
                found += ids[start : place + 1]
                start = None
        return found

    def _free(self, streams: Sequence[Stream], rows: Sequence[Row]) -> None:
        for stream in streams:
            moved, freed = self._cache.remove_stream(stream.slot), stream.slot
            stream.slot = -1
            for other in (s for row in rows for s in row.streams):
                if other.slot == moved:
                    other.slot = freed

    # --- forward passes -------------------------------------------------------------------

    def _read(
        self, streams: Sequence[Stream], contexts: Sequence[Sequence[int]], begun: Sequence[int]
    ) -> Tensor:
        """Reads contexts from their places `begun` on, in one pass, into neighbouring slots; gives
        the state (D,) behind the last token of each, as (B, D).

        Shorter ones are filled up on the right: what that writes lies behind the stream's end,
        where its own tokens will come.
        """
        rest = [list(ids[start:]) for ids, start in zip(contexts, begun, strict=True)]
        longest = max(map(len, rest))
        tokens = torch.tensor(
            [[*ids, *[self.vocabulary.pad] * (longest - len(ids))] for ids in rest],
            device=self.device,
        )
        starts = torch.tensor(list(begun), device=self.device)
        positions = starts[:, None] + torch.arange(longest, device=self.device)
        length = int(max(begun)) + longest
        self._cache.place(streams[0].slot, positions, length)
        seen = torch.arange(length, device=self.device)[None, None] <= positions[..., None]
        positions = positions.clamp(max=self.context - 1)  # of fillings that stand beyond it
        hidden = self._modules(tokens, positions, seen[:, None])
        for stream, ids in zip(streams, contexts, strict=True):
            stream.length = len(ids)
        ends = torch.tensor([len(ids) - 1 for ids in rest], device=self.device)
        return hidden[torch.arange(len(rest), device=self.device), ends]

    def _modules(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        hidden: Tensor = self.decoder.model(
            input_ids=tokens, position_ids=positions, attention_mask=mask,
            past_key_values=self._cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        return hidden

    def _decode(self) -> Tensor | None:
        """One pass for all streams: states (R, D) by slot; None where all rows are new.

        Streams of rows that are new keep their slots: all slots are stepped, and those without
        a token write to their next place, which their own token overwrites.
        """
        if all(row.next_token is None for row in self._rows):
            return None
        count = self._cache.streams
        tokens, places = [self.vocabulary.pad] * count, [0] * count
        for row in self._rows:
            for stream in row.streams:
                places[stream.slot] = stream.length
                if row.next_token is not None:
                    tokens[stream.slot] = row.next_token
                    stream.length += 1
        length = max(places) + 1
        ids = torch.tensor(tokens, device=self.device)
        positions = torch.tensor(places, device=self.device)
        self._cache.place(0, positions[:, None], length)
        mask = None
        if min(places) + 1 < length:
            seen = torch.arange(length, device=self.device)[None] <= positions[:, None]
            mask = seen[:, None, None]
        if self._fused is not None:
            return self._fused(ids, positions, mask, self._cache)
        if mask is None:  # the modules would make a causal one, of this one token
            mask = torch.ones(count, 1, 1, length, dtype=torch.bool, device=self.device)
        return self._modules(ids[:, None], positions[:, None], mask)[:, -1]

    def _logits(self, states: Tensor, part: slice) -> Tensor:
        """States (B, D) -> float32 logits of a part of the vocabulary."""
        head = self.decoder.lm_head
        if not isinstance(head, nn.Linear) or hasattr(head, "_hf_hook"):
            # An adapter lies over it, or accelerate fetches it from elsewhere.
            logits: Tensor = head(states).float()
            return logits[:, part].to(self.device)
        return self._head(part)(states.to(head.weight.device)).float().to(self.device)

    def _head(self, part: slice) -> Matrix:
        key, weight = (part.start, part.stop), self.decoder.lm_head.weight
        if key not in self._heads:
            pack = self._fused is not None and weight.nbytes <= LARGEST
            self._heads[key] = Matrix(weight[part], pack)
        return self._heads[key]
