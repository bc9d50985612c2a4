"""Pictures to image codes, on any number of ranks.

In: a CSV, a Parquet file or a folder of pictures. Out: a folder of Parquet shards with a
manifest, and `errors_rank_<r>.jsonl` naming every picture that could not be read.

    torchrun --nproc-per-node=2 -m tokenizer.image_tokenization \
        --input pictures.csv --output codes --ckpt tiny

Started again after a kill, with the same or another number of ranks, it goes on with the
partitions that are not there yet.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from medley.checkpoints import open_checkpoint
from medley.code_shards import (
    Failure,
    finished_partitions,
    partition_file,
    write_error_lists,
    write_partition,
)
from medley.errors import DataLost, UserError
from medley.files import read_manifest, write_manifest
from medley.image_tokenizer import ImageTokenizer
from medley.images import Fit, ImageError, open_image, to_pixels
from medley.loading import pick_device
from medley.options import is_main_rank, rank, resolved, run_program, world_size

PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Turns pictures into image codes.

    Args:
        input: CSV or Parquet file with a column of paths, or a folder of pictures
        output: folder of the shards
        ckpt: checkpoint whose VQGAN is used, or tiny
        bs: pictures of one forward pass
        partition_size: rows of the input that one shard holds
        n_limit: use only so many rows of the input
        image_key: column of the paths
        keep_columns: keep the other columns of the input in the shards
        num_workers: processes that read pictures, for each rank
        dtype: float32 is exact; bfloat16 is faster and changes a share of the codes
        compile: compile the encoder (minutes at first, faster after that)
        fit: crop or pad; the checkpoint's own unless given
        device: auto, cpu, cuda or mps
        allow_errors: end with status 0 even when pictures could not be read
    """

    input: Path
    output: Path
    ckpt: str
    bs: int = 64
    partition_size: int = 5000
    n_limit: int | None = None
    image_key: str = "img_path"
    keep_columns: bool = False
    num_workers: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    fit: Fit | None = None
    device: str = "auto"
    allow_errors: bool = False

    def __post_init__(self) -> None:
        for name in ("bs", "partition_size", "n_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, expected 1 or more")


def read_list(options: Options) -> pd.DataFrame:
    """The image list as a table whose column `img_path` holds strings."""
    path = options.input
    if path.is_dir():
        found = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in PICTURES)
        if not found:
            raise UserError(f"{path}: no pictures ({', '.join(sorted(PICTURES))}) in this folder")
        table = pd.DataFrame({"img_path": found})
    elif not path.is_file():
        raise UserError(f"{path}: no such image list or folder")
    else:
        try:
            if path.suffix == ".parquet":
                table = pd.read_parquet(path)
            else:
                # Every column as it is written: "007" must not become 7, "NA" not nothing.
                table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        except (ValueError, pa.ArrowInvalid) as error:
            raise UserError(f"{path}: not a table that can be read ({error})") from error
        if options.image_key not in table.columns:
            raise UserError(
                f"{path}: no column {options.image_key!r}, there are {', '.join(table.columns)}; "
                "name one with --image_key"
            )
        clash = {"img_tokens", "img_path"} - {options.image_key}
        if options.keep_columns and clash & set(table.columns):
            raise UserError(
                f"{path}: has a column {(clash & set(table.columns)).pop()!r}, which "
                "--keep_columns would write over; rename it"
            )
        table = table.drop(columns=list(clash & set(table.columns)))
        table = table.rename(columns={options.image_key: "img_path"})
        table["img_path"] = table["img_path"].astype(str)
    return table if options.n_limit is None else table.iloc[: options.n_limit]


class Pictures(Dataset[tuple[int, "Tensor | None", str]]):
    """Reads pictures in worker processes; a broken one gives its error in place of pixels."""

    def __init__(self, paths: list[str], size: int, fit: Fit) -> None:
        self.paths, self.size, self.fit = paths, size, fit

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            image = open_image(self.paths[index])
            return index, to_pixels(image, self.size, self.fit), ""
        except ImageError as error:
            return index, None, str(error)


def encode_partition(
    paths: list[str], tokenizer: ImageTokenizer, options: Options, progress: tqdm[None]
) -> tuple[list[int], NDArray[np.uint16], list[Failure]]:
    """Rows that worked, their codes uint16 (N, C), and the failures."""
    data = Pictures(paths, tokenizer.size, tokenizer.fit)
    loader: DataLoader[tuple[int, Tensor | None, str]] = DataLoader(
        data, batch_size=options.bs, num_workers=options.num_workers, collate_fn=list
    )
    good: list[int] = []
    codes: list[NDArray[np.uint16]] = []
    failures: list[Failure] = []
    for batch in loader:
        readable = [(index, pixels) for index, pixels, _ in batch if pixels is not None]
        failures += [
            Failure(paths[index], error) for index, pixels, error in batch if pixels is None
        ]
        if readable:
            pixels = torch.stack([p for _, p in readable])
            codes.append(tokenizer.encode_pixels(pixels).cpu().numpy().astype(np.uint16))
            good += [index for index, _ in readable]
        progress.update(len(batch))
    empty = np.zeros((0, tokenizer.codes_per_image), np.uint16)
    return good, np.concatenate(codes) if codes else empty, failures


def check_resumed(options: Options, paths: list[str], tokenizer: ImageTokenizer) -> dict[str, Any]:
    """What must be the same when a run goes on; refuses a folder of another run."""
    same: dict[str, Any] = {
        "rows": len(paths),
        "paths_hash": hashlib.sha256("\n".join(paths).encode()).hexdigest(),
        "partition_size": options.partition_size,
        "keep_columns": options.keep_columns,
        "dtype": options.dtype,
        "fit": tokenizer.fit,
        "token_space": tokenizer.fingerprint,
    }
    if not options.output.is_dir():
        return same
    before = read_manifest(options.output).get("run")
    if before is None and finished_partitions(options.output):
        raise UserError(
            f"{options.output}: holds partitions without the manifest of their run; name another "
            "--output"
        )
    for name, value in same.items():
        found = value if before is None else before.get(name)
        if found != value:
            raise UserError(
                f"{options.output}: holds a run with {name} {found!r}, this one has {value!r}; "
                "name another --output, or remove that folder"
            )
    return same


def work(options: Options) -> None:
    table = read_list(options)
    tokenizer = open_checkpoint(options.ckpt).image_tokenizer(
        device=_own_device(options.device), dtype=DTYPES[options.dtype]
    )
    tokenizer.fit = options.fit or tokenizer.fit
    if options.compile:
        tokenizer.vqgan.encoder.compile()
    run = check_resumed(options, table["img_path"].tolist(), tokenizer)
    options.output.mkdir(parents=True, exist_ok=True)
    with all_ranks():
        if is_main_rank():
            inputs = [options.input]
            write_manifest(
                options.output, resolved(options), inputs, tokenizer.fingerprint,
                run=run,
            )  # fmt: skip
            for stale in options.output.glob(".*.part"):
                stale.unlink()  # of a rank that was killed while writing
        barrier()
        encode_own_share(table, tokenizer, options)
        barrier()
        if is_main_rank():
            finish(options, len(table))


def encode_own_share(table: pd.DataFrame, tokenizer: ImageTokenizer, options: Options) -> None:
    size = options.partition_size
    done = finished_partitions(options.output)
    barrier()  # every rank has looked before any writes: all see the same share of work
    missing = [k for k in range(-(-len(table) // size)) if k not in done]
    own = missing[rank() :: world_size()]
    total = sum(len(table.iloc[k * size : (k + 1) * size]) for k in own)
    with tqdm(total=total, unit="picture", disable=not is_main_rank(), desc="encoding") as progress:
        for k in own:
            part = table.iloc[k * size : (k + 1) * size]
            paths = part["img_path"].tolist()
            good, codes, failures = encode_partition(paths, tokenizer, options, progress)
            kept = part.iloc[good].drop(columns="img_path")
            extra = {str(c): pa.array(kept[c]) for c in kept} if options.keep_columns else {}
            target = partition_file(options.output, k, rank())
            write_partition(target, [paths[i] for i in good], codes, failures, extra)


def finish(options: Options, rows: int) -> None:
    failed = write_error_lists(options.output)
    print(f"{rows - failed} of {rows} pictures have codes in {options.output}, {failed} failed")
    if failed and not options.allow_errors:
        raise DataLost(
            f"{failed} of {rows} pictures could not be read; errors_rank_*.jsonl in "
            f"{options.output} names them (--allow_errors accepts that)"
        )


@contextmanager
def all_ranks() -> Iterator[None]:
    """Joins the ranks of torchrun, so that the last step knows that all have ended."""
    if world_size() > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _own_device(name: str) -> torch.device:
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and world_size() > 1:
        return torch.device("cuda", rank() % torch.cuda.device_count())
    return device


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    status = run_program("tokenizer.image_tokenization", Options, work, argv)
    if is_main_rank() and status == 0:
        print(f"done in {time.monotonic() - start:.1f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
