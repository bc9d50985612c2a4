"""A model that serves concurrent requests: one thread owns its engine, requests join and leave.

The engine is not thread-safe; only `_run` uses it. Events reach a request through a callback that
is called in that thread. Every submitted request receives a last event or an exception, whatever
happens in the thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from medley.data.document import Document
from medley.errors import UserError
from medley.generation import GenerationOptions, Request
from medley.generation.engine import MAX_NUM_SEQS
from medley.inference.interface import Prompt
from medley.inference.model import Model
from medley.inference.response import StreamEvent
from medley.inference.stream_decoder import StreamDecoder
from medley.serving.limits import Limits, QueueFullError, RequestError

log = logging.getLogger("medley.serving")
EventCallback = Callable[[StreamEvent | Exception], None]
PREFILLS_PER_STEP = 4  # Prompts read between two decode steps; running requests wait for them.
MAX_RETRY_AFTER = 60  # seconds; clients give up if they are told to wait longer


@dataclass(eq=False)
class GenerationJob:
    """One response to a prompt.

    Attributes:
        prompt: None once it was read, since its images are large
        on_event: called with each event; last with an exception, or an event with the response
        index: number of the response, which selects its random numbers together with the seed
        raw_prompt: continue the prompt itself, without an end-of-turn token
        deadline: time (`time.monotonic`) at which the job is ended
        started_at: time at which the prompt was read
        done: whether the job was cancelled or has ended
    """

    prompt: Prompt | Document | None
    options: GenerationOptions
    on_event: EventCallback
    index: int = 0
    preview_every: int = 0
    raw_prompt: bool = False
    deadline: float = float("inf")
    started_at: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    ticket: int | None = None
    decoder: StreamDecoder | None = None
    done: bool = False


class EngineWorker:
    """A served model. `max_num_seqs` requests run at once; others wait."""

    def __init__(
        self, name: str, model: Model, limits: Limits, max_num_seqs: int = MAX_NUM_SEQS
    ) -> None:
        self.name, self.model, self.limits = name, model, limits
        model.engine.set_max_num_seqs(max_num_seqs)
        self.created = int(time.time())
        self.generated_tokens = 0  # since the start
        # Upper bound of the text that fits the context: every token is the longest one.
        self.max_characters = model.engine.max_seq_len * model.text_tokenizer.longest_token
        self._queue: deque[GenerationJob] = deque()
        self._running: list[GenerationJob] = []
        self._wake = threading.Condition()
        self._stop_reason: Exception | None = None  # new requests fail with it
        self._mean_seconds = 1.0  # moving average of a job's running time
        self._thread = threading.Thread(target=self._run, name=f"medley-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends all requests with an error, and the thread."""
        with self._wake:
            self._stop_reason = RequestError("The server is shutting down.", 503)
            self._wake.notify()
        self._thread.join(timeout=30)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def max_num_seqs(self) -> int:
        return self.model.engine.max_num_seqs

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, job: GenerationJob) -> None:
        """Queues a job.

        Raises QueueFullError if too many jobs wait, RequestError if the thread has ended.
        """
        with self._wake:
            if self._stop_reason is not None:  # A shared exception would accumulate tracebacks.
                raise RequestError(str(self._stop_reason), 503)
            ahead = len(self._queue) + len(self._running)
            if ahead >= self.max_num_seqs + self.limits.max_queue:
                seconds = (1 + len(self._queue) / self.max_num_seqs) * self._mean_seconds
                retry_after = min(MAX_RETRY_AFTER, max(1, round(seconds)))
                raise QueueFullError(len(self._queue), retry_after)
            self._queue.append(job)
            self._wake.notify()

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
                    while not (self._queue or self._running or self._stop_reason):
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
            for job in unfinished:
                self._send_last(job, reason)

    def _step(self) -> None:
        """Removes ended jobs, starts waiting ones, and decodes one token for each sequence."""
        now, timeout = time.monotonic(), self.limits.request_timeout
        with self._wake:
            late = [job for job in (*self._running, *self._queue) if now > job.deadline]
        for job in late:
            self._finish(
                job, RequestError(f"Timeout: not finished after {timeout:.0f} s (the limit).", 408)
            )
        for job in [job for job in self._running if job.done]:
            self._release(job)
        for _ in range(min(self.max_num_seqs - len(self._running), PREFILLS_PER_STEP)):
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
        try:
            if job.options.mode != "text":
                self.model.image_tokenizer.require_decoder()
            assert job.prompt is not None
            ids = self.model.encode_prompt(job.prompt, job.raw_prompt)
            request = Request(ids, job.options, job.index)
            job.ticket = self.model.engine.submit(request)
            job.decoder = StreamDecoder(self.model, request, job.preview_every)
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("%s: a prompt could not be read", self.name)
            self._finish(job, error)
            return
        job.prompt, job.prompt_tokens, job.started_at = None, len(ids), time.monotonic()

    def _deliver(self, job: GenerationJob) -> None:
        """Sends the new events of a job."""
        assert job.ticket is not None and job.decoder is not None
        try:
            for _, token, output in self.model.engine.poll(job.ticket):
                self.generated_tokens += token is not None
                job.generated_tokens += token is not None
                for event in job.decoder(token, output):
                    if event.response is not None:
                        seconds = time.monotonic() - job.started_at
                        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
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
        ticket, job.ticket, job.prompt, job.decoder = job.ticket, None, None, None
        if ticket is not None:
            self.model.engine.cancel(ticket)
