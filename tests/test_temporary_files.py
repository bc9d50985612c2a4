"""Temporary files: their names, their owners, full disks, signals."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from conftest import GOLDEN, ROOT, TIMEOUT

from medley.data.token_dataset import write_token_parquet
from medley.errors import UserError
from medley.utils.files import atomic_dir, atomic_file
from medley.utils.temporary_files import is_disk_full, machine

TOKENIZER = GOLDEN / "tiny_chameleon_tokenizer" / "text_tokenizer_modified.json"
KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from medley.utils.files import atomic_dir, atomic_file
target = Path(sys.argv[1])
with atomic_file(target / "a.txt") as file, atomic_dir(target / "b") as folder:
    file.write_text("half"); (folder / "x").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".part"))


def test_two_writers_with_one_process_number_do_not_meet(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with mock.patch("os.getpid", return_value=7), atomic_dir(out) as first:
        (first / "x").write_text("first")
        with pytest.raises(ZeroDivisionError), atomic_dir(out) as second:
            assert second != first
            raise ZeroDivisionError
        (tmp_path / ".out.7.part").mkdir()  # as an earlier version named it
        with atomic_dir(tmp_path / "other"):
            pass
        assert (first / "x").exists()
    assert (out / "x").read_text() == "first"


@pytest.mark.hostile(repeat=10)
def test_leftovers_of_a_dead_run_go_and_those_of_a_live_one_stay(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path)]
    foreign = tmp_path / f".a.txt.{'0' * 8}-1-{'0' * 12}.part"  # of another machine
    foreign.touch()
    similar = tmp_path / ".a.txt.12.part"
    similar.touch()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as live:
        assert live.stdout is not None and live.stdout.readline() == b"writing\n"
        assert len(leftovers(tmp_path)) == 4
        with atomic_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("whole")
        assert len(leftovers(tmp_path)) == 4
        live.communicate(b"")
    assert live.returncode == -signal.SIGKILL
    with atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("next")
    assert leftovers(tmp_path) == sorted([similar.name, foreign.name])
    assert machine() not in foreign.name


def test_a_long_name_has_a_temporary_name(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 125 + ".txt")
    with atomic_file(target) as temporary:
        temporary.write_text("x")
    assert target.read_text() == "x" and not leftovers(tmp_path)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` fail with EFBIG, as they would fail with ENOSPC on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_a_full_disk_is_one_error_for_parquet(tmp_path: Path) -> None:
    rows = ({"tokens": [(i * 7919) & 0xFFFF for i in range(n, n + 500)]} for n in range(5000))
    with file_size_limit(200_000), pytest.raises(UserError, match=r"o\.parquet: .*disk.* is full"):
        write_token_parquet(tmp_path / "o.parquet", rows)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error_for_torch(tmp_path: Path) -> None:
    with (
        file_size_limit(100_000),
        pytest.raises(UserError, match=r"state\.pt: .*disk.* is full"),
        atomic_file(tmp_path / "state.pt") as temporary,
    ):
        torch.save({"x": torch.rand(1 << 20)}, temporary)
    assert not list(tmp_path.iterdir())


def test_only_a_full_disk_is_taken_for_one() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(RuntimeError("[enforce fail] . unexpected pos 64 vs 0"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(ValueError("unexpected pos 64"))


def tokenizing(tmp_path: Path) -> subprocess.Popen[str]:
    """`medley tokenize` with two workers, while it writes."""
    line = json.dumps({"text": "one two three four five " * 40}) + "\n"
    (tmp_path / "in.jsonl").write_text(line * 60_000)
    flags = ["--input_file", "in.jsonl", "--output_file", "o.jsonl"]
    flags += ["--tokenizer_file", str(TOKENIZER)]
    command = [sys.executable, "-m", "medley", "tokenize", *flags, "--num_workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT
    while not leftovers(tmp_path) or len(psutil.Process(process.pid).children()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.hostile(repeat=10)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    with tokenizing(tmp_path) as process:
        workers = psutil.Process(process.pid).children()
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert error.splitlines()[-1] == "medley tokenize: terminated"
        assert "Traceback" not in error and not leftovers(tmp_path)


def test_sigterm_ends_a_program_that_waits_inside_a_library(tmp_path: Path) -> None:
    program = (
        "import ctypes, sys\n"
        "from dataclasses import dataclass\n"
        "from pathlib import Path\n"
        "from medley.utils.cli_options import run_program\n"
        "from medley.utils.files import atomic_file\n"
        "@dataclass\n"
        "class Options:\n"
        "    '''Waits.'''\n"
        "def work(options):\n"
        "    with atomic_file(Path('o.txt')):\n"
        "        print('waiting', flush=True)\n"
        "        mutex = ctypes.create_string_buffer(64)\n"
        "        ctypes.CDLL(None).pthread_mutex_lock(mutex)\n"
        "        ctypes.CDLL(None).pthread_mutex_lock(mutex)  # waits without an end\n"
        "sys.exit(run_program('p', Options, work, []))\n"
    )
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, text=True, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        time.sleep(0.1)
        process.terminate()
        _, error = process.communicate(timeout=30)
    assert process.returncode == 143 and error == "p: terminated\n"
    assert not leftovers(tmp_path)
