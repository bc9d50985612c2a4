"""Functions that need the model alone: they run in the engine's thread, between two of its steps.

Embeddings and log probabilities are forward passes outside of the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from medley.errors import UserError
from medley.generation.out_of_memory import is_out_of_memory
from medley.inference.model import Model
from medley.serving.limits import RequestError, ServerBusyError

Result = TypeVar("Result")
MAX_CALLS = 1024  # that wait


class EngineCalls:
    """Waiting functions. The caller holds the worker's lock, except for `run_next`."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[Model], Any], Future[Any]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, function: Callable[[Model], Result]) -> Future[Result]:
        """The future result of a function. Raises ServerBusyError if too many functions wait."""
        if len(self._waiting) >= MAX_CALLS:
            raise ServerBusyError(f"Too many inputs wait for the model (limit {MAX_CALLS}).")
        future: Future[Result] = Future()
        self._waiting.append((function, future))
        return future

    def run_next(self, model: Model) -> None:
        """Runs the function that has waited longest, if there is one and its caller still waits."""
        if not self._waiting:
            return
        function, future = self._waiting.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(model))
        except UserError as error:
            future.set_exception(error)
        except Exception as error:
            is_memory = is_out_of_memory(error)
            message = "Out of memory. Send a shorter input."
            future.set_exception(RequestError(message, 503) if is_memory else error)

    def fail(self, reason: Exception) -> None:
        """Ends all waiting functions with an error."""
        for _, future in self._waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(RequestError(str(reason), 503))
        self._waiting.clear()
