"""The generation engine: continuous batching with a scheduler, a model runner and a sampler.

Sequences join when there is room and leave when they end or are cancelled. Each has its own options
and grammar; one step is one forward pass over all of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice

import torch

from medley.data.vocabulary import Vocabulary
from medley.generation.decoder import Decoder
from medley.generation.grammar import TokenMasks
from medley.generation.model_runner import ModelRunner, execution_device
from medley.generation.sampler import Sampler
from medley.generation.scheduler import Scheduler, StepOutput
from medley.generation.sequence import GenerationOutput, Request, SequenceState

MAX_NUM_SEQS = 32  # sequences that run at the same time, by default


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
        self.scheduler = Scheduler(
            vocabulary, codes_per_image, self.runner.max_seq_len, max_num_seqs
        )
        self.sampler = Sampler(masks)

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

    # --- one request ----------------------------------------------------------------------

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises UserError for a prompt that is empty or fills the context."""
        self.scheduler.check_prompt(prompt)

    def submit(self, request: Request) -> int:
        """Queues a request and returns its ticket. Raises UserError for an invalid prompt."""
        return self.scheduler.add(request)

    @torch.inference_mode()  # the cache contains inference tensors
    def cancel(self, ticket: int) -> None:
        """Removes a request and frees its slots. Does nothing if the request has ended."""
        for sequence in self.scheduler.cancel(ticket):
            self.runner.release(sequence)

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

        Raises UserError for an invalid prompt before the first step.
        """
        for request in requests:
            self.check_prompt(request.prompt)
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
        """Admits waiting requests and gives every running sequence its next token.

        While all sequences are inside of images, it may give them several tokens.
        """
        while admissions := self.scheduler.schedule():
            for sequence in self.runner.prefill(admissions):
                self.scheduler.start(sequence)
        running = self.scheduler.running
        if not running:
            return
        must_admit = self.scheduler.waiting and self.scheduler.has_room
        if not must_admit and (steps := self.runner.graph_steps(running)):
            tokens = self.runner.decode_images(running, steps, self.sampler.image_tokens)
            for sequence, own in zip(running, tokens, strict=True):
                for token in own:
                    self.scheduler.append(sequence, token)
            return
        states = self.runner.decode(running)
        self._append(self.sampler(running, states, self.runner.logits))
        for sequence in [s for s in running if s.grammar.finish_reason is not None]:
            self._finish(sequence)

    def _append(self, tokens: Sequence[int]) -> None:
        """Appends one token to each running sequence; opens and closes guidance branches."""
        beginning: list[SequenceState] = []
        for sequence, token in zip(self.scheduler.running, tokens, strict=True):
            self.scheduler.append(sequence, token)
            if token == self.vocabulary.begin_image and sequence.request.options.uses_cfg:
                beginning.append(sequence)
            elif token == self.vocabulary.end_image:
                self.runner.close_cfg_branches(sequence)
        self.runner.open_cfg_branches([s for s in beginning if s.grammar.finish_reason is None])

    def _finish(self, sequence: SequenceState) -> None:
        if sequence.request.cache_prefix:
            self.runner.cache_prefix(sequence)
        self.scheduler.finish(sequence)
        self.runner.release(sequence)
