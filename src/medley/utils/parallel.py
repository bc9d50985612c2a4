"""An ordered map over several processes with bounded memory."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

from medley.errors import UserError

Item = TypeVar("Item")
Value = TypeVar("Value")
PENDING_PER_WORKER = 3
PARENT_CHECK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


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
    start = partial(_start_worker, os.getpid(), None if can_fork else prepare)
    with ProcessPoolExecutor(workers, context, start) as pool:
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


def _start_worker(parent: int, prepare: Callable[[], None] | None) -> None:
    """Prepares a worker process: it ends with its parent, and leaves Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)  # the parent's, which a forked process shares
    end_with_parent(parent)
    if prepare is not None:
        prepare()


def end_with_parent(parent: int) -> None:
    """Makes this process end when process `parent` ends, even if that one is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)
