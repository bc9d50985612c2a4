"""Runs a command of the repository and measures its seconds and its memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[1]
POLL = 0.05  # seconds between two looks at the memory


class Measurement(NamedTuple):
    """Seconds, and the largest sums of anonymous and of resident memory over all processes."""

    seconds: float
    anonymous_gb: float
    resident_gb: float


class StepFailed(Exception):
    """A command that failed or was ended; the message is the last line that it printed."""


def measure(arguments: Sequence[Any], limit: float, threads: int | None = None) -> Measurement:
    """Runs Python with arguments in the repository, for `limit` seconds. Raises StepFailed."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, *map(str, arguments)]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        peak = (0, 0)
        try:
            while process.poll() is None:
                peak = tuple(map(max, peak, memory_of(process.pid)))  # type: ignore[assignment]
                if time.perf_counter() - start > limit:
                    raise StepFailed(f"Ended after its limit of {limit} seconds.")
                time.sleep(POLL)
        finally:
            if process.poll() is None:
                end(process.pid)
                process.wait()
        seconds = time.perf_counter() - start
        output.seek(0)
        lines = output.read().strip().splitlines() or ["no message"]
    if process.returncode != 0:
        raise StepFailed(f"Status {process.returncode}: {lines[-1]}")
    return Measurement(seconds, peak[0] / 1e9, peak[1] / 1e9)


def memory_of(pid: int) -> tuple[int, int]:
    """Anonymous and resident bytes of a process and its descendants, summed up."""
    totals = [0, 0]
    for process in family(pid):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # it has ended, or this system has no /proc
            continue
        for index, name in enumerate(("RssAnon", "VmRSS")):
            match = re.search(rf"{name}:\s+(\d+)", status)
            totals[index] += 1024 * int(match[1]) if match else 0
    return totals[0], totals[1]


def family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end(pid: int) -> None:
    for process in family(pid):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
