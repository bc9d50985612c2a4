"""Locks that interrupted builds of DeepSpeed's extensions leave behind.

DeepSpeed builds its extensions at their first use, in a folder that all runs of a user share. torch
creates a lock file in it, keeps the file open while it builds, and then deletes it. A build that is
killed leaves the lock, and every later run would wait for it without an end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import psutil

from medley.errors import UserError
from medley.utils.distributed import local_rank

LOCAL_FILE_SYSTEMS = {
    "apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "overlay", "rootfs", "tmpfs", "xfs",
    "zfs",
}  # fmt: skip
QUIET_SECONDS = 60.0  # without a new file in the folder: no compiler is at work any more
UNKNOWN_QUIET_SECONDS = 180.0  # the same if the builder may be a process that we cannot see
POLL_SECONDS = 0.5


class Builder(Enum):
    """The process that created a lock."""

    ALIVE = "alive"
    COMPILING = "dead, but its ninja is not"
    DEAD = "dead"
    UNKNOWN = "unknown"


def clear_stale_locks() -> None:
    """Removes the locks of builds that died; waits until their compilers are quiet.

    One rank of a machine does this. The others wait for the locks in DeepSpeed.
    Raises UserError for an old lock whose builder may be a process that we cannot see: on another
    machine, or of another user.
    """
    if local_rank() != 0:
        return
    for lock in extension_locks():
        _clear(lock)


def extension_locks() -> Iterator[Path]:
    """The locks in the folder where torch builds extensions."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    yield from (*root.glob("*/lock"), *root.glob("*/*/lock"))


def _clear(lock: Path) -> None:
    announced = False
    while True:
        builder = find_builder(lock)
        try:
            quiet, inode = _quiet_seconds(lock), lock.stat().st_ino
        except OSError:  # a live build has just removed it
            return
        if builder is Builder.UNKNOWN and quiet > UNKNOWN_QUIET_SECONDS:
            raise UserError(
                f"{lock}: Left {quiet / 60:.0f} minutes ago by a build of a DeepSpeed extension "
                "that did not finish, so this run would wait without an end. Remove it with "
                f"`rm {lock}`."
            )
        if builder in (Builder.ALIVE, Builder.UNKNOWN):
            return
        if not announced:
            print(
                f"{lock}: Left by a build of a DeepSpeed extension that did not finish. It is "
                f"removed {QUIET_SECONDS:.0f} seconds after the last write to its folder.",
                flush=True,
            )
        # torch closes the file just before it deletes it: only the second look decides.
        elif builder is Builder.DEAD and quiet > QUIET_SECONDS and _is_same(lock, inode):
            lock.unlink(missing_ok=True)
            return
        announced = True
        time.sleep(POLL_SECONDS)


def _is_same(lock: Path, inode: int) -> bool:
    """Whether no other run has removed the lock and begun a new build meanwhile."""
    try:
        return lock.stat().st_ino == inode
    except OSError:
        return False


def _quiet_seconds(lock: Path) -> float:
    """Seconds since anything was written in the folder of a lock. Raises OSError without it."""
    newest = max(p.lstat().st_mtime for p in (lock, lock.parent, *lock.parent.iterdir()))
    return time.time() - newest


def find_builder(lock: Path) -> Builder:
    """Whether the process that created a lock is alive.

    That process has the lock open and has the lock's owner as its user. It runs on this machine if
    the file system is local. The ninja that it started may outlive it.
    """
    folder = lock.parent.resolve()
    try:
        owner = lock.stat().st_uid
    except OSError:
        return Builder.UNKNOWN
    is_certain, compiles = file_system(folder) in LOCAL_FILE_SYSTEMS, False
    for process in psutil.process_iter():
        try:
            if process.uids().effective != owner:
                continue
            if any(Path(file.path) == folder / lock.name for file in process.open_files()):
                return Builder.ALIVE
            compiles |= process.name() == "ninja" and Path(process.cwd()) == folder
        except psutil.NoSuchProcess:  # has ended meanwhile
            continue
        except (psutil.Error, OSError):
            is_certain &= not _runs_python(process)
    if not is_certain:
        return Builder.ALIVE if compiles else Builder.UNKNOWN
    return Builder.COMPILING if compiles else Builder.DEAD


def _runs_python(process: psutil.Process) -> bool:
    """Whether a process whose files we may not read can be a build; agents and daemons are not."""
    try:
        return "python" in " ".join([process.name(), *process.cmdline()[:1]]).lower()
    except (psutil.Error, OSError):
        return True


def file_system(folder: Path) -> str:
    """The type of the file system that contains a folder, as the system names it."""
    mounts = [m for m in psutil.disk_partitions(all=True) if folder.is_relative_to(m.mountpoint)]
    # The last one of equal mount points covers the others.
    return max(enumerate(mounts), key=lambda m: (len(m[1].mountpoint), m[0]))[1].fstype
