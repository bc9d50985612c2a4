"""An ordered map over several processes with bounded memory."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from medley.errors import UserError

Item = TypeVar("Item")
Value = TypeVar("Value")
PENDING_PER_WORKER = 3


def ordered_map(
    function: Callable[[Item], Value],
    items: Iterable[Item],
    workers: int,
    prepare: Callable[[], None],
) -> Iterator[Value]:
    """Yields `function(item)` for each item in order; `prepare` runs once in each process first.

    With fewer than 2 workers everything runs in this process. Items are read only as workers
    become free, so neither items nor results accumulate.
    """
    # Here first: the user sees its errors, and forked processes inherit what it has loaded.
    prepare()
    if workers < 2:
        yield from map(function, items)
        return
    gc.freeze()  # The collector must not write to the pages that forked processes share.
    can_fork = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if can_fork else "spawn")
    pending: deque[Future[Value]] = deque()
    with ProcessPoolExecutor(workers, context, None if can_fork else prepare) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= PENDING_PER_WORKER * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "A worker process ended unexpectedly (out of memory?). Reduce --num_workers."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
