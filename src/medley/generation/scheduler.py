"""Scheduler: queues of waiting, reading and running sequences, and outputs not yet read by callers.

A waiting request is admitted in order of arrival, as soon as fewer than `max_num_seqs` sequences
are admitted and the key-value cache has room for its worst case. Then its prompt is read, in one
pass or in parts, and the sequence runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from medley.data.vocabulary import Vocabulary
from medley.errors import UserError
from medley.generation.cache_budget import CacheBudget, cache_demand
from medley.generation.grammar import DecodingGrammar
from medley.generation.sequence import (
    Admission,
    CacheDemand,
    GenerationOutput,
    Prefill,
    PrefillPart,
    Request,
    SequenceState,
)

PREFILL_TOKENS = 8192  # of all prompts of one prefill pass, padding included


class ContextLengthError(UserError):
    """A prompt that does not fit the model's context."""


class StepOutput(NamedTuple):
    """One new token of a request (None at its end), and its output so far."""

    ticket: int
    token: int | None
    output: GenerationOutput


class Scheduler:
    """Decides which requests run, and which part of which prompt is read next.

    Does not touch the model. `chunk_size` is the maximum number of prompt tokens of one prefill
    pass; with None, a pass reads whole prompts.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        codes_per_image: int,
        max_seq_len: int,
        max_num_seqs: int,
        budget: CacheBudget,
    ) -> None:
        self.vocabulary, self.codes_per_image = vocabulary, codes_per_image
        self.max_seq_len, self.max_num_seqs, self.budget = max_seq_len, max_num_seqs, budget
        self.chunk_size: int | None = None
        self.waiting: deque[tuple[int, Request]] = deque()
        self.reading: list[Prefill] = []  # in order of arrival
        self.running: list[SequenceState] = []
        self._last_ticket = 0
        self._inboxes: dict[int, deque[StepOutput]] = {}  # by ticket
        self._oldest_is_next = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.reading or self.running)

    @property
    def demands(self) -> list[CacheDemand]:
        """The worst cases of all admitted sequences."""
        admitted = [prefill.admission for prefill in self.reading]
        return [a.demand for a in admitted] + [sequence.demand for sequence in self.running]

    def check(self, request: Request) -> None:
        """Raises UserError for a request that can never run.

        Its prompt is empty or fills the context, or its keys and values exceed the memory. This
        changes nothing and may be called from any thread.
        """
        if not request.prompt:
            raise UserError("The prompt is empty. It needs at least <s>.")
        if len(request.prompt) >= self.max_seq_len:
            raise ContextLengthError(
                f"The prompt has {len(request.prompt)} tokens; the model's context is "
                f"{self.max_seq_len}. Use less text or fewer images ({self.codes_per_image + 2} "
                "tokens each)."
            )
        self.budget.check(self._demand(request))

    # --- requests -------------------------------------------------------------------------

    def add(self, request: Request) -> int:
        """Queues a request and returns its ticket. Raises UserError if it can never run."""
        self.check(request)
        self._last_ticket += 1
        self.waiting.append((self._last_ticket, request))
        self._inboxes[self._last_ticket] = deque()
        return self._last_ticket

    def poll(self, ticket: int) -> Iterator[StepOutput]:
        """The outputs of a request since the last call."""
        inbox = self._inboxes.get(ticket)
        while inbox:
            step = inbox.popleft()
            if step.token is None:
                del self._inboxes[ticket]
            yield step

    def cancel(self, ticket: int) -> list[Prefill | SequenceState]:
        """Removes a request; returns what may have slots in the cache."""
        self._inboxes.pop(ticket, None)
        self.waiting = deque((t, request) for t, request in self.waiting if t != ticket)
        return self._remove(ticket)

    def _remove(self, ticket: int) -> list[Prefill | SequenceState]:
        prefills = [prefill for prefill in self.reading if prefill.admission.ticket == ticket]
        sequences = [sequence for sequence in self.running if sequence.ticket == ticket]
        self.reading = [prefill for prefill in self.reading if prefill not in prefills]
        self.running = [sequence for sequence in self.running if sequence not in sequences]
        return [*prefills, *sequences]

    # --- prompts --------------------------------------------------------------------------

    def admit(self) -> None:
        """Admits waiting requests as long as there is room for the next one.

        A request that ends before its first token (no room for its image) is finished here.
        """
        while self.waiting and len(self.reading) + len(self.running) < self.max_num_seqs:
            ticket, request = self.waiting[0]
            demand = self._demand(request)
            others = self.demands
            fits = self.budget.fits([*others, demand])  # evicts cached prefixes for them
            if others and not fits:
                return  # later ones wait as well, or a large request would never run
            self.waiting.popleft()
            grammar = self._make_grammar(request)
            if grammar.finish_reason is None:
                self.reading.append(Prefill(Admission(ticket, request, grammar, demand)))
            else:
                output = GenerationOutput([], grammar.finish_reason, grammar.image_skipped_reason())
                self._deliver(StepOutput(ticket, None, output))

    def next_parts(self) -> list[PrefillPart]:
        """What the next prefill pass reads: whole remainders, or a part of one prompt.

        In chunks, the shortest remainder is read first, so that short prompts do not wait for long
        ones. After a pass that overtook the oldest request, the next pass belongs to that request.
        """
        budget, order = self.chunk_size or PREFILL_TOKENS, self.reading
        if self.chunk_size is not None:
            order = sorted(order, key=lambda prefill: prefill.remaining)
            order = self.reading[:1] if self._oldest_is_next else order
        parts: list[PrefillPart] = []
        longest = 0
        for prefill in order:
            longest = max(longest, prefill.remaining)
            if parts and longest * (len(parts) + 1) > budget:
                break
            count = prefill.remaining
            if self.chunk_size is not None:
                count = min(count, self.chunk_size)
            parts.append(PrefillPart(prefill, count))
        return parts

    @property
    def can_finish_a_prompt(self) -> bool:
        """Whether the next prefill pass reads a prompt to its end."""
        return any(part.num_tokens == part.prefill.remaining for part in self.next_parts())

    def have_read(self, parts: Sequence[PrefillPart]) -> None:
        """Records a prefill pass, which the order of the following ones depends on."""
        self._oldest_is_next = bool(self.reading) and self.reading[0] not in (
            part.prefill for part in parts
        )

    def start(self, sequence: SequenceState) -> None:
        """Moves a sequence with a complete prompt to the running ones."""
        self._remove(sequence.ticket)
        self.running.append(sequence)

    # --- tokens ---------------------------------------------------------------------------

    def append(self, sequence: SequenceState, token: int) -> None:
        """Records the next token of a running sequence."""
        sequence.append(token)
        self._deliver(StepOutput(sequence.ticket, token, sequence.output))

    def finish(self, sequence: SequenceState) -> None:
        """Removes a sequence whose grammar has ended."""
        sequence.output.finish_reason = sequence.grammar.finish_reason or ""
        sequence.output.note = sequence.grammar.image_skipped_reason()
        self._remove(sequence.ticket)
        self._deliver(StepOutput(sequence.ticket, None, sequence.output))

    def fail(self, admitted: Prefill | SequenceState, error: str) -> None:
        """Ends an admitted request with an error message."""
        if isinstance(admitted, Prefill):
            ticket, output = admitted.admission.ticket, GenerationOutput()
        else:
            ticket, output = admitted.ticket, admitted.output
        output.finish_reason, output.error = "error", error
        self._remove(ticket)
        self._deliver(StepOutput(ticket, None, output))

    def _demand(self, request: Request) -> CacheDemand:
        return cache_demand(request, self.vocabulary, self.codes_per_image, self.max_seq_len)

    def _make_grammar(self, request: Request) -> DecodingGrammar:
        limit = min(request.options.max_new_tokens, self.max_seq_len - len(request.prompt))
        grammar = DecodingGrammar(self.vocabulary, request.options, self.codes_per_image, limit)
        grammar.start()
        return grammar

    def _deliver(self, step: StepOutput) -> None:
        if step.ticket in self._inboxes:  # not cancelled
            self._inboxes[step.ticket].append(step)
