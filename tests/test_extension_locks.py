"""Locks of DeepSpeed's extension builds: those of dead builds are removed, others are kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from torch.utils.file_baton import FileBaton

from medley.errors import UserError
from medley.trainer import extension_locks
from medley.trainer.extension_locks import Builder, clear_stale_locks, find_builder

# Takes the lock as torch does, says so, and builds until it is killed.
BUILD = (
    "import sys, time; from torch.utils.file_baton import FileBaton; "
    "FileBaton(sys.argv[1]).try_acquire(); print('locked', flush=True); time.sleep(600)"
)


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests may run on a file system of any type."""
    monkeypatch.setattr(extension_locks, "file_system", lambda folder: "ext4")
    monkeypatch.setattr(extension_locks, "POLL_SECONDS", 0.01)


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    return folder / "lock"


@contextmanager
def build(lock: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", BUILD, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def age(lock: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in (*lock.parent.iterdir(), lock.parent):
        os.utime(path, (then, then))


def test_the_lock_of_a_live_build_is_kept(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with build(lock):
        age(lock, 1e6)
        assert find_builder(lock) is Builder.ALIVE
        clear_stale_locks()
    assert lock.exists()
    assert capsys.readouterr().out == ""


def test_the_lock_of_a_killed_build_is_removed_and_the_next_build_begins(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with build(lock) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert find_builder(lock) is Builder.DEAD
    age(lock, 61)
    clear_stale_locks()
    assert not lock.exists()
    assert capsys.readouterr().out.startswith(f"{lock}: Left by a build of a DeepSpeed extension")
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    baton.release()


def test_a_young_lock_is_removed_when_its_folder_is_quiet(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.touch()
    looks = []

    def wait(seconds: float) -> None:
        assert lock.exists()
        looks.append(seconds)
        age(lock, 25 * len(looks))

    monkeypatch.setattr(time, "sleep", wait)
    clear_stale_locks()
    assert not lock.exists()
    assert len(looks) == 3  # at 25, 50 and 75 seconds


def test_a_build_that_ends_while_its_lock_is_looked_at_is_no_error(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.touch()
    monkeypatch.setattr(time, "sleep", lambda _: lock.unlink())
    clear_stale_locks()
    assert not lock.exists()


def test_a_lock_that_another_run_renewed_is_kept(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.touch()
    age(lock, 1e6)
    monkeypatch.setattr(extension_locks, "_is_same", lambda *_: False)

    def renew(seconds: float) -> None:
        if lock.exists():
            monkeypatch.setattr(extension_locks, "find_builder", lambda _: Builder.ALIVE)

    monkeypatch.setattr(time, "sleep", renew)
    clear_stale_locks()
    assert lock.exists()


def test_ninja_that_outlives_its_build_is_waited_for(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.touch()
    age(lock, 1e6)
    ninja = lock.parent.parent / "ninja"
    ninja.symlink_to("/bin/sleep")
    with subprocess.Popen([str(ninja), "600"], cwd=lock.parent) as process:
        try:
            monkeypatch.setattr(psutil.Process, "name", lambda self: _name(self, process.pid))
            assert find_builder(lock) is Builder.COMPILING
            monkeypatch.setattr(time, "sleep", lambda _: _end(process))
            clear_stale_locks()
        finally:
            process.kill()
    assert not lock.exists()


def _name(process: psutil.Process, ninja: int) -> str:
    return "ninja" if process.pid == ninja else "other"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize("cause", ["network", "unreadable"])
def test_a_lock_whose_builder_cannot_be_seen_is_refused(
    lock: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    if cause == "network":
        monkeypatch.setattr(extension_locks, "file_system", lambda folder: "nfs4")
    else:

        def refuse(self: psutil.Process) -> None:
            raise psutil.AccessDenied

        monkeypatch.setattr(psutil.Process, "open_files", refuse)
    lock.touch()
    clear_stale_locks()  # it may be of a build that has just begun
    age(lock, 181)
    with pytest.raises(UserError, match=r"lock: Left 3 minutes ago.* Remove it with `rm .*lock`"):
        clear_stale_locks()
    assert lock.exists()


def test_processes_that_cannot_have_created_the_lock_may_be_unreadable(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: psutil.Process) -> None:
        raise psutil.AccessDenied

    lock.touch()
    monkeypatch.setattr(psutil.Process, "open_files", refuse)
    monkeypatch.setattr(psutil.Process, "name", lambda self: "ssh-agent")
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["ssh-agent", "python"])
    assert find_builder(lock) is Builder.DEAD
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["/usr/bin/python3.11", "medley"])
    assert find_builder(lock) is Builder.UNKNOWN


def test_processes_of_other_users_cannot_have_created_the_lock(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.touch()
    own = os.getuid()
    users = {user: SimpleNamespace(effective=user) for user in (own, own + 1)}
    monkeypatch.setattr(psutil.Process, "uids", lambda self: users[own + 1])

    def refuse(self: psutil.Process) -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "open_files", refuse)
    assert find_builder(lock) is Builder.DEAD
    monkeypatch.setattr(psutil.Process, "uids", lambda self: users[own])
    assert find_builder(lock) is Builder.UNKNOWN


def test_one_rank_of_a_machine_removes_locks(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    age(lock, 1e6)
    monkeypatch.setenv("LOCAL_RANK", "1")
    clear_stale_locks()
    assert lock.exists()


def test_the_file_system_of_a_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def mount(point: str, kind: str) -> object:
        return SimpleNamespace(mountpoint=point, fstype=kind)

    mounts = [mount("/", "ext4"), mount("/home", "ext4"), mount("/home", "nfs4")]
    monkeypatch.undo()
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [*mounts, mount("/homes", "xfs")])
    assert extension_locks.file_system(Path("/home/user/.cache")) == "nfs4"
    assert extension_locks.file_system(Path("/tmp")) == "ext4"
