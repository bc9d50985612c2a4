"""Temporary files and folders beside their targets, each locked by the process that writes it.

The name is `.NAME.MACHINE-PID-RANDOM.part`, for people to read. What decides whether the writer
still runs is a lock (flock) on the file or folder: the system releases it when a process ends,
however it ends. So a later run removes what a dead run left, and never what a live one writes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medley.errors import UserError

LARGE_FOLDER = 1000  # entries; a larger folder is searched for leftovers once per process
_NAME = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})-\d+-[0-9a-f]{12}\.part", re.DOTALL)
_NAME_BYTES = 255  # longest name of a file on common systems
_searched: set[Path] = set()
_live: set[Path] = set()
# NFS cannot lock a folder (EBADF); other file systems have no locks at all.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_SPACE_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")
# torch checks how much it wrote, and does not report why a write failed.
_TORCH_WRITE_FAILED = ("unexpected pos ", "PytorchStreamWriter failed writing", "write failed")


def machine() -> str:
    """Eight hexadecimal digits for this machine: flock is reliable on one machine only."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _temporary_name(target: Path) -> Path:
    suffix = f".{machine()}-{os.getpid()}-{secrets.token_hex(6)}.part"
    name = os.fsencode(target.name)[: _NAME_BYTES - len(suffix) - 1]
    return target.with_name(f".{name.decode('utf-8', 'ignore')}{suffix}")


def _lock(path: Path) -> int | None:
    """Opens and locks a file or folder; None where the file system has no locks.

    Raises OSError if another process has the lock, and FileNotFoundError if it removed the file.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between `open` and `flock` another process may have removed it.
        if os.fstat(handle).st_ino != path.stat().st_ino:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except OSError as error:
        os.close(handle)
        if error.errno in _NO_LOCKS:
            return None
        raise
    return handle


def _create(target: Path, folder: bool) -> tuple[Path, int | None]:
    """A new temporary file or folder, and the handle of its lock."""
    while True:
        path = _temporary_name(target)
        if folder:
            path.mkdir()
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        try:
            return path, _lock(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for a leftover before it was locked


@contextmanager
def temporary_path(target: Path, folder: bool = False) -> Iterator[Path]:
    """Yields a new empty file (or folder) beside `target`, and removes it at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    path, lock = _create(target, folder)
    _live.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _live.discard(path)
        if lock is not None:
            os.close(lock)


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Yields whether this process alone has the lock file `path`; removes it at the end."""
    alone, lock = True, None
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o666))
    try:
        lock = _lock(path)
    except (BlockingIOError, FileNotFoundError):
        alone = False
    try:
        yield alone
    finally:
        if alone:
            path.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_live() -> None:
    """Removes what this process is writing. For a process that must end at once."""
    for path in list(_live):
        _remove(path)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders of ended processes of this machine."""
    folder = folder.absolute()
    if folder in _searched:
        return
    with os.scandir(folder) as entries:
        count, own = 0, machine()
        for count, entry in enumerate(entries, 1):  # noqa: B007  # the count is used below
            match = _NAME.fullmatch(entry.name)
            if match and match["machine"] == own and (path := Path(entry.path)) not in _live:
                with suppress(OSError):
                    lock = _lock(path)
                    if lock is not None:
                        _remove(path)
                        os.close(lock)
    if count > LARGE_FOLDER:
        _searched.add(folder)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turns errors of a full disk, in whatever words a library reports them, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"{target}: Could not be written, because the disk (or a quota or size limit) is "
                "full. Free some space, or name a folder on another disk."
            ) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether a full disk caused an error, directly or as the error behind it."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        text = str(cause)
        if isinstance(cause, OSError) and cause.errno in _NO_SPACE:
            return True
        if any(words in text for words in _NO_SPACE_TEXTS):
            return True
        if isinstance(cause, RuntimeError) and any(words in text for words in _TORCH_WRITE_FAILED):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
