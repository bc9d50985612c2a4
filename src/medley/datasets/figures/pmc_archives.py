"""LLaVA-Med's figures: download the archives of PubMed Central articles and extract the figures.

figures = read_figures(Path("llava_med_image_urls.jsonl"))
for outcome in fetch_all(figures, folder, archives, workers=8, keep=False, policy=RetryPolicy()):
    ...
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import tarfile
import threading
import zlib
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from medley.datasets.figures.download import FetchError, RetryPolicy, download, file_sha256
from medley.errors import UserError
from medley.images.formats import open_pillow
from medley.utils.files import atomic_file, escape_name
from medley.utils.jsonl import json_lines

LOG = "figures.jsonl"
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_MAX_FIGURE = 1 << 28  # bytes
_MAX_ARCHIVE = 1 << 34  # bytes, unpacked
_MAX_HEADER = 1 << 20  # bytes
_MAX_MEMBERS = 1_000_000
_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A figure: its id (the file becomes ID.jpg), its archive's URL, its path in the archive."""

    identifier: str
    address: str
    member: str


@dataclass(frozen=True)
class Outcome:
    """The result for one figure: the file's size and SHA-256, or the error."""

    identifier: str
    address: str
    size: int | None = None
    sha256: str | None = None
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """The fields that are set, for a JSON Lines file; a URL may hold unpaired surrogates."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return {n: escape_name(v) if isinstance(v, str) else v for n, v in fields.items()}


def read_figures(path: Path) -> list[Figure]:
    """Reads LLaVA-Med's image-URL file. Raises UserError with file and line for an invalid one."""
    figures: dict[str, Figure] = {}
    for number, line in json_lines(path):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            figure = Figure(row["pair_id"], row["pmc_tar_url"], row["image_file_path"])
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: Invalid JSON ({error}).") from error
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{where}: Expected an object with pair_id, pmc_tar_url and image_file_path "
                f"({error})."
            ) from error
        values = (figure.identifier, figure.address, figure.member)
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{where}: pair_id, pmc_tar_url and image_file_path must be strings.")
        if not _SAFE_NAME.fullmatch(figure.identifier) or figure.identifier.startswith("."):
            raise UserError(f"{where}: pair_id {figure.identifier!r} is not a valid file name.")
        if figures.setdefault(figure.identifier, figure) != figure:
            raise UserError(f"{where}: Duplicate pair_id {figure.identifier!r} for two figures.")
    if not figures:
        raise UserError(f"{path}: The file contains no figures.")
    return list(figures.values())


def existing_figures(folder: Path, verify: bool) -> dict[str, Outcome]:
    """Figures in the log of an earlier run whose files are unchanged.

    Compares the sizes; with `verify`, also the checksums.
    """
    existing: dict[str, Outcome] = {}
    for _, line in json_lines(folder / LOG) if (folder / LOG).exists() else ():
        try:
            outcome = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue  # An interrupted run left the line incomplete; its figure is fetched again.
        path = figure_path(folder, outcome.identifier)
        same = outcome.error is None and path.is_file() and path.stat().st_size == outcome.size
        if same and not (verify and file_sha256(path) != outcome.sha256):
            existing[outcome.identifier] = outcome
    return existing


def figure_path(folder: Path, identifier: str) -> Path:
    return folder / f"{identifier}.jpg"  # the name that LLaVA-Med's records use


def fetch_all(
    figures: Sequence[Figure],
    folder: Path,
    archives: Path,
    workers: int,
    keep: bool,
    policy: RetryPolicy,
) -> Generator[Outcome]:
    """Downloads archives concurrently and yields one outcome per figure as archives complete.

    Closing the generator cancels the running downloads; the next run resumes them.
    """
    by_archive: dict[str, list[Figure]] = {}
    for figure in figures:
        by_archive.setdefault(figure.address, []).append(figure)
    groups = iter(by_archive.values())
    stop = threading.Event()
    policy = replace(policy, cancelled=stop.is_set)
    pool = ThreadPoolExecutor(workers)
    running: set[Future[list[Outcome]]] = set()
    try:
        while True:
            for group in islice(groups, 2 * workers - len(running)):
                running.add(pool.submit(_fetch_group, group, folder, archives, keep, policy))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()
    finally:
        stop.set()  # Running downloads end after their next chunk.
        pool.shutdown(wait=True, cancel_futures=True)


def _fetch_group(
    group: Sequence[Figure], folder: Path, archives: Path, keep: bool, policy: RetryPolicy
) -> list[Outcome]:
    """Fetches all figures of one article."""
    address = group[0].address
    name = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    archive = archives / f"{name}.tar.gz"
    try:
        if not archive.is_file():
            download(address, archive, policy)
        outcomes = extract(archive, group, folder)
    except UserError as error:
        return [Outcome(f.identifier, address, error=str(error)) for f in group]
    except Exception as error:  # An error in one article must not end the others.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [Outcome(f.identifier, address, error=reason) for f in group]
    if not keep:
        archive.unlink(missing_ok=True)
    return outcomes


class _Member(tarfile.TarInfo):
    """Rejects members with oversized headers, which tarfile would read into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _HEADERS and not 0 <= self.size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]  # where tarfile reads a header


def extract(archive: Path, group: Sequence[Figure], folder: Path) -> list[Outcome]:
    """Copies the requested members of an archive to `folder`.

    Only regular files are read, by name. The paths, links and devices of members are never created.
    """
    requested: dict[str, list[Figure]] = {}
    for figure in group:
        requested.setdefault(_normalize(figure.member), []).append(figure)
    outcomes: dict[str, Outcome] = {}
    unpacked = 0
    try:
        with tarfile.open(archive, "r|*", tarinfo=_Member) as tar:
            for number, member in enumerate(tar):
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member
                unpacked += max(member.size, 0)
                if unpacked > _MAX_ARCHIVE or number > _MAX_MEMBERS:
                    raise FetchError(
                        f"{archive}: The archive unpacks to more than {_MAX_ARCHIVE} bytes or "
                        f"{_MAX_MEMBERS} members."
                    )
                figures = requested.get(_normalize(member.name), [])
                if not figures or not member.isreg():
                    continue
                if member.size > _MAX_FIGURE:
                    reason = f"The figure has {member.size} bytes (limit {_MAX_FIGURE})."
                    outcomes |= {f.identifier: _failure(f, reason) for f in figures}
                    continue
                source = tar.extractfile(member)
                assert source is not None  # regular files have one
                data = source.read()
                outcomes |= {f.identifier: _write(f, data, folder) for f in figures}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        archive.unlink(missing_ok=True)  # The next run downloads it again.
        reason = f"The archive is damaged ({' '.join(str(error).split())})."
        return [outcomes.get(f.identifier) or _failure(f, reason) for f in group]
    return [
        outcomes.get(f.identifier) or _failure(f, f"The archive has no file {f.member}.")
        for f in group
    ]


def _normalize(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _failure(figure: Figure, reason: str) -> Outcome:
    return Outcome(figure.identifier, figure.address, error=reason)


def _write(figure: Figure, data: bytes, folder: Path) -> Outcome:
    try:
        with open_pillow(io.BytesIO(data), figure.member):
            pass
    except (OSError, ValueError, SyntaxError):
        return _failure(figure, f"{figure.member} is not an image in a supported format.")
    with atomic_file(figure_path(folder, figure.identifier)) as temporary:
        temporary.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return Outcome(figure.identifier, figure.address, len(data), digest)
