"""One model at work for many: a thread that owns its engine, and requests that join and leave.

The engine is not safe for several threads; everything that touches it happens in `_run`. Whoever
asks gets events through a function that is called in that thread. Whatever happens there, every
request is told its end.
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
from medley.inference.model import Model, Prompt, StreamDecoder, StreamEvent
from medley.serving.limits import Limits, QueueFullError, RequestError

log = logging.getLogger("medley.serving")
Tell = Callable[[StreamEvent | Exception], None]
JOIN_AT_ONCE = 4  # requests that are read between two steps: the others' rows wait for it
LONGEST_WAIT = 60  # seconds; clients that are told to wait longer give up


@dataclass(eq=False)
class GenerationJob:
    """A request on its way. `tell` is called with every event, and with an exception if it fails;
    nothing comes after an answer or an exception."""

    prompt: Prompt | Document | None  # None once it has been read: its pictures are large
    options: GenerationOptions
    tell: Tell
    row: int = 0
    preview_every: int = 0
    complete: bool = False
    until: float = float("inf")
    began: float = 0.0  # when it got a row
    prompt_tokens: int = 0
    generated: int = 0  # tokens
    ticket: int | None = None
    telling: StreamDecoder | None = None
    over: bool = False  # cancelled, or ended


class EngineWorker:
    """A model by its name. `rows` requests are worked on at once, the others wait."""

    def __init__(self, name: str, model: Model, limits: Limits, rows: int = 32) -> None:
        self.name, self.model, self.limits = name, model, limits
        model.engine.set_max_num_seqs(rows)
        self.created = int(time.time())
        self.tokens = 0  # that were generated since the start
        # Of a text whose every token were the longest: more cannot fit, and is not read at all.
        self.most_characters = model.engine.context * model.tokenizer.longest_piece
        self._new: deque[GenerationJob] = deque()
        self._at_work: list[GenerationJob] = []
        self._wake = threading.Condition()
        self._ending: Exception | None = None  # what those who ask from now on are told
        self._seconds_a_job = 1.0  # a moving mean of the time in a row
        self._thread = threading.Thread(target=self._run, name=f"medley-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends all requests with a word, and the thread."""
        with self._wake:
            self._ending = RequestError("the server is shutting down", 503)
            self._wake.notify()
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def capacity(self) -> int:
        """Requests that are worked on at once."""
        return self.model.engine.capacity

    @property
    def waiting(self) -> int:
        return len(self._new)

    @property
    def running(self) -> int:
        return len(self._at_work)

    def submit(self, job: GenerationJob) -> None:
        """Raises Busy where too many wait already, RequestError where the thread has ended."""
        with self._wake:
            if self._ending is not None:  # a new one each time: it would gather traces
                raise RequestError(str(self._ending), 503)
            ahead = len(self._new) + len(self._at_work)
            if ahead >= self.capacity + self.limits.queue:
                wait = (1 + len(self._new) / self.capacity) * self._seconds_a_job
                raise QueueFullError(len(self._new), min(LONGEST_WAIT, max(1, round(wait))))
            self._new.append(job)
            self._wake.notify()

    def before(self, job: GenerationJob) -> int | None:
        """How many wait before it; None for a job that waits no more."""
        with self._wake:
            return self._new.index(job) if job in self._new else None

    def cancel(self, job: GenerationJob) -> None:
        """Frees the job's row before the next step. Nothing happens for one that has ended."""
        with self._wake:
            job.over = True
            if job in self._new:
                self._new.remove(job)
            self._wake.notify()

    # --- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        why: Exception = RequestError(f"the model {self.name} is out of order", 503)
        try:
            while self._ending is None:
                with self._wake:
                    while not (self._new or self._at_work or self._ending):
                        self._wake.wait()
                self._turn()
            why = self._ending
        except BaseException:  # a device that answers nothing any more, say
            log.exception("the thread of %s has ended", self.name)
        finally:
            with self._wake:
                self._ending = why
                left = [*self._at_work, *self._new]
                self._new.clear()
            for job in left:
                self._tell_last(job, why)

    def _turn(self) -> None:
        """Requests join and leave, and every row gets its next token."""
        now, seconds = time.monotonic(), self.limits.seconds
        with self._wake:
            late = [job for job in (*self._at_work, *self._new) if now > job.until]
        for job in late:
            self._end(job, RequestError(f"not done after {seconds:.0f} s, which is the limit", 408))
        for job in [job for job in self._at_work if job.over]:
            self._leave(job)
        room = self.capacity - len(self._at_work)
        for _ in range(min(room, JOIN_AT_ONCE)):
            with self._wake:
                if not self._new:
                    break
                job = self._new.popleft()
                self._at_work.append(job)
            self._join(job)
        if not self._at_work:
            return
        try:
            self.model.engine.step()
        except Exception as error:  # out of memory, say: these rows are lost, the server is not
            log.exception("%s: %d rows are lost", self.name, len(self._at_work))
            told = error
            if isinstance(error, UserError):  # what is wrong here is no fault of a request
                told = RequestError(str(error), 500)
            for job in list(self._at_work):
                self._end(job, told)
            return
        for job in list(self._at_work):
            self._pass_on(job)

    def _join(self, job: GenerationJob) -> None:
        if job.over:
            self._leave(job)
            return
        try:
            if job.options.mode != "text":
                self.model.image_tokenizer.require_decoder()
            assert job.prompt is not None
            ids = self.model.encode_prompt(job.prompt, job.complete)
            request = Request(ids, job.options, job.row)
            job.ticket = self.model.engine.submit(request)
            job.telling = StreamDecoder(self.model, request, job.preview_every)
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("%s: a request could not be read", self.name)
            self._end(job, error)
            return
        job.prompt, job.prompt_tokens, job.began = None, len(ids), time.monotonic()

    def _pass_on(self, job: GenerationJob) -> None:
        """What is new of a job to whoever asked."""
        assert job.ticket is not None and job.telling is not None
        try:
            for _, token, result in self.model.engine.poll(job.ticket):
                self.tokens += token is not None
                job.generated += token is not None
                for event in job.telling(token, result):
                    if event.answer is not None:
                        self._seconds_a_job += 0.1 * (
                            time.monotonic() - job.began - self._seconds_a_job
                        )
                        self._end(job, event)
                        return
                    job.tell(event)
        except Exception as error:  # of this job alone
            log.exception("%s: an answer could not be passed on", self.name)
            self._end(job, error)

    def _end(self, job: GenerationJob, last: StreamEvent | Exception) -> None:
        """Tells first: to leave a row may fail on a device that is out of order."""
        self._tell_last(job, last)
        self._leave(job)

    def _tell_last(self, job: GenerationJob, last: StreamEvent | Exception) -> None:
        if not job.over:
            job.over = True
            try:
                job.tell(last)
            except RuntimeError:  # the loop of whoever asked is closed
                log.warning("%s: nobody is there to hear of an answer's end", self.name)

    def _leave(self, job: GenerationJob) -> None:
        with self._wake:
            if job in self._at_work:
                self._at_work.remove(job)
            elif job in self._new:
                self._new.remove(job)
        ticket, job.ticket, job.prompt, job.telling = job.ticket, None, None, None
        if ticket is not None:
            self.model.engine.cancel(ticket)
