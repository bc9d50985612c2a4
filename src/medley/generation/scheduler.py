"""Scheduler: queues of waiting and running sequences, and the outputs that callers have not read.

Waiting requests are admitted in order as long as fewer than `max_num_seqs` sequences run; the
prompts of one prefill pass have at most `PREFILL_TOKENS` tokens together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from medley.data.vocabulary import Vocabulary
from medley.errors import UserError
from medley.generation.grammar import DecodingGrammar
from medley.generation.sequence import Admission, GenerationOutput, Request, SequenceState

PREFILL_TOKENS = 8192  # of all prompts of one prefill pass, padding included


class StepOutput(NamedTuple):
    """One new token of a request (None at its end), and its output so far."""

    ticket: int
    token: int | None
    output: GenerationOutput


class Scheduler:
    """Decides which requests run. Does not touch the model."""

    def __init__(
        self, vocabulary: Vocabulary, codes_per_image: int, max_seq_len: int, max_num_seqs: int
    ) -> None:
        self.vocabulary, self.codes_per_image = vocabulary, codes_per_image
        self.max_seq_len, self.max_num_seqs = max_seq_len, max_num_seqs
        self.waiting: deque[tuple[int, Request]] = deque()
        self.running: list[SequenceState] = []
        self._last_ticket = 0
        self._inboxes: dict[int, deque[StepOutput]] = {}  # by ticket

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def has_room(self) -> bool:
        return len(self.running) < self.max_num_seqs

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises UserError for a prompt that is empty or fills the context."""
        if not prompt:
            raise UserError("The prompt is empty. It needs at least <s>.")
        if len(prompt) >= self.max_seq_len:
            raise UserError(
                f"The prompt has {len(prompt)} tokens; the model's context is {self.max_seq_len}. "
                f"Use less text or fewer images ({self.codes_per_image + 2} tokens each)."
            )

    # --- requests -------------------------------------------------------------------------

    def add(self, request: Request) -> int:
        """Queues a request and returns its ticket. Raises UserError for an invalid prompt."""
        self.check_prompt(request.prompt)
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

    def cancel(self, ticket: int) -> list[SequenceState]:
        """Removes a request; returns its sequence if it was running."""
        self._inboxes.pop(ticket, None)
        self.waiting = deque((t, request) for t, request in self.waiting if t != ticket)
        removed = [sequence for sequence in self.running if sequence.ticket == ticket]
        for sequence in removed:
            self.running.remove(sequence)
        return removed

    # --- steps ----------------------------------------------------------------------------

    def schedule(self) -> list[Admission]:
        """The next requests to prefill in one pass; empty if none can be admitted.

        A request that ends before its first token (no room for its image) is finished here.
        """
        admitted: list[Admission] = []
        while self.waiting and len(self.running) + len(admitted) < self.max_num_seqs:
            lengths = [len(a.request.prompt) for a in admitted]
            longest = max([*lengths, len(self.waiting[0][1].prompt)])
            if admitted and longest * (len(admitted) + 1) > PREFILL_TOKENS:
                break
            ticket, request = self.waiting.popleft()
            grammar = self._make_grammar(request)
            if grammar.finish_reason is None:
                admitted.append(Admission(ticket, request, grammar))
            else:
                output = GenerationOutput([], grammar.finish_reason, grammar.image_skipped_reason())
                self._deliver(StepOutput(ticket, None, output))
        return admitted

    def start(self, sequence: SequenceState) -> None:
        """Adds a prefilled sequence to the running ones."""
        self.running.append(sequence)

    def append(self, sequence: SequenceState, token: int) -> None:
        """Records the next token of a running sequence."""
        sequence.append(token)
        self._deliver(StepOutput(sequence.ticket, token, sequence.output))

    def finish(self, sequence: SequenceState) -> None:
        """Removes a sequence whose grammar has ended."""
        sequence.output.finish_reason = sequence.grammar.finish_reason or ""
        sequence.output.note = sequence.grammar.image_skipped_reason()
        self.running.remove(sequence)
        self._deliver(StepOutput(sequence.ticket, None, sequence.output))

    def _make_grammar(self, request: Request) -> DecodingGrammar:
        limit = min(request.options.max_new_tokens, self.max_seq_len - len(request.prompt))
        grammar = DecodingGrammar(self.vocabulary, request.options, self.codes_per_image, limit)
        grammar.start()
        return grammar

    def _deliver(self, step: StepOutput) -> None:
        if step.ticket in self._inboxes:  # not cancelled
            self._inboxes[step.ticket].append(step)
