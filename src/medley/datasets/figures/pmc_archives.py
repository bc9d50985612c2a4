"""LLaVA-Med's figures: a list of articles' archives, and of the picture in each that is wanted."""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import tarfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from medley.datasets.figures.download import FetchError, RetryPolicy, download, hash_of
from medley.errors import UserError
from medley.utils.files import atomic_file
from medley.utils.jsonl import json_lines

LOG = "figures.jsonl"
_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_LARGEST_FIGURE = 1 << 28  # bytes
_LARGEST_ARCHIVE = 1 << 34  # bytes, unpacked
_LARGEST_HEADER = 1 << 20  # bytes
_MOST_MEMBERS = 1_000_000
_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A picture: its id (it becomes ID.jpg), and its place in an article's archive."""

    identifier: str
    address: str
    member: str


@dataclass(frozen=True)
class Outcome:
    """What became of a figure: its size and SHA-256, or why it is not there."""

    identifier: str
    address: str
    size: int | None = None
    sha256: str | None = None
    error: str | None = None


def read_figures(path: Path) -> list[Figure]:
    """LLaVA-Med's image-URL file. Raises UserError with file and line for a bad one."""
    found: dict[str, Figure] = {}
    for number, line in json_lines(path):
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
            figure = Figure(row["pair_id"], row["pmc_tar_url"], row["image_file_path"])
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error})") from error
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{place}: expected pair_id, pmc_tar_url and image_file_path ({error})"
            ) from error
        values = (figure.identifier, figure.address, figure.member)
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{place}: pair_id, pmc_tar_url and image_file_path must be texts")
        if not _SAFE.fullmatch(figure.identifier) or figure.identifier.startswith("."):
            raise UserError(f"{place}: pair_id {figure.identifier!r} is no name for a file")
        if found.setdefault(figure.identifier, figure) != figure:
            raise UserError(f"{place}: pair_id {figure.identifier!r} stands for two pictures")
    if not found:
        raise UserError(f"{path}: no figures in it")
    return list(found.values())


def existing_figures(folder: Path, verify: bool) -> dict[str, Outcome]:
    """Figures that an earlier run has fetched: those of the log whose files are as they were."""
    found: dict[str, Outcome] = {}
    for _, line in json_lines(folder / LOG) if (folder / LOG).exists() else ():
        try:
            outcome = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue  # cut short by a kill: that one is fetched again
        path = figure_path(folder, outcome.identifier)
        there = outcome.error is None and path.is_file() and path.stat().st_size == outcome.size
        if there and not (verify and hash_of(path) != outcome.sha256):
            found[outcome.identifier] = outcome
    return found


def figure_path(folder: Path, identifier: str) -> Path:
    return folder / f"{identifier}.jpg"  # as LLaVA-Med's records name them


def fetch_all(
    figures: Sequence[Figure],
    folder: Path,
    archives: Path,
    workers: int,
    keep: bool,
    patience: RetryPolicy,
) -> Iterator[Outcome]:
    """Fetches archives side by side and takes their figures out, as they come.

    Closing the iterator stops what is under way; it is gone on with at the next run.
    """
    by_archive: dict[str, list[Figure]] = {}
    for figure in figures:
        by_archive.setdefault(figure.address, []).append(figure)
    left = iter(by_archive.values())
    stop = threading.Event()
    patience = replace(patience, stopped=stop.is_set)
    pool = ThreadPoolExecutor(workers)
    running: set[Future[list[Outcome]]] = set()
    try:
        while True:
            for group in islice(left, 2 * workers - len(running)):
                running.add(pool.submit(_fetch_group, group, folder, archives, keep, patience))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()
    finally:
        stop.set()  # what is under way ends at its next piece
        pool.shutdown(wait=True, cancel_futures=True)


def _fetch_group(
    group: Sequence[Figure], folder: Path, archives: Path, keep: bool, patience: RetryPolicy
) -> list[Outcome]:
    """All figures of one article."""
    address = group[0].address
    name = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    archive = archives / f"{name}.tar.gz"
    try:
        if not archive.is_file():
            download(address, archive, patience)
        outcomes = take_out(archive, group, folder)
    except UserError as error:
        return [Outcome(f.identifier, address, error=str(error)) for f in group]
    except Exception as error:  # of one article: the others are not to end with it
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [Outcome(f.identifier, address, error=reason) for f in group]
    if not keep:
        archive.unlink(missing_ok=True)
    return outcomes


class _Member(tarfile.TarInfo):
    """A member whose headers are of a size that can be meant: tarfile reads them whole."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _HEADERS and not 0 <= self.size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]  # where tarfile reads a header


def take_out(archive: Path, group: Sequence[Figure], folder: Path) -> list[Outcome]:
    """Copies the wanted members of an archive to their places, and nothing else.

    Only regular files are read, by name: no member's path, link or device is ever made.
    """
    wanted: dict[str, list[Figure]] = {}
    for figure in group:
        wanted.setdefault(_plain(figure.member), []).append(figure)
    outcomes: dict[str, Outcome] = {}
    seen = 0
    try:
        with tarfile.open(archive, "r|*", tarinfo=_Member) as tar:
            for number, member in enumerate(tar):
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every one
                seen += max(member.size, 0)
                if seen > _LARGEST_ARCHIVE or number > _MOST_MEMBERS:
                    raise FetchError(f"{archive}: unpacks to too much")
                here = wanted.get(_plain(member.name), [])
                if not here or not member.isreg():
                    continue
                if member.size > _LARGEST_FIGURE:
                    reason = f"{member.size} bytes, the limit of a figure is {_LARGEST_FIGURE}"
                    outcomes |= {f.identifier: _missing(f, reason) for f in here}
                    continue
                source = tar.extractfile(member)
                assert source is not None  # regular files have one
                data = source.read()
                outcomes |= {f.identifier: _keep(f, data, folder) for f in here}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        archive.unlink(missing_ok=True)  # fetched anew by the next run
        reason = f"its archive is broken ({' '.join(str(error).split())})"
        return [outcomes.get(f.identifier) or _missing(f, reason) for f in group]
    none = "its archive has no file "
    return [outcomes.get(f.identifier) or _missing(f, none + f.member) for f in group]


def _plain(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _missing(figure: Figure, reason: str) -> Outcome:
    return Outcome(figure.identifier, figure.address, error=reason)


def _keep(figure: Figure, data: bytes, folder: Path) -> Outcome:
    try:
        with Image.open(io.BytesIO(data)):
            pass
    except (OSError, Image.DecompressionBombError, ValueError):
        return _missing(figure, f"{figure.member} is no picture in a format that is known")
    with atomic_file(figure_path(folder, figure.identifier)) as temporary:
        temporary.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return Outcome(figure.identifier, figure.address, len(data), digest)


def log_line(outcome: Outcome) -> str:
    kept: dict[str, Any] = {n: v for n, v in asdict(outcome).items() if v is not None}
    return json.dumps(kept)
