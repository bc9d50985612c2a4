"""Pictures to image codes, on any number of ranks.

In: a CSV, a Parquet file, a folder of pictures, a WebDataset tar or a folder of them. Out: a
folder of Parquet shards with a manifest, and `errors_rank_<r>.jsonl` naming every picture that
could not be read.

    torchrun --nproc-per-node=2 -m medley tokenize-images \
        --input pictures.csv --output codes --ckpt tiny

Started again after a kill, with the same or another number of ranks, it goes on with the
partitions that are not there yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from medley.data.image_token_store import (
    TokenizationFailure,
    finished_partitions,
    partition_file,
    write_error_lists,
    write_partition,
)
from medley.errors import PartialFailure, UserError
from medley.images.dataloader import ImageBatch, ImageDataset, auto_workers, image_batches
from medley.images.preprocess import Fit
from medley.images.sources import Digest, Frames, ImageList, Partition
from medley.inference.loading import local_device
from medley.utils.cli_options import resolved
from medley.utils.distributed import (
    all_ranks,
    barrier,
    from_main_rank,
    is_main_rank,
    local_world_size,
    rank,
    world_size,
)
from medley.utils.malloc import keep_freed_memory
from medley.utils.manifest import read_manifest, write_manifest
from medley.vqgan.image_tokenizer import ImageTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TokenizeImagesOptions:
    """Turns pictures into image codes.

    Args:
        input: CSV or Parquet file with a column of paths, folder of pictures, or WebDataset tar
        output: folder of the shards
        ckpt: checkpoint whose VQGAN is used, a folder with vqgan.yaml and vqgan.ckpt, or tiny
        bs: pictures of one forward pass
        partition_size: rows of the input that one shard holds
        n_limit: use only so many rows of the input
        image_key: column of the paths
        keep_columns: keep the other columns of the input (of a tar, __key__, txt and json)
        num_workers: processes that read pictures, for each rank; chosen by the machine if not given
        dtype: float32 is exact; bfloat16 is faster and changes a share of the codes
        compile: compile the encoder (half a minute at first, faster after that)
        fit: crop or pad; the checkpoint's own unless given
        frames: of files with several (DICOM, NIfTI, TIFF), the first, the middle one or all
        exif_orientation: turn photographs as their camera says
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
    num_workers: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    fit: Fit | None = None
    frames: Frames | None = None
    exif_orientation: bool = False
    device: str = "auto"
    allow_errors: bool = False

    def __post_init__(self) -> None:
        for name in ("bs", "partition_size", "n_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, expected 1 or more")

    @property
    def list(self) -> ImageList:
        return ImageList(self.input, self.image_key, self.keep_columns, self.n_limit)


def tokenize_images(options: TokenizeImagesOptions) -> None:
    start = time.monotonic()
    keep_freed_memory()
    device, dtype = local_device(options.device), DTYPES[options.dtype]
    tokenizer = ImageTokenizer.from_checkpoint(options.ckpt, device=device, dtype=dtype)
    tokenizer.fit = options.fit or tokenizer.fit
    if options.compile:
        tokenizer.vqgan.encoder.compile()
    with all_ranks():
        whole = from_main_rank(lambda: prepare(options, tokenizer))
        done = finished_partitions(options.output)
        barrier()  # every rank has looked before any writes: all see the same share of work
        encoding = time.monotonic()
        encode_own_share(options, tokenizer, set(done), whole)
        barrier()
        end = time.monotonic()
        from_main_rank(lambda: finish(options, whole["rows"], end - start, end - encoding))


def prepare(options: TokenizeImagesOptions, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """Reads the list once, checks that the folder holds the same run or none, says what is run."""
    digest = options.list.digest(options.partition_size)
    run: dict[str, Any] = {
        "rows": digest.rows,
        "paths_hash": digest.hexadecimal,
        "partition_size": options.partition_size,
        "keep_columns": options.keep_columns,
        "dtype": options.dtype,
        "fit": tokenizer.fit,
        "frames": options.frames,
        "exif_orientation": options.exif_orientation,
        "token_space": tokenizer.fingerprint,
    }
    check_resumed(options.output, run)
    options.output.mkdir(parents=True, exist_ok=True)
    inputs = [options.input]
    write_manifest(
        options.output, resolved(options), inputs, tokenizer.fingerprint, fit=tokenizer.fit, run=run
    )
    for stale in options.output.glob(".*.part"):
        stale.unlink()  # of a rank that was killed while writing
    return run


def check_resumed(output: Path, run: dict[str, Any]) -> None:
    """Refuses a folder that holds another run's partitions."""
    if not output.is_dir():
        return
    before = read_manifest(output).get("run")
    if before is None:
        if finished_partitions(output):
            raise UserError(
                f"{output}: holds partitions without the manifest of their run; name another "
                "--output"
            )
        return
    for name, value in run.items():
        if before.get(name) != value:
            raise UserError(
                f"{output}: holds a run with {name} {before.get(name)!r}, this one has {value!r}; "
                "name another --output, or remove that folder"
            )


def encode_own_share(
    options: TokenizeImagesOptions, tokenizer: ImageTokenizer, done: set[int], whole: dict[str, Any]
) -> None:
    """Encodes every world-size-th of the partitions that are not there yet."""
    size, rows = options.partition_size, whole["rows"]
    missing = [k for k in range(-(-rows // size)) if k not in done]
    own = set(missing[rank() :: world_size()])
    total = sum(min(size, rows - k * size) for k in own)
    digest = Digest()

    def own_parts() -> Iterator[Partition]:
        for part in options.list.parts(size):
            digest.add(part)
            if part.number in own:
                yield part.with_frames(options.frames)

    squares = ImageDataset(tokenizer.size, tokenizer.fit, options.exif_orientation)
    workers = options.num_workers
    if workers is None:
        workers = auto_workers(tokenizer.device, local_world_size())
    label = "encoding" if world_size() == 1 else f"encoding, share of rank 0 of {world_size()}"
    with tqdm(total=total, unit="picture", disable=not is_main_rank(), desc=label) as progress:
        batches = image_batches(
            own_parts(), squares, options.bs, workers, pin=tokenizer.device.type == "cuda"
        )
        finished: list[ImageBatch] = []
        codes: list[Tensor] = []
        for batch, encoded in encode_ahead(tokenizer, batches):
            finished.append(batch)
            codes.append(encoded)
            progress.update(len(batch.names))
            if batch.ends_part:
                rows_of_part = min(size, rows - batch.part.number * size)
                progress.total += sum(len(b.names) for b in finished) - rows_of_part
                write_part(options, finished, torch.cat(codes))
                finished, codes = [], []
    if own and digest.hexadecimal != whole["paths_hash"]:
        raise UserError(
            f"{options.input}: changed while it was read; remove {options.output} and start again"
        )


def encode_ahead(
    tokenizer: ImageTokenizer, batches: Iterator[ImageBatch]
) -> Iterator[tuple[ImageBatch, Tensor]]:
    """Batches with their codes (N, C); the codes are fetched when the next batch is under way.

    On CUDA the work is queued: copying the next squares overlaps with it.
    """
    waiting: tuple[ImageBatch, Tensor] | None = None
    for batch in batches:
        try:
            encoded = tokenizer.encode_bytes(batch.squares)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"no memory on {tokenizer.device} for {len(batch.squares)} pictures at once: "
                "lower --bs"
            ) from error
        if waiting is not None:
            yield waiting[0], waiting[1].cpu()
        waiting = batch, encoded
    if waiting is not None:
        yield waiting[0], waiting[1].cpu()


def write_part(options: TokenizeImagesOptions, batches: list[ImageBatch], codes: Tensor) -> None:
    part = batches[0].part
    names = [name for batch in batches for name in batch.names]
    errors = [error for batch in batches for error in batch.errors]
    good = [row for row, error in enumerate(errors) if not error]
    failures = [TokenizationFailure(n, e) for n, e in zip(names, errors, strict=True) if e]
    extra = {}
    if part.kept is not None:
        kept = part.kept.take(pa.array(good, pa.int64())).combine_chunks()
        extra = {name: kept[name] for name in kept.column_names}
    target = partition_file(options.output, part.number, rank())
    numbers = codes.numpy().astype(np.uint16)
    write_partition(target, [names[row] for row in good], numbers, failures, extra)


def finish(options: TokenizeImagesOptions, rows: int, seconds: float, encoding: float) -> None:
    encoded, failed = write_error_lists(options.output)
    print(
        f"{encoded} pictures of {rows} rows have codes in {options.output}, {failed} failed; "
        f"{seconds:.1f} s in this run, {encoding:.2f} s of it encoding"
    )
    if failed and not options.allow_errors:
        raise PartialFailure(
            f"{failed} pictures of {rows} rows could not be read; errors_rank_*.jsonl in "
            f"{options.output} names them (--allow_errors accepts that)"
        )
