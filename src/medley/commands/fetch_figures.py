"""Downloads LLaVA-Med's figures from the archives of their articles, or its data files.

    medley fetch-figures --input llava_med_image_urls.jsonl --output images --allow_network
    medley fetch-figures --data llava_med_instruct_10k.json --output data --allow_network

In: LLaVA-Med's image-URL file, or the names of its data files. Out: OUTPUT/ID.jpg for each figure,
with figures.jsonl (size and SHA-256 of each) and missing.jsonl (figures that could not be fetched,
with the reason); or the data files, verified against published checksums. Archives are downloaded
concurrently and deleted after their figures are extracted. Interrupted downloads resume, and
existing figures are not fetched again. Without --allow_network the command only reports what it
would fetch.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from medley.datasets.figures.download import FetchError, RetryPolicy, download, file_sha256
from medley.datasets.figures.manifest import FILES
from medley.datasets.figures.pmc_archives import (
    LOG,
    Figure,
    existing_figures,
    fetch_all,
    read_figures,
)
from medley.errors import PartialFailure, UserError
from medley.utils.chat_client import TriesAlias
from medley.utils.cli_options import Alias
from medley.utils.jsonl import append_jsonl, write_jsonl

MISSING = "missing.jsonl"
_MIN_FREE_SPACE = 1 << 30  # bytes


@dataclass(frozen=True)
class FetchFiguresOptions:
    """Downloads figures or data files.

    Args:
        output: folder for the figures or data files
        input: image-URL file, JSON Lines with pair_id, pmc_tar_url and image_file_path
        data: names of published data files, or all
        allow_network: download; without it the command only reports what it would fetch
        num_workers: number of concurrent downloads
        limit: fetch only the first N figures
        keep_archives: keep the archives in OUTPUT/archives
        verify: verify the checksums of existing figures
        max_retries: retries after a failed download
        timeout: seconds without a byte after which a download attempt fails
    """

    aliases: ClassVar = {"workers": Alias("num_workers"), "tries": TriesAlias("max_retries")}
    output: Path
    input: Path | None = None
    data: list[str] | None = None
    allow_network: bool = False
    num_workers: int = 8
    limit: int | None = None
    keep_archives: bool = False
    verify: bool = False
    max_retries: int = RetryPolicy.max_retries
    timeout: float = RetryPolicy.timeout

    def __post_init__(self) -> None:
        if (self.input is None) == (self.data is None):
            raise UserError("Exactly one of --input and --data is required.")
        if self.num_workers < 1 or self.max_retries < 0 or self.timeout <= 0:
            raise UserError(
                "Expected --num_workers of 1 or more, --max_retries of 0 or more and --timeout "
                f"above 0 (got {self.num_workers}, {self.max_retries}, {self.timeout})."
            )
        if unknown := [name for name in self.data or [] if name not in (*FILES, "all")]:
            raise UserError(f"--data {unknown[0]}: Unknown file. Use all, {', '.join(FILES)}.")

    @property
    def policy(self) -> RetryPolicy:
        return RetryPolicy(self.max_retries, timeout=self.timeout)


def fetch_figures(options: FetchFiguresOptions) -> None:
    if options.data is not None:
        fetch_data(options, list(FILES) if "all" in options.data else options.data)
        return
    assert options.input is not None
    figures = read_figures(options.input)[: options.limit]
    existing = existing_figures(options.output, options.verify)
    remaining = [figure for figure in figures if figure.identifier not in existing]
    archives = len({figure.address for figure in remaining})
    print(
        f"{len(figures)} figures, {len(figures) - len(remaining)} exist; "
        f"{len(remaining)} in {archives} archives to fetch"
    )
    if remaining:
        require_network(options)
    missing = fetch_archives(options, remaining)
    write_jsonl(options.output / MISSING, missing)
    print(f"{options.output}: {len(figures) - len(missing)} of {len(figures)} figures fetched")
    if missing:
        raise PartialFailure(
            f"{len(missing)} figures could not be fetched (see {options.output / MISSING}). Run "
            "the same command again to retry them."
        )


def require_network(options: FetchFiguresOptions) -> None:
    if not options.allow_network:
        raise UserError("Nothing was fetched. Add --allow_network to download.")


def fetch_archives(options: FetchFiguresOptions, figures: list[Figure]) -> list[dict[str, Any]]:
    """Fetches figures, logs each, and returns the rows of those that failed."""
    archives = options.output / "archives"
    options.output.mkdir(parents=True, exist_ok=True)
    outcomes = fetch_all(
        figures, options.output, archives, options.num_workers, options.keep_archives,
        options.policy,
    )  # fmt: skip
    missing: list[dict[str, Any]] = []
    for outcome in tqdm(outcomes, total=len(figures), desc="fetching", unit=" figures"):
        if outcome.error is None:
            append_jsonl(options.output / LOG, outcome.row())
        else:
            missing.append(outcome.row())
        if shutil.disk_usage(options.output).free < _MIN_FREE_SPACE:
            raise UserError(
                f"{options.output}: Less than {_MIN_FREE_SPACE >> 30} GiB of disk space is left. "
                "Free some space and run the same command again to continue."
            )
    if not options.keep_archives and archives.is_dir() and not any(archives.iterdir()):
        archives.rmdir()
    return sorted(missing, key=lambda row: str(row["identifier"]))


def fetch_data(options: FetchFiguresOptions, names: list[str]) -> None:
    total = sum(FILES[name].size for name in names)
    print(f"{len(names)} files of {total / 1e6:.1f} MB: {', '.join(names)}")
    require_network(options)
    failures: list[str] = []
    for name in names:
        file, path = FILES[name], options.output / name
        if path.is_file() and path.stat().st_size == file.size and file_sha256(path) == file.sha256:
            print(f"{path}: exists, checksum verified")
            continue
        try:
            download(file.url(name), path, options.policy, file.size, file.sha256)
            print(f"{path}: fetched, checksum verified")
        except FetchError as error:
            failures.append(str(error))
    if failures:
        raise PartialFailure(
            f"{len(failures)} of {len(names)} files could not be fetched: {'; '.join(failures)}"
        )
