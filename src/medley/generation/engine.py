"""The generation engine: continuous batching with a scheduler, a model runner and a sampler.

Sequences join when there is room and leave when they end or are cancelled. Each has its own options
and grammar; one decode step is one forward pass over all of them. If memory runs out, one request
ends with an error and the others continue.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch

from medley.data.vocabulary import Vocabulary
from medley.generation.cache_budget import CacheBudget
from medley.generation.decoder import Decoder
from medley.generation.grammar import TokenMasks
from medley.generation.model_runner import ModelRunner, execution_device
from medley.generation.out_of_memory import is_out_of_memory, release_unused_memory
from medley.generation.sampler import Sampler
from medley.generation.scheduler import Scheduler, StepOutput
from medley.generation.sequence import (
    GenerationOutput,
    Prefill,
    PrefillPart,
    Request,
    SequenceState,
    Window,
)
from medley.generation.speculation import Speculation, Speculator

MAX_NUM_SEQS = 32  # sequences that run at the same time, by default
# Prompt tokens between two decode steps: enough to use the device well, and few enough that running
# and new requests hardly wait.
CHUNK_SIZES = {"cpu": 128}
ACCELERATOR_CHUNK_SIZE = 512
MAX_PREFILL_PASSES = 2  # between two decode steps: a part of a long prompt, and short ones


class Engine:
    """Continues prompts with a decoder. Not thread-safe.

    `fuse` joins the weights of the layers for faster decode steps if they are plain; do not use it
    on a decoder that is being trained. `codebook_size` is the VQGAN's, if it has fewer vectors than
    the vocabulary has image tokens: the other image tokens are never sampled.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        codes_per_image: int,
        fuse: bool = False,
        max_num_seqs: int = MAX_NUM_SEQS,
        codebook_size: int | None = None,
    ) -> None:
        self.decoder, self.vocabulary = decoder, vocabulary
        device = execution_device(decoder)
        masks = TokenMasks(vocabulary, decoder.config.vocab_size, device, codebook_size)
        self.runner = ModelRunner(decoder, masks, fuse, max_num_seqs)
        self.budget = CacheBudget(self.runner.bytes_per_token, self.runner.prefixes)
        self.scheduler = Scheduler(
            vocabulary, codes_per_image, self.runner.max_seq_len, max_num_seqs, self.budget
        )
        self.sampler = Sampler(masks)
        is_float32 = decoder.model.embed_tokens.weight.dtype == torch.float32
        self.speculator = Speculator(codes_per_image, is_float32 and device.type == "cpu")
        self._prefill_passes = 0  # since the last decode step

    @property
    def max_seq_len(self) -> int:
        """The model's context: maximum number of tokens of prompt and output."""
        return self.runner.max_seq_len

    @property
    def max_num_seqs(self) -> int:
        """Maximum number of sequences that run at the same time."""
        return self.scheduler.max_num_seqs

    def set_max_num_seqs(self, max_num_seqs: int) -> None:
        self.scheduler.max_num_seqs = max_num_seqs
        self.runner.set_max_num_seqs(max_num_seqs)

    def set_cache_bytes(self, max_bytes: int | None) -> None:
        """Limits the memory of keys and values. Requests wait until their worst case fits."""
        self.budget.max_bytes = max_bytes

    def set_chunk_size(self, chunk_size: int | None = None) -> None:
        """Reads at most `chunk_size` prompt tokens between two decode steps (default by device).

        Long prompts are read in parts then, and new requests hardly wait for them. An engine whose
        chunk size was never set reads all waiting prompts first, which gives the best throughput.
        """
        if chunk_size is None:
            chunk_size = CHUNK_SIZES.get(self.runner.device.type, ACCELERATOR_CHUNK_SIZE)
        self.scheduler.chunk_size = chunk_size

    def set_speculation(self, setting: Speculation) -> None:
        """How many codes of an image a pass draws at most; the output does not depend on it."""
        self.speculator.set(setting)

    @contextmanager
    def speculation(self, setting: Speculation) -> Iterator[None]:
        """`set_speculation` for one block."""
        before = self.speculator.setting
        self.set_speculation(setting)
        try:
            yield
        finally:
            self.set_speculation(before)

    def keep_idle_cache(self) -> None:
        """Keeps memory for one guided sequence while no request runs, instead of freeing it."""
        self.runner.cache.idle_bytes = self.runner.guided_sequence_bytes

    # --- one request ----------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises UserError for a request that can never run. Thread-safe."""
        self.scheduler.check(request)

    def submit(self, request: Request) -> int:
        """Queues a request and returns its ticket. Raises UserError if it can never run."""
        return self.scheduler.add(request)

    @torch.inference_mode()  # the cache contains inference tensors
    def cancel(self, ticket: int) -> None:
        """Removes a request and frees its slots. Does nothing if the request has ended."""
        for admitted in self.scheduler.cancel(ticket):
            self.runner.release(admitted)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def poll(self, ticket: int) -> Iterator[StepOutput]:
        """The outputs of a request since the last call. Does not run the model."""
        return self.scheduler.poll(ticket)

    # --- many requests --------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], batch_size: int = MAX_NUM_SEQS
    ) -> list[GenerationOutput]:
        """Outputs in the order of the requests.

        Raises UserError for a request that can never run before the first step.
        """
        for request in requests:
            self.check(request)
        outputs = [GenerationOutput() for _ in requests]
        for index, _, output in self.run(requests, batch_size):
            outputs[index] = output
        return outputs

    def run(
        self, requests: Iterable[Request], batch_size: int = MAX_NUM_SEQS
    ) -> Generator[tuple[int, int | None, GenerationOutput], None, None]:
        """Yields (number of the request, new token or None at its end, its output so far).

        Requests are taken from the iterable as there is room for them. Closing the generator
        cancels the requests that have not ended.
        """
        self.set_max_num_seqs(max(self.max_num_seqs, batch_size))
        remaining = enumerate(requests)
        numbers: dict[int, int] = {}  # of the requests in progress, by ticket
        try:
            while True:
                for number, request in islice(remaining, batch_size - len(numbers)):
                    numbers[self.submit(request)] = number
                if not numbers:
                    return
                self.step()
                for ticket, number in list(numbers.items()):
                    for _, token, output in self.poll(ticket):
                        if token is None:
                            del numbers[ticket]
                        yield number, token, output
        finally:
            for ticket in numbers:
                self.cancel(ticket)

    # --- steps ----------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Reads prompts of admitted requests, or gives every running sequence its next token.

        With a chunk size, a step is one prefill pass or one decode step, and they alternate while
        both have work. While all sequences are inside of images, a step may give them several
        tokens.
        """
        try:
            if self.scheduler.chunk_size is None:
                while self._read_prompts():
                    pass
            elif not self._must_decode() and self._read_prompts():
                return
            self._prefill_passes = 0
            self._decode_with_memory()
        except BaseException:
            self.runner.cache.suspect()
            raise

    def _must_decode(self) -> bool:
        """Whether running sequences come before prompts.

        After a part of a long prompt, prompts that end in the next pass come first: they get their
        first token soon, and the running sequences wait for two short passes at most.
        """
        self.scheduler.admit()
        if not self.scheduler.running or not self._prefill_passes:
            return False
        if self._prefill_passes >= MAX_PREFILL_PASSES:
            return True
        return not self.scheduler.can_finish_a_prompt

    # --- prompts --------------------------------------------------------------------------

    def _read_prompts(self) -> bool:
        """One prefill pass, and the first tokens after it; False if there is nothing to read."""
        self.scheduler.admit()
        parts = self.scheduler.next_parts()
        if not parts:
            return False
        self._prefill_passes += 1
        self.runner.cache.max_length = max(demand.length for demand in self.scheduler.demands)
        self.runner.cache.max_bytes = self.budget.cache_bytes
        first_tokens = self._read(parts)
        self.scheduler.have_read(parts)
        for sequence, _ in first_tokens:
            self.scheduler.start(sequence)
        self._append([sequence for sequence, _ in first_tokens], [[t] for _, t in first_tokens])
        return True

    def _read(self, parts: Sequence[PrefillPart]) -> list[tuple[SequenceState, int]]:
        """A prefill pass; the sequences whose prompts are complete, with their first tokens.

        If memory runs out, there is a pass for each prompt, and those that fail end.
        """
        try:
            sequences = self.runner.prefill(parts)
            windows = [Window(sequence, [], 1) for sequence in sequences]
            tokens = self.sampler(windows, None, self.runner.logits)
            self.runner.advance_prefills(parts)
            return [(s, own[0]) for s, own in zip(sequences, tokens, strict=True)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release_unused_memory(self.runner.device)
        if len(parts) == 1:
            self._fail(parts[0].prefill, "its prompt was read")
            return []
        return [started for part in parts for started in self._read([part])]

    # --- tokens ---------------------------------------------------------------------------

    def _decode_with_memory(self) -> None:
        """A decode step. While memory runs out, the longest sequence ends and it is repeated."""
        while self.scheduler.running:
            try:
                sequences, tokens = self._decode()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            else:  # not repeated: the branches have grown
                self._append(sequences, tokens)
                return
            release_unused_memory(self.runner.device)
            longest = max(self.scheduler.running, key=lambda s: sum(b.length for b in s.branches))
            self._fail(longest, "it was generating")

    def _decode(self) -> tuple[list[SequenceState], list[list[int]]]:
        """The running sequences, and the next tokens of each."""
        running = list(self.scheduler.running)
        if not self.speculator.is_on and (steps := self.runner.graph_steps(running)):
            return running, self.runner.decode_images(running, steps, self.sampler.image_tokens)
        start = time.thread_time()  # other load does not count
        windows = self.speculator.windows(running)
        states = self.runner.decode(windows)
        drawn = self.sampler(windows, states, self.runner.logits)
        accepted = self.speculator.accept(windows, drawn, time.thread_time() - start)
        self.runner.advance(windows, accepted)
        return running, accepted

    def _append(self, sequences: Sequence[SequenceState], tokens: Sequence[Sequence[int]]) -> None:
        """Appends new tokens to each sequence; opens and closes guidance branches.

        The end-of-image token must follow the last code of an image: it needs no pass.
        """
        beginning: list[SequenceState] = []
        for sequence, own in zip(sequences, tokens, strict=True):
            for token in own:
                self.scheduler.append(sequence, token)
            if own[-1] == self.vocabulary.begin_image and sequence.request.options.uses_cfg:
                beginning.append(sequence)
            elif sequence.grammar.in_image and sequence.grammar.forced_token() is not None:
                self.scheduler.append(sequence, self.vocabulary.end_image)
                self.runner.close_cfg_branches(sequence)
        for sequence in beginning:
            if sequence.grammar.finish_reason is None:
                self._open_cfg_branches(sequence)
        for sequence in sequences:
            if sequence.grammar.finish_reason is not None:
                self._finish(sequence)

    def _open_cfg_branches(self, sequence: SequenceState) -> None:
        try:
            self.runner.open_cfg_branches(sequence)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release_unused_memory(self.runner.device)
        self._fail(sequence, "it began an image")

    # --- ends -----------------------------------------------------------------------------

    def _finish(self, sequence: SequenceState) -> None:
        if sequence.request.cache_prefix:
            self._cache_prefix(sequence)
        self.scheduler.finish(sequence)
        self.runner.release(sequence)

    def _cache_prefix(self, sequence: SequenceState) -> None:
        """Keeps the keys and values of a sequence if there is memory for them."""
        others = [s.demand for s in self.scheduler.running if s is not sequence]
        others += [prefill.admission.demand for prefill in self.scheduler.reading]
        if self.budget.fits(others, sequence.full.length * self.budget.bytes_per_token):
            try:
                self.runner.cache_prefix(sequence)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise

    def _fail(self, admitted: Prefill | SequenceState, action: str) -> None:
        """Ends one request because memory ran out."""
        self.scheduler.fail(
            admitted,
            f"The request was ended: {self.runner.device} ran out of memory while {action}. Retry "
            "when fewer requests run, or lower max_new_tokens, --max_num_seqs or "
            "--gpu_memory_utilization.",
        )
        self.runner.release(admitted)
