"""A model that serves concurrent requests: one thread owns its engine, requests join and leave.

The engine is not thread-safe; only `_run` uses it. Prompts are converted to token ids in other
threads (`read_prompt`), because a long text or an image would hold up all running requests. Events
reach a request through a callback that is called in the engine's thread. Every submitted request
receives a last event or an exception, whatever happens in the thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from medley.data.document import Document
from medley.errors import UserError
from medley.generation import GenerationOptions, Request
from medley.generation.engine import MAX_NUM_SEQS
from medley.inference.interface import Prompt
from medley.inference.model import Model
from medley.inference.response import StreamEvent
from medley.inference.stream_decoder import StreamDecoder
from medley.serving.engine_calls import EngineCalls, Result
from medley.serving.generated_images import GeneratedImages, content_hash
from medley.serving.limits import Limits, QueueFullError, RequestError

log = logging.getLogger("medley.serving")
EventCallback = Callable[[StreamEvent | Exception], None]
MAX_RETRY_AFTER = 60  # seconds; clients give up if they are told to wait longer
FAST_CHARACTERS = 32_768  # of a text that takes a few milliseconds to read
MAX_FAILURES = 3  # consecutive failures after which the engine is reported as failing


@dataclass(frozen=True)
class TokenIds:
    """A prompt that is encoded already."""

    ids: tuple[int, ...]


ModelInput = Prompt | Document | TokenIds


@dataclass(eq=False)
class GenerationJob:
    """One response to a prompt.

    Attributes:
        on_event: called with each event; last with an exception, or an event with the response
        deadline: time (`time.monotonic`) at which the job is ended
        request: token ids of the prompt, once it was read
        started_at: time at which the engine took the request
        done: whether the job was cancelled or has ended
    """

    on_event: EventCallback
    preview_every: int = 0
    deadline: float = float("inf")
    request: Request | None = None
    started_at: float = 0.0
    generated_tokens: int = 0
    ticket: int | None = None
    decoder: StreamDecoder | None = None
    done: bool = False


class EngineWorker:
    """A served model. `max_num_seqs` requests run at once; others wait.

    At most `chunk_size` prompt tokens are read between two decode steps (default by device).
    """

    def __init__(
        self,
        name: str,
        model: Model,
        limits: Limits,
        max_num_seqs: int = MAX_NUM_SEQS,
        chunk_size: int | None = None,
        generated_images: GeneratedImages | None = None,
    ) -> None:
        self.name, self.model, self.limits = name, model, limits
        self.generated_images = generated_images or GeneratedImages()
        model.engine.set_max_num_seqs(max_num_seqs)
        model.engine.set_chunk_size(chunk_size)
        model.engine.keep_idle_cache()
        self.created = int(time.time())
        self.generated_tokens = 0  # since the start
        # Upper bound of the text that fits the context: every token is the longest one.
        self.max_characters = model.engine.max_seq_len * model.text_tokenizer.longest_token
        # Usual texts do not wait for the images and the very long texts of others.
        self._fast_reader = ThreadPoolExecutor(1, f"medley-{name}-texts")
        self._slow_reader = ThreadPoolExecutor(1, f"medley-{name}-images")
        self._reading = 0  # jobs whose prompt is being read
        self._queue: deque[GenerationJob] = deque()
        self._running: list[GenerationJob] = []
        self._wake = threading.Condition()
        self._calls = EngineCalls()
        self._stop_reason: Exception | None = None  # new requests fail with it
        self._failures = 0  # of the engine, since the last complete response
        self._mean_seconds = 1.0  # moving average of a job's running time
        self._thread = threading.Thread(target=self._run, name=f"medley-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends all requests with an error, and the thread."""
        with self._wake:
            self._stop_reason = RequestError("The server is shutting down.", 503)
            self._wake.notify()
        for reader in (self._fast_reader, self._slow_reader):
            reader.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout=30)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_failing(self) -> bool:
        """Whether the engine has failed repeatedly, and completed no response in between."""
        return self._failures >= MAX_FAILURES

    @property
    def max_num_seqs(self) -> int:
        return self.model.engine.max_num_seqs

    @property
    def waiting(self) -> int:
        return self._reading + len(self._queue) + len(self._calls)

    @property
    def running(self) -> int:
        return len(self._running)

    def remember_image(self, image: Image.Image, codes: Sequence[int]) -> None:
        """Stores the image codes of a generated image, for the case that a client sends it back."""
        token_space = self.model.image_tokenizer.fingerprint
        self.generated_images.add(token_space, content_hash(image), codes)

    # --- prompts --------------------------------------------------------------------------

    def enter(self, count: int) -> None:
        """Takes `count` places in the queue, before the prompt is read. Then call `submit`.

        Raises QueueFullError if too many jobs wait, RequestError if the thread has ended.
        """
        with self._wake:
            self.check_alive()
            ahead = self.waiting + len(self._running)
            if ahead + count > self.max_num_seqs + self.limits.max_queue:
                seconds = (1 + self.waiting / self.max_num_seqs) * self._mean_seconds
                retry_after = min(MAX_RETRY_AFTER, max(1, round(seconds)))
                raise QueueFullError(self.waiting, retry_after)
            self._reading += count

    def leave(self, count: int) -> None:
        """Gives back places of `enter` whose jobs were not submitted."""
        with self._wake:
            self._reading -= count

    def read_prompt(
        self, prompt: ModelInput, options: GenerationOptions | None, raw_prompt: bool = False
    ) -> Future[tuple[int, ...]]:
        """Starts to convert a prompt to token ids. Does not keep the prompt.

        Without `options`, nothing is to be generated, and the ids may exceed the model's context.
        The future raises UserError for a prompt that the model cannot take.
        """
        reader = self._slow_reader if _is_slow_to_read(prompt) else self._fast_reader
        try:
            return reader.submit(_read_prompt, self.model, prompt, options, raw_prompt)
        except RuntimeError:  # the readers are shut down
            self.check_alive()
            raise

    def call(self, function: Callable[[Model], Result]) -> Future[Result]:
        """Runs a function of the model in the engine's thread, between two steps.

        A function takes as long as one forward pass: running requests wait for it.
        """
        with self._wake:
            self.check_alive()
            future = self._calls.add(function)
            self._wake.notify()
        return future

    # --- jobs -----------------------------------------------------------------------------

    def submit(self, job: GenerationJob) -> None:
        """Queues a job at a place of `enter`. Raises RequestError if the thread has ended."""
        with self._wake:
            self._reading -= 1
            self.check_alive()
            self._queue.append(job)
            self._wake.notify()

    def check_alive(self) -> None:
        """Raises RequestError if the thread has ended or is about to end."""
        if self._stop_reason is not None:  # A shared exception would accumulate tracebacks.
            raise RequestError(str(self._stop_reason), 503)

    def queue_position(self, job: GenerationJob) -> int | None:
        """Number of jobs ahead in the queue; None for a job that does not wait."""
        with self._wake:
            return self._queue.index(job) if job in self._queue else None

    def cancel(self, job: GenerationJob) -> None:
        """Ends a job before the next decode step. Has no effect on a job that has ended."""
        with self._wake:
            job.done = True
            if job in self._queue:
                self._queue.remove(job)
            self._wake.notify()

    # --- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        reason: Exception = RequestError(
            f"Model {self.name} is unavailable: its engine thread stopped after an error (see the "
            "server log).",
            503,
        )
        try:
            while self._stop_reason is None:
                with self._wake:
                    while not (self._queue or self._running or self._calls or self._stop_reason):
                        self._wake.wait()
                self._step()
            reason = self._stop_reason
        except BaseException:  # for example a device that no longer responds
            log.exception("%s: the engine thread stopped", self.name)
        finally:
            with self._wake:
                self._stop_reason = reason
                unfinished = [*self._running, *self._queue]
                self._queue.clear()
                self._calls.fail(reason)
            for job in unfinished:
                self._send_last(job, reason)

    def _step(self) -> None:
        """Removes ended jobs, starts waiting ones, and runs one step of the engine."""
        self._calls.run_next(self.model)
        now, timeout = time.monotonic(), self.limits.request_timeout
        with self._wake:
            late = [job for job in (*self._running, *self._queue) if now > job.deadline]
        for job in late:
            self._finish(
                job, RequestError(f"Timeout: not finished after {timeout:.0f} s (the limit).", 408)
            )
        for job in [job for job in self._running if job.done]:
            self._release(job)
        while len(self._running) < self.max_num_seqs:
            with self._wake:
                if not self._queue:
                    break
                job = self._queue.popleft()
                self._running.append(job)
            self._start_job(job)
        if not self._running:
            return
        try:
            self.model.engine.step()
        except Exception as error:  # For example out of memory: the server continues without them.
            log.exception("%s: %d running requests failed", self.name, len(self._running))
            self._failures += 1
            # An engine error is the server's fault, even if the engine raises a UserError.
            own = RequestError(str(error), 500) if isinstance(error, UserError) else error
            for job in list(self._running):
                self._finish(job, own)
            return
        for job in list(self._running):
            self._deliver(job)

    def _start_job(self, job: GenerationJob) -> None:
        """Submits a job to the engine; ends it if its prompt is invalid."""
        if job.done:
            self._release(job)
            return
        assert job.request is not None
        try:
            job.ticket = self.model.engine.submit(job.request)
            job.decoder = StreamDecoder(self.model, job.request, job.preview_every)
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("%s: a request could not be started", self.name)
            self._finish(job, error)
            return
        job.started_at = time.monotonic()

    def _deliver(self, job: GenerationJob) -> None:
        """Sends the new events of a job."""
        assert job.ticket is not None and job.decoder is not None
        try:
            for _, token, output in self.model.engine.poll(job.ticket):
                self.generated_tokens += token is not None
                job.generated_tokens += token is not None
                if output.error is not None:
                    self._failures += 1
                    log.error("%s: a request failed. %s", self.name, output.error)
                    self._finish(job, RequestError(output.error, 503))
                    return
                for event in job.decoder(token, output):
                    if event.response is not None:
                        seconds = time.monotonic() - job.started_at
                        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
                        self._failures = 0
                        self._finish(job, event)
                        return
                    job.on_event(event)
        except Exception as error:  # Other jobs are not affected.
            log.exception("%s: a response could not be delivered", self.name)
            self._finish(job, error)

    def _finish(self, job: GenerationJob, last: StreamEvent | Exception) -> None:
        """Sends the last event first: releasing a sequence may fail on a faulty device."""
        self._send_last(job, last)
        self._release(job)

    def _send_last(self, job: GenerationJob, last: StreamEvent | Exception) -> None:
        if not job.done:
            job.done = True
            try:
                job.on_event(last)
            except RuntimeError:  # The event loop of the request is closed.
                log.warning("%s: the end of a response has no recipient", self.name)

    def _release(self, job: GenerationJob) -> None:
        """Removes a job, and its sequence from the engine."""
        with self._wake:
            if job in self._running:
                self._running.remove(job)
            elif job in self._queue:
                self._queue.remove(job)
        ticket, job.ticket, job.decoder = job.ticket, None, None
        if ticket is not None:
            self.model.engine.cancel(ticket)


def _is_slow_to_read(prompt: ModelInput) -> bool:
    parts: Sequence[object] = []
    if isinstance(prompt, Document):
        parts = [part for turn in prompt.turns for part in turn.parts]
    elif not isinstance(prompt, TokenIds):
        parts = prompt
    texts = [part for part in parts if isinstance(part, str)]
    return len(texts) < len(parts) or sum(map(len, texts)) > FAST_CHARACTERS


def _read_prompt(
    model: Model, prompt: ModelInput, options: GenerationOptions | None, raw_prompt: bool
) -> tuple[int, ...]:
    """Token ids of a prompt. Raises UserError for a prompt that the model cannot take."""
    if options is not None and options.mode != "text":
        model.image_tokenizer.require_decoder()
    if isinstance(prompt, TokenIds):
        ids = prompt.ids
    else:
        ids = tuple(model.encode_prompt(prompt, raw_prompt))
    if options is not None:
        model.engine.check(Request(ids, options))
    return ids
