"""SIGTERM becomes an exception, so that a program removes its temporary files and says why it ends.

A main thread that waits inside a library (for other ranks, for instance) never gets to run Python's
signal handler. A second thread then removes the temporary files and ends the process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from medley.utils.temporary_files import remove_live

STATUS = 128 + signal.SIGTERM
GRACE_SECONDS = 3.0  # for the main thread to run the signal handler


class Terminated(BaseException):
    """The process got SIGTERM. Not an Exception: no handler of errors may take it for one."""


@contextmanager
def sigterm_as_exception(prog: str) -> Iterator[None]:
    """Raises Terminated in the main thread when the process gets SIGTERM.

    Does nothing in another thread, and where SIGTERM is ignored or handled already.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    handled = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        handled.set()
        raise Terminated

    def watch() -> None:
        while received := os.read(reading, 1):
            ours = received[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handle
            if ours and not handled.wait(GRACE_SECONDS) and not ended.is_set():
                remove_live()
                sys.stderr.write(f"{prog}: terminated\n")
                sys.stderr.flush()
                os._exit(STATUS)
        os.close(reading)

    ended = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=watch, name="sigterm", daemon=True).start()
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(previous)
        os.close(writing)
