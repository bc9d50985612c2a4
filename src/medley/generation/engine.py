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
from torch import nn

from medley.data.vocabulary import Vocabulary
from medley.errors import UserError
from medley.generation.cuda_graph import GraphedDecode
from medley.generation.grammar import Grammar, TokenMasks
from medley.generation.kv_cache import bytes_per_token
from medley.generation.model_runner import ModelRunner
from medley.generation.prefix_cache import MIN_PREFIX, PrefixCache, shared_prefix_length
from medley.generation.sampler import Sampler
from medley.generation.sequence import CFGBranch, GenerationOutput, Request, SequenceState

MAX_NUM_SEQS = 32  # that are worked on at once, unless said otherwise
PREFILL_TOKENS = 8192  # of all prompts that are read in one pass
PREFIX_BYTES = 1 << 30  # of remembered contexts, or one whole context where that takes more
GRAPH_STEPS = 32  # codes of a picture between two looks of the host
BRANCHES = 3  # of a row, at most

Step = tuple[
    int, int | None, GenerationOutput
]  # ticket, new token or None at the end, result so far


class Engine:
    """Continues prompts with a decoder. Not safe for use by several threads at once.

    `fuse` joins the weights of the layers for a faster step, where they are plain; it must not be
    used on a decoder that is being trained. `codebook` is the size of the VQGAN's, where that has
    fewer codes than the vocabulary: others are never drawn.
    """

    def __init__(
        self,
        decoder: Any,
        vocabulary: Vocabulary,
        codes_per_image: int,
        fuse: bool = False,
        rows: int = MAX_NUM_SEQS,
        codebook: int | None = None,
    ) -> None:
        self.decoder, self.vocabulary = decoder, vocabulary
        self.codes_per_image, self.capacity = codes_per_image, rows
        self._passes = ModelRunner(decoder, vocabulary.pad, fuse, BRANCHES * rows)
        self._cache = self._passes.cache
        self.classes = TokenMasks(
            vocabulary, decoder.config.vocab_size, self._passes.device, codebook
        )
        self._chooser = Sampler(self.classes)
        whole = self.context * bytes_per_token(decoder.config, self._passes.dtype)
        self.prefixes = PrefixCache(max(PREFIX_BYTES, whole))
        # A look up at every code costs a GPU more than the step; a CPU loses nothing by it.
        plain_head = type(decoder.lm_head) is nn.Linear
        self.use_cuda_graph = self._passes.device.type == "cuda" and plain_head
        self._burst: tuple[Any, GraphedDecode] | None = None
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[SequenceState] = []
        self._tickets = 0
        self._inbox: dict[int, deque[Step]] = {}

    def set_max_num_seqs(self, rows: int) -> None:
        """So many requests are worked on at once from now on."""
        self.capacity, self._cache.most = rows, BRANCHES * rows

    @property
    def device(self) -> torch.device:
        return self._passes.device

    @property
    def dtype(self) -> torch.dtype:
        return self._passes.dtype

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
    def has_work(self) -> bool:
        return bool(self._waiting or self._rows)

    def poll(self, ticket: int) -> Iterator[Step]:
        """What has become of a request since it was asked last, without any work."""
        inbox = self._inbox.get(ticket)
        while inbox:
            step = inbox.popleft()
            if step[1] is None:
                del self._inbox[ticket]
            yield step

    # --- many requests --------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], batch_size: int = MAX_NUM_SEQS
    ) -> list[GenerationOutput]:
        """Results in the order of the requests. Raises UserError before the first step for a
        prompt that cannot be."""
        for request in requests:
            self.check(request.prompt)
        results = [GenerationOutput() for _ in requests]
        for index, _, result in self.run(requests, batch_size):
            results[index] = result
        return results

    def run(
        self, requests: Iterable[Request], batch_size: int = MAX_NUM_SEQS
    ) -> Generator[Step, None, None]:
        """Yields (index of the request, new token or None at its end, its result so far).

        Requests are taken as there is room for them. Closing the iterator cancels what has not
        ended.
        """
        self.set_max_num_seqs(max(self.capacity, batch_size))
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
                    for _, token, result in self.poll(ticket):
                        if token is None:
                            del own[ticket]
                        yield index, token, result
        finally:
            for ticket in own:
                self.cancel(ticket)

    @torch.inference_mode()
    def step(self) -> None:
        """Takes waiting requests in, and gives every row its next token."""
        self._schedule()
        if not self._rows:
            return
        if steps := self._graphable_steps():
            self._decode_images(steps)
            return
        states = self._passes.decode(self._rows)
        tokens = self._chooser(self._rows, states, self._passes.logits, self._cache.streams)
        beginning = []
        for row, token in zip(self._rows, tokens, strict=True):
            self._take(row, token)
            if token == self.vocabulary.begin_image and row.request.options.guided:
                beginning.append(row)
            elif token == self.vocabulary.end_image:
                self._free(row.streams[1:], self._rows)
                row.image_cond = row.uncond = None
        self._open_guidance([row for row in beginning if row.grammar.finished is None])
        for row in [row for row in self._rows if row.grammar.finished is not None]:
            self._end(row)

    def _graphable_steps(self) -> int:
        """How many steps all rows stay inside of pictures, where it is worth not to look up: 0
        where it is not."""
        if (
            not self.use_cuda_graph
            or self._passes.fused is None
            or (self._waiting and self._has_room)
        ):
            return 0
        least = GRAPH_STEPS
        for row in self._rows:
            if row.next_token is None or row.grammar.drawn is None:
                return 0
            least = min(least, self.codes_per_image - row.grammar.drawn)
        return least

    @property
    def _has_room(self) -> bool:
        return len(self._rows) < self.capacity

    def _decode_images(self, steps: int) -> None:
        """So many codes of every row, read by the host when all of them are there."""
        assert self._passes.fused is not None
        longest = max(stream.length for row in self._rows for stream in row.streams)
        length = self._cache.make_room(longest + steps)
        slots = tuple((row.ticket, *(s.slot for s in row.streams)) for row in self._rows)
        key = (slots, self._cache.moves, length)
        if self._burst is None or self._burst[0] != key:
            head = self._passes.head(self._chooser.codes)
            made = GraphedDecode(
                self._rows,
                self._passes.fused,
                self._cache,
                head,
                self._chooser.codes,
                length,
                GRAPH_STEPS,
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

    def _schedule(self) -> None:
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
                    result = GenerationOutput([], grammar.finished, grammar.image_skipped_reason())
                    self._inbox[ticket].append((ticket, None, result))
            self._join(joining)

    def _join(self, joining: Sequence[tuple[int, Request, Grammar]]) -> None:
        """Reads prompts and begins their rows."""
        prompts = [list(request.prompt) for _, request, _ in joining]
        if not prompts:
            return
        streams: list[CFGBranch] = []
        begun = []
        try:
            for ids in prompts:
                streams.append(CFGBranch(self._cache.add_stream(), 0))
                found = self.prefixes.find(ids)
                if found is not None:
                    self._cache.restore(streams[-1].slot, *found)
                begun.append(0 if found is None else found[1])
            last = self._passes.read(streams, prompts, begun)
        except BaseException:  # out of memory, or somebody's Ctrl-C
            self._free(streams[::-1], self._rows)
            raise
        for (ticket, request, grammar), stream, state in zip(joining, streams, last, strict=True):
            seen = torch.zeros(self.classes.size, dtype=torch.bool, device=self._passes.device)
            seen[torch.tensor(list(request.prompt), device=self._passes.device)] = True
            logits = self._passes.logits(state[None], slice(None))[0]
            seen &= self.classes.text
            self._rows.append(SequenceState(ticket, request, grammar, stream, seen, logits))

    def _take(self, row: SequenceState, token: int) -> None:
        row.result.ids.append(token)
        row.next_token, row.logits = token, None
        if token in self.vocabulary.text_tokens:
            row.seen[token] = True
        row.grammar.take(token)
        if row.ticket in self._inbox:
            self._inbox[row.ticket].append((row.ticket, token, row.result))

    def _end(self, row: SequenceState) -> None:
        row.result.finish_reason = row.grammar.finished or ""
        row.result.note = row.grammar.image_skipped_reason()
        if row.request.keep:
            ids = tuple(row.ids[: row.full.length])
            self.prefixes.keep(self._cache.export(row.full.slot, ids))
        self._rows.remove(row)
        self._free(row.streams, [*self._rows, row])
        if row.ticket in self._inbox:
            self._inbox[row.ticket].append((row.ticket, None, row.result))

    def _open_guidance(self, rows: Sequence[SequenceState]) -> None:
        """Streams of the context's pictures only and of nothing, up to before the begin mark.

        What such a context shares with the full one is copied, not read again.
        """
        streams: list[CFGBranch] = []
        contexts: list[list[int]] = []
        begun: list[int] = []
        for row in rows:
            ids = row.ids[:-1]
            pictures = self._pictures_of(ids)
            bos = self.vocabulary.bos
            for context in ([bos], [bos, *pictures]) if pictures else ([bos],):
                stream = CFGBranch(self._cache.add_stream(), len(context))
                same = shared_prefix_length(context, ids)
                if 0 < same < len(context):  # copies are worth it from a few tokens on
                    same = same if same >= MIN_PREFIX else 0
                if same:
                    self._cache.copy(row.full.slot, stream.slot, same)
                if same < len(context):
                    streams.append(stream)
                    contexts.append(context)
                    begun.append(same)
                if len(context) == 1:
                    row.uncond = stream
                else:
                    row.image_cond = stream
        for stream, context, start in zip(streams, contexts, begun, strict=True):
            self._passes.read([stream], [context], [start])

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

    def _free(self, streams: Sequence[CFGBranch], rows: Sequence[SequenceState]) -> None:
        for stream in streams:
            moved, freed = self._cache.remove_stream(stream.slot), stream.slot
            stream.slot = -1
            for other in (s for row in rows for s in row.streams):
                if other.slot == moved:
                    other.slot = freed
