"""One model at work for many: a thread that owns its engine, and requests that join and leave.

The engine is not safe for several threads; everything that touches it happens in `_work`. Whoever
asks gets events through a function that is called in that thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from medley.assistant import Event, Model, Prompt, Telling
from medley.document import Document
from medley.errors import UserError
from medley.generation import GenerationOptions, Request
from medley.serving.limits import Busy, Limits, RequestError

Tell = Callable[[Event | Exception], None]


@dataclass(eq=False)
class Job:
    """A request on its way. `tell` is called with every event, and with an exception if it fails;
    nothing comes after an answer or an exception."""

    prompt: Prompt | Document
    options: GenerationOptions
    tell: Tell
    row: int = 0
    preview_every: int = 0
    complete: bool = False
    until: float = float("inf")
    asked: float = field(default_factory=time.monotonic)
    prompt_tokens: int = 0
    generated: int = 0  # tokens
    ticket: int | None = None
    telling: Telling | None = None
    over: bool = False  # cancelled, or ended


class Worker:
    """A model by its name. `rows` requests are worked on at once, the others wait."""

    def __init__(self, name: str, model: Model, limits: Limits, rows: int = 32) -> None:
        self.name, self.model, self.limits = name, model, limits
        model.engine.capacity = rows
        self.created = int(time.time())
        self.tokens = 0  # that were generated since the start
        self._new: deque[Job] = deque()
        self._at_work: list[Job] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._seconds_a_job = 1.0  # a moving mean, for those who are told to come again
        self._thread = threading.Thread(target=self._run, name=f"medley-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._new) + max(0, len(self._at_work) - self.model.engine.capacity)

    @property
    def running(self) -> int:
        return min(len(self._at_work), self.model.engine.capacity)

    def submit(self, job: Job) -> None:
        """Raises Busy where too many wait already."""
        with self._wake:
            if self.waiting >= self.limits.queue:
                rounds = 1 + self.waiting / self.model.engine.capacity
                raise Busy(self.waiting, max(1, round(rounds * self._seconds_a_job)))
            self._new.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Frees the job's row before the next step. Nothing happens for one that has ended."""
        with self._wake:
            job.over = True
            self._wake.notify()

    # --- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._new or self._at_work or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    break
                joining = [self._new.popleft() for _ in range(len(self._new))]
            try:
                self._step(joining)
            except Exception as error:  # out of memory, say: these rows are lost, the server is not
                self._fail(error)
        for job in [*self._at_work, *self._new]:
            self._end(job, RequestError("the server is shutting down", 503))

    def _step(self, joining: list[Job]) -> None:
        for job in joining:
            self._join(job)
        now = time.monotonic()
        for job in list(self._at_work):
            if job.over:
                self._leave(job)
            elif now > job.until:
                seconds = self.limits.seconds
                self._end(job, RequestError(f"not done after {seconds:.0f} s, which is the limit",
                                            408))  # fmt: skip
        if not self._at_work:
            return
        self.model.engine.step()
        for job in list(self._at_work):
            assert job.ticket is not None and job.telling is not None
            for _, token, result in self.model.engine.news(job.ticket):
                self.tokens += token is not None
                job.generated += token is not None
                for event in job.telling(token, result):
                    if event.answer is not None:
                        self._end(job, event)
                    else:
                        job.tell(event)

    def _join(self, job: Job) -> None:
        if job.over:
            return
        try:
            if job.options.mode != "text":
                self.model.image_tokenizer.require_decoder()
            ids = self.model.prompt_ids(job.prompt, job.complete)
            request = Request(ids, job.options, job.row)
            job.ticket = self.model.engine.submit(request)
        except UserError as error:
            self._at_work.append(job)
            self._end(job, error)
            return
        job.prompt_tokens = len(ids)
        job.telling = Telling(self.model, request, job.preview_every)
        self._at_work.append(job)

    def _leave(self, job: Job) -> None:
        if job.ticket is not None:
            self.model.engine.cancel(job.ticket)
        if job in self._at_work:
            self._at_work.remove(job)

    def _end(self, job: Job, last: Event | Exception) -> None:
        took = time.monotonic() - job.asked
        self._seconds_a_job += 0.1 * (took - self._seconds_a_job)
        self._leave(job)
        job.over = True
        job.tell(last)

    def _fail(self, error: Exception) -> None:
        for job in list(self._at_work):
            self._end(job, error)
