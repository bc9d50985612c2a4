"""Measures how well a VQGAN reconstructs your images, before you train a decoder on its codes.

Input: a checkpoint and an image list. Output: a folder with `index.html`, a report of metrics and
of originals above their reconstructions by group, and `report.json` with the same metrics.

    medley reconstruction-report --input images --ckpt tiny --output report
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tqdm import tqdm

from medley.errors import PartialFailure, UserError
from medley.images.dataloader import ImageDataset, image_batches
from medley.images.folders import describe_skipped
from medley.images.formats import Frames
from medley.images.sources import ImageList, Partition
from medley.inference.devices import resolve_device
from medley.utils.cli_options import Alias, resolved
from medley.utils.extras import require_extra
from medley.utils.files import atomic_file, write_json
from medley.utils.malloc import keep_freed_memory
from medley.utils.manifest import write_manifest
from medley.vqgan.image_tokenizer import ImageTokenizer
from medley.vqgan.perceptual import PerceptualDistance
from medley.vqgan.reconstruction import (
    folder_names,
    format_metric,
    measure_groups,
    merge_stats,
    render_report,
)

FOLDER = "folder"


@dataclass(frozen=True)
class ReconstructionReportOptions:
    """Measures how well a VQGAN reconstructs your images.

    Args:
        input: CSV or Parquet file with a column of paths, folder of images, or WebDataset tar
        output: folder of the report
        ckpt: checkpoint with the VQGAN to measure, folder with a VQGAN, or tiny
        group_by: column of the input (a modality, for example), or folder, the image's folder
        grid: number of images of each group in the report
        lpips_weights: two files, torchvision's VGG16 and the linear heads of LPIPS, to measure
            LPIPS
        bs: images in a batch
        image_key: column of the paths
        limit: use only the first N rows of the input
        frames: for files with several frames (DICOM, NIfTI, TIFF), first, middle or all
        num_workers: processes that read images
        device: auto, cpu, cuda or mps
        on_error: exit status if images cannot be read, fail (3) or skip (0)
    """

    aliases: ClassVar[dict[str, Alias]] = {
        "lpips": Alias("lpips_weights"),
        "n_limit": Alias("limit"),
        "allow_errors": Alias("on_error", when_set="skip", when_unset="fail"),
    }

    input: Path
    output: Path
    ckpt: str
    group_by: str = FOLDER
    grid: int = 8
    lpips_weights: list[Path] | None = None
    bs: int = 16
    image_key: str = "img_path"
    limit: int | None = None
    frames: Frames | None = None
    num_workers: int = 0
    device: str = "auto"
    on_error: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        for name in ("bs", "grid"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name}: Out of range (got {getattr(self, name)}, expected 1 or more)."
                )
        if self.lpips_weights is not None and len(self.lpips_weights) != 2:
            raise UserError(
                f"--lpips_weights: Wrong number of files (got {len(self.lpips_weights)}, expected "
                "2: the weights of VGG16 and the heads of LPIPS)."
            )


def reconstruction_report(options: ReconstructionReportOptions) -> None:
    require_extra("torchmetrics", "evaluate", "reconstruction-report")
    keep_freed_memory()
    device = resolve_device(options.device)
    tokenizer = ImageTokenizer.from_checkpoint(options.ckpt, device=device)
    tokenizer.require_decoder()
    perceptual = None
    if options.lpips_weights is not None:
        perceptual = PerceptualDistance.from_files(*options.lpips_weights).to(device)
    dataset = ImageDataset(tokenizer.size, tokenizer.preprocessing)
    listed = open_list(options)
    batches = image_batches(partitions(options, listed), dataset, options.bs, options.num_workers)
    groups, errors = measure_groups(
        tokenizer,
        tqdm(batches, desc="measuring", unit="batch"),
        lambda partition: group_names(options, partition),
        perceptual,
        options.grid,
    )
    merged = merge_stats(groups.values(), tokenizer.vqgan.config.n_embed)
    report: dict[str, Any] = {
        "checkpoint": options.ckpt,
        "token_space": tokenizer.fingerprint,
        "all": merged.summary(),
        "groups": {name: group.summary() for name, group in sorted(groups.items())},
        "failed": [{"img_path": name, "error": error} for name, error in errors],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "report.json", report)
    with atomic_file(options.output / "index.html") as temporary:
        temporary.write_text(render_report(report, groups), encoding="utf-8")
    write_manifest(
        options.output, resolved(options), [options.input], tokenizer.fingerprint,
        **tokenizer.preprocessing.describe(), skipped_files=dict(listed.skipped),
    )  # fmt: skip
    for name, metrics in [*report["groups"].items(), ("all", report["all"])]:
        print(f"{name}: " + ", ".join(f"{n} {format_metric(v)}" for n, v in metrics.items()))
    print(f"wrote {options.output / 'index.html'}")
    if listed.skipped:
        print(f"{options.input}: {describe_skipped(listed.skipped)}")
    if errors and options.on_error == "fail":
        raise PartialFailure(
            f"{options.output / 'report.json'}: {len(errors)} images could not be read. Use "
            "--on_error skip to accept this."
        )


def open_list(options: ReconstructionReportOptions) -> ImageList:
    keep_columns = options.group_by != FOLDER
    return ImageList(options.input, options.image_key, keep_columns, options.limit)


def partitions(options: ReconstructionReportOptions, listed: ImageList) -> Iterator[Partition]:
    for part in listed.partitions(1000):
        if (
            part.extra_columns is not None
            and options.group_by not in part.extra_columns.column_names
        ):
            raise UserError(
                f"{options.input}: Column not found for --group_by (got {options.group_by!r}, "
                f"expected one of {', '.join(part.extra_columns.column_names)})."
            )
        yield part.select_frames(options.frames)


def group_names(options: ReconstructionReportOptions, part: Partition) -> Sequence[str]:
    if part.extra_columns is None:
        return folder_names(part)
    return [str(value) for value in part.extra_columns[options.group_by].to_pylist()]
