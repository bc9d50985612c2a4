"""Work in several processes with its order kept and its memory bounded."""

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
AHEAD = 3  # items under way for each process


def ordered_map(
    function: Callable[[Item], Value],
    items: Iterable[Item],
    workers: int,
    prepare: Callable[[], None],
) -> Iterator[Value]:
    """What `function` gives for each item, in order, after `prepare` has run in its process.

    With fewer than 2 workers it all happens in this process. No more items are read than are
    under way, so that neither items nor results pile up.
    """
    prepare()  # here first: its complaints are the user's, and forked processes inherit its work
    if workers < 2:
        yield from map(function, items)
        return
    gc.freeze()  # what is there by now is shared by forked processes, and not to be touched
    forked = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if forked else "spawn")
    waiting: deque[Future[Value]] = deque()
    with ProcessPoolExecutor(workers, context, None if forked else prepare) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process ended (out of memory?): run with fewer --num_workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
