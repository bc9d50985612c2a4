"""Tokenizes images to image codes, on any number of ranks.

In: a CSV, Parquet or Arrow file, a folder of images, a WebDataset tar or a folder of tars. Out: a
folder of Parquet partitions with a manifest, and `errors_rank_<r>.jsonl` that lists every image
that could not be read.

    torchrun --nproc-per-node=2 -m medley tokenize-images \
        --input images.csv --output codes --ckpt tiny

An interrupted run resumes when it is started again, also with another number of ranks. It encodes
only the missing partitions.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from tqdm import tqdm

from medley.data.image_token_store import (
    assign_partitions,
    finished_partitions,
    write_error_lists,
)
from medley.data.image_tokenization import encode_partitions
from medley.errors import PartialFailure, UserError
from medley.images.dataloader import ImageDataset, default_num_workers, image_batches
from medley.images.folders import describe_skipped
from medley.images.formats import Frames
from medley.images.preprocess import Fit, Preprocessing
from medley.images.sources import ImageList, ListDigest, Partition
from medley.inference.devices import describe_device, local_device
from medley.utils.cli_options import Alias, resolved
from medley.utils.distributed import (
    barrier,
    from_main_rank,
    is_main_rank,
    local_world_size,
    process_group,
    rank,
    world_size,
)
from medley.utils.malloc import keep_freed_memory
from medley.utils.manifest import read_manifest, write_manifest
from medley.utils.run_identity import check_same_run
from medley.vqgan.image_tokenizer import ImageTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TokenizeImagesOptions:
    """Tokenizes images to image codes.

    Args:
        input: CSV, Parquet or Arrow file with a column of paths (or of images, in the last two),
            folder of images, or WebDataset tar
        output: folder of the image codes
        ckpt: checkpoint with the VQGAN, a folder with vqgan.yaml and vqgan.ckpt, or tiny
        bs: images per forward pass
        partition_size: rows of the input in one output file
        limit: use only the first rows of the input
        image_key: column of the paths or images
        keep_columns: keep the other columns of the input (of a tar, __key__, txt and json)
        num_workers: processes that read images, for each rank; by default, chosen by the number of
            cores
        dtype: float32 is exact; bfloat16 is faster and changes some of the codes
        compile: compile the encoder (30 seconds at first, faster after that)
        fit: crop or pad; by default, as the checkpoint specifies
        frames: frames to use of files with several (DICOM, NIfTI, TIFF); first, middle or all
        exif_orientation: rotate photographs as their EXIF tag specifies; by default, as the
            checkpoint specifies
        device: auto, cpu, cuda or mps
        on_error: exit status if images could not be read; fail (status 3) or skip (status 0)
    """

    aliases: ClassVar = {
        "n_limit": Alias("limit"),
        "allow_errors": Alias("on_error", when_set="skip", when_unset="fail"),  # alias
    }

    input: Path
    output: Path
    ckpt: str
    bs: int = 64
    partition_size: int = 5000
    limit: int | None = None
    image_key: str = "img_path"
    keep_columns: bool = False
    num_workers: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    fit: Fit | None = None
    frames: Frames | None = None
    exif_orientation: bool | None = None
    device: str = "auto"
    on_error: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        for name in ("bs", "partition_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: Too small (got {value}, expected 1 or more).")

    @property
    def image_list(self) -> ImageList:
        return ImageList(self.input, self.image_key, self.keep_columns, self.limit)


def tokenize_images(options: TokenizeImagesOptions) -> None:
    start = time.monotonic()
    keep_freed_memory()
    device, dtype = local_device(options.device), DTYPES[options.dtype]
    tokenizer = ImageTokenizer.from_checkpoint(options.ckpt, device=device, dtype=dtype)
    tokenizer.preprocessing = _choose_preprocessing(options, tokenizer.preprocessing)
    if options.compile:
        tokenizer.vqgan.encoder.compile()
    with process_group(device):
        run = from_main_rank(lambda: _prepare_output(options, tokenizer))
        finished = finished_partitions(options.output)
        barrier()  # no rank writes before all have listed the finished partitions
        encoding_start = time.monotonic()
        own = assign_partitions(run["rows"], options.partition_size, finished, rank(), world_size())
        _encode(options, tokenizer, own, run)
        barrier()
        end = time.monotonic()
        from_main_rank(lambda: _report(options, run["rows"], end - start, end - encoding_start))


def _choose_preprocessing(options: TokenizeImagesOptions, own: Preprocessing) -> Preprocessing:
    """The checkpoint's preprocessing with the options that override it. Warns of a difference."""
    exif_orientation = options.exif_orientation
    chosen = Preprocessing(
        options.fit or own.fit,
        own.exif_orientation if exif_orientation is None else exif_orientation,
    )
    for name, value in chosen.describe().items():
        if value != own.describe()[name] and is_main_rank():
            warnings.warn(
                f"--{name}: Other than the preprocessing of {options.ckpt} (got {value}, expected "
                f"{own.describe()[name]}). In use the model will see other images than in "
                "training.",
                stacklevel=2,
            )
    return chosen


def _prepare_output(options: TokenizeImagesOptions, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """Reads the list once, checks the output folder and writes the manifest.

    Returns the run's identity: everything the codes depend on. The device belongs to it only by
    rounding, so that another one is a warning.
    """
    images = options.image_list
    digest = images.digest(options.partition_size)
    run: dict[str, Any] = {
        "rows": digest.rows,
        "paths_hash": digest.hexdigest(),
        "partition_size": options.partition_size,
        "keep_columns": options.keep_columns,
        "dtype": options.dtype,
        **tokenizer.preprocessing.describe(),
        "frames": options.frames,
        "token_space": tokenizer.fingerprint,
        "device": describe_device(tokenizer.device),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    recorded = read_manifest(options.output).get("run")
    if recorded is not None:
        check_same_run(
            recorded, run, options.output, "name another --output or remove this one", ("device",)
        )
        _warn_of_another_device(options, recorded.get("device"), run["device"])
    elif finished_partitions(options.output):
        raise UserError(
            f"{options.output}: Contains partitions but no manifest. Name another --output."
        )
    write_manifest(
        options.output, resolved(options), [options.input], tokenizer.fingerprint,
        **tokenizer.preprocessing.describe(), run=run, skipped_files=dict(images.skipped),
    )  # fmt: skip
    if images.skipped:
        print(f"{options.input}: {describe_skipped(images.skipped)}")
    return run


def _warn_of_another_device(
    options: TokenizeImagesOptions, recorded: str | None, current: str
) -> None:
    if recorded is not None and recorded != current:
        effect = (
            "float32 codes are settled in float64 where rounding could decide, so they should not "
            "differ."
            if options.dtype == "float32"
            else f"Some {options.dtype} codes differ between devices. Use one device for all "
            "partitions, or --dtype float32 and another --output."
        )
        warnings.warn(
            f"{options.output}: The first partitions were encoded on another device (was "
            f"{recorded}, now {current}). {effect}",
            stacklevel=2,
        )


def _encode(
    options: TokenizeImagesOptions, tokenizer: ImageTokenizer, own: set[int], run: dict[str, Any]
) -> None:
    """Encodes and writes the partitions of this rank."""
    size, rows = options.partition_size, run["rows"]
    digest = ListDigest()
    label = "encoding" if world_size() == 1 else f"encoding on rank 0 of {world_size()}"
    total = sum(min(size, rows - number * size) for number in own)
    with tqdm(total=total, unit="image", disable=not is_main_rank(), desc=label) as progress:

        def own_partitions() -> Iterator[Partition]:
            for partition in options.image_list.partitions(size):
                digest.add(partition)
                if partition.number in own:
                    selected = partition.select_frames(options.frames)
                    additional = len(selected.sources) - len(partition.sources)
                    progress.total = (progress.total or 0) + additional
                    yield selected

        dataset = ImageDataset(tokenizer.size, tokenizer.preprocessing)
        workers = options.num_workers
        if workers is None:
            workers = default_num_workers(tokenizer.device, local_world_size())
        pin_memory = tokenizer.device.type == "cuda"
        batches = image_batches(own_partitions(), dataset, options.bs, workers, pin_memory)
        for batch in encode_partitions(batches, tokenizer.start_encoding, options.output, rank()):
            progress.update(len(batch.names))
    if own and digest.hexdigest() != run["paths_hash"]:
        raise UserError(
            f"{options.input}: The list changed during the run. Remove {options.output} and start "
            "again."
        )


def _report(options: TokenizeImagesOptions, rows: int, seconds: float, encoding: float) -> None:
    encoded, failed = write_error_lists(options.output)
    print(
        f"{options.output}: {encoded} images of {rows} rows have codes, {failed} failed; "
        f"{seconds:.1f} s in this run, {encoding:.2f} s of it encoding"
    )
    if failed and options.on_error == "fail":
        raise PartialFailure(
            f"{options.output}: {failed} images of {rows} rows could not be read. They are listed "
            "in errors_rank_*.jsonl. Use --on_error skip to exit with status 0."
        )
