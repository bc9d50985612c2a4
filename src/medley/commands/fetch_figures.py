"""LLaVA-Med's figures out of the articles they were printed in, and its data files.

    medley fetch-figures --input llava_med_image_urls.jsonl --output images \
        --allow_network
    medley fetch-figures --data llava_med_instruct_10k.json --output data \
        --allow_network

Archives are fetched side by side, gone on with where they broke off, and deleted once their figures
are taken out. What is there already is not fetched again; what cannot be had is named in
missing.jsonl, and the rest is kept. Nothing is fetched without --allow_network: the program then
says what it would do.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from medley.datasets.figures.download import FetchError, RetryPolicy, download, hash_of
from medley.datasets.figures.manifest import FILES
from medley.datasets.figures.pmc_archives import (
    LOG,
    Figure,
    existing_figures,
    fetch_all,
    log_line,
    read_figures,
)
from medley.errors import PartialFailure, UserError
from medley.utils.files import atomic_file
from medley.utils.jsonl import append_jsonl

MISSING = "missing.jsonl"
_ROOM = 1 << 30  # bytes that the disk must have left


@dataclass(frozen=True)
class FetchFiguresOptions:
    """Fetches figures or data files.

    Args:
        output: folder of the pictures, or of the data files
        input: image-URL file, JSONL of pair_id, pmc_tar_url and image_file_path
        data: published data files to fetch and check, by their names, or all
        allow_network: fetch them; without it the program only says what it would do
        workers: archives that are fetched at once
        limit: fetch so many figures, the first ones
        keep_archives: keep the archives, in OUTPUT/archives
        verify: compare the checksums of figures that are there already
        tries: how often an archive is asked for
        timeout: seconds without a byte after which a try ends
    """

    output: Path
    input: Path | None = None
    data: list[str] | None = None
    allow_network: bool = False
    workers: int = 8
    limit: int | None = None
    keep_archives: bool = False
    verify: bool = False
    tries: int = RetryPolicy.tries
    timeout: float = RetryPolicy.timeout

    def __post_init__(self) -> None:
        if (self.input is None) == (self.data is None):
            raise UserError("give either --input or --data")
        if self.workers < 1 or self.tries < 1 or self.timeout <= 0:
            raise UserError("--workers, --tries and --timeout start above 0")
        if unknown := [name for name in self.data or [] if name not in (*FILES, "all")]:
            raise UserError(f"--data {unknown[0]}: not known; there is all, {', '.join(FILES)}")

    @property
    def patience(self) -> RetryPolicy:
        return RetryPolicy(self.tries, timeout=self.timeout)


def fetch_figures(options: FetchFiguresOptions) -> None:
    if options.data is not None:
        fetch_data(options, list(FILES) if "all" in options.data else options.data)
        return
    assert options.input is not None
    figures = read_figures(options.input)[: options.limit]
    there = existing_figures(options.output, options.verify)
    left = [figure for figure in figures if figure.identifier not in there]
    archives = len({figure.address for figure in left})
    print(
        f"{len(figures)} figures, {len(figures) - len(left)} of them there already; "
        f"{len(left)} in {archives} archives to fetch"
    )
    if left and not options.allow_network:
        raise UserError("nothing was fetched: --allow_network does it")
    missing = fetch_archives(options, left)
    with atomic_file(options.output / MISSING) as temporary:
        temporary.write_text("".join(line + "\n" for line in missing), encoding="utf-8")
    print(f"{options.output}: {len(figures) - len(missing)} of {len(figures)} figures are there")
    if missing:
        raise PartialFailure(
            f"{len(missing)} figures could not be had, see {options.output / MISSING}; the same "
            "command tries them again"
        )


def fetch_archives(options: FetchFiguresOptions, left: list[Figure]) -> list[str]:
    """Gives the lines of those that are missing."""
    archives = options.output / "archives"
    options.output.mkdir(parents=True, exist_ok=True)
    found = fetch_all(
        left, options.output, archives, options.workers, options.keep_archives, options.patience
    )
    missing: list[str] = []
    for outcome in tqdm(found, total=len(left), desc="fetching", unit=" figures"):
        if outcome.error is None:
            append_jsonl(options.output / LOG, log_line(outcome))
        else:
            missing.append(log_line(outcome))
        if shutil.disk_usage(options.output).free < _ROOM:
            raise UserError(f"{options.output}: the disk is full; make room, and go on")
    if not options.keep_archives and archives.is_dir() and not any(archives.iterdir()):
        archives.rmdir()
    return sorted(missing)


def fetch_data(options: FetchFiguresOptions, names: list[str]) -> None:
    total = sum(FILES[name].size for name in names)
    print(f"{len(names)} files of {total / 1e6:.1f} MB: {', '.join(names)}")
    if not options.allow_network:
        raise UserError("nothing was fetched: --allow_network does it")
    missing: list[str] = []
    for name in names:
        file, path = FILES[name], options.output / name
        if path.is_file() and path.stat().st_size == file.size and hash_of(path) == file.sha256:
            print(f"{path}: is there, and whole")
            continue
        try:
            download(file.address(name), path, options.patience, file.size, file.sha256)
            print(f"{path}: fetched, its checksum is the published one")
        except FetchError as error:
            missing.append(str(error))
    if missing:
        raise PartialFailure(
            f"{len(missing)} of {len(names)} files are missing: {'; '.join(missing)}"
        )
