"""How well a VQGAN keeps one's own pictures: before spending days on a decoder, look.

In: a checkpoint and an image list. Out: a folder with `index.html`, a page of measures and of
originals above their reconstructions for each group, and `report.json` with the same figures.

    medley reconstruction-report --input pictures --ckpt tiny --output report
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from medley.errors import PartialFailure, UserError
from medley.images.dataloader import ImageDataset, image_batches
from medley.images.preprocess import bytes_to_pixels
from medley.images.sources import Frames, ImageList, Partition
from medley.inference.loading import resolve_device
from medley.utils.cli_options import resolved
from medley.utils.files import atomic_file, write_json
from medley.utils.malloc import keep_freed_memory
from medley.utils.manifest import write_manifest
from medley.vqgan.image_tokenizer import ImageTokenizer
from medley.vqgan.metrics import CodeUsage, comparison, psnr, ssim
from medley.vqgan.perceptual import PerceptualDistance

FOLDER = "folder"


@dataclass(frozen=True)
class ReconstructionReportOptions:
    """Measures how well a VQGAN keeps pictures.

    Args:
        input: CSV or Parquet file with a column of paths, folder of pictures, or WebDataset tar
        output: folder of the page and the figures
        ckpt: checkpoint whose VQGAN is measured, a folder with one, or tiny
        group_by: a column of the input (a modality, say), or folder, the picture's own
        grid: pictures shown of each group
        lpips: VGG16 of torchvision and linear heads of LPIPS, two files, to measure LPIPS too
        bs: pictures at once
        image_key: column of the paths
        n_limit: use only so many rows of the input
        frames: of files with several (DICOM, NIfTI, TIFF), the first, the middle one or all
        num_workers: processes that read pictures
        device: auto, cpu, cuda or mps
        allow_errors: end with status 0 even when pictures could not be read
    """

    input: Path
    output: Path
    ckpt: str
    group_by: str = FOLDER
    grid: int = 8
    lpips: list[Path] | None = None
    bs: int = 16
    image_key: str = "img_path"
    n_limit: int | None = None
    frames: Frames | None = None
    num_workers: int = 0
    device: str = "auto"
    allow_errors: bool = False

    def __post_init__(self) -> None:
        for name in ("bs", "grid"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, expected 1 or more")
        if self.lpips is not None and len(self.lpips) != 2:
            raise UserError("--lpips wants two files: VGG16's weights, and LPIPS's heads")


@dataclass
class Group:
    """What is known of one group of pictures."""

    usage: CodeUsage
    values: dict[str, list[float]] = field(default_factory=dict)
    shown: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, measures: dict[str, float], codes: Tensor) -> None:
        for name, value in measures.items():
            self.values.setdefault(name, []).append(value)
        self.usage.add(codes)

    def summary(self) -> dict[str, float]:
        means = {name: sum(v) / len(v) for name, v in self.values.items()}
        lowest = {"psnr_lowest": min(self.values["psnr"])}
        return {"pictures": len(self.values["psnr"]), **means, **lowest, **self.usage.summary()}


def reconstruction_report(options: ReconstructionReportOptions) -> None:
    keep_freed_memory()
    device = resolve_device(options.device)
    tokenizer = ImageTokenizer.from_checkpoint(options.ckpt, device=device)
    tokenizer.require_decoder()
    perceptual = None
    if options.lpips is not None:
        perceptual = PerceptualDistance.from_files(*options.lpips).to(device)
    groups, errors = measure(options, tokenizer, perceptual)
    options.output.mkdir(parents=True, exist_ok=True)
    everything = Group(CodeUsage(tokenizer.vqgan.config.n_embed))
    for group in groups.values():
        everything.usage.counts += group.usage.counts
        for name, values in group.values.items():
            everything.values.setdefault(name, []).extend(values)
    report: dict[str, Any] = {
        "checkpoint": options.ckpt,
        "token_space": tokenizer.fingerprint,
        "all": everything.summary() if groups else {"pictures": 0},
        "groups": {name: group.summary() for name, group in sorted(groups.items())},
        "failed": [{"img_path": name, "error": error} for name, error in errors],
    }
    write_json(options.output / "report.json", report)
    with atomic_file(options.output / "index.html") as temporary:
        temporary.write_text(page(report, groups), encoding="utf-8")
    write_manifest(options.output, resolved(options), [options.input], tokenizer.fingerprint)
    for name, figures in [*report["groups"].items(), ("all", report["all"])]:
        print(f"{name}: " + ", ".join(f"{n} {shown(v)}" for n, v in figures.items()))
    print(f"wrote {options.output / 'index.html'}")
    if errors and not options.allow_errors:
        raise PartialFailure(
            f"{len(errors)} pictures could not be read; report.json names them "
            "(--allow_errors accepts that)"
        )


def measure(
    options: ReconstructionReportOptions,
    tokenizer: ImageTokenizer,
    perceptual: PerceptualDistance | None,
) -> tuple[dict[str, Group], list[tuple[str, str]]]:
    groups: dict[str, Group] = {}
    errors: list[tuple[str, str]] = []
    squares = ImageDataset(tokenizer.size, tokenizer.fit)
    batches = image_batches(parts(options), squares, options.bs, options.num_workers)
    position: dict[int, int] = {}  # rows of a part that have come
    for batch in tqdm(batches, desc="measuring", unit="batch"):
        names = group_names(options, batch.part)
        start = position.get(batch.part.number, 0)
        position = {batch.part.number: start + len(batch.names)}
        good = [i for i, error in enumerate(batch.errors) if not error]
        errors += [(n, e) for n, e in zip(batch.names, batch.errors, strict=True) if e]
        if not good:
            continue
        codes = tokenizer.encode_bytes(batch.squares)
        pixels = bytes_to_pixels(batch.squares.to(tokenizer.device)).contiguous()
        drawn = tokenizer.decode_pixels(codes).clamp(-1, 1)
        measured = {"psnr": psnr(pixels, drawn), "ssim": ssim(pixels, drawn)}
        if perceptual is not None:
            with torch.inference_mode():
                measured["lpips"] = perceptual(pixels, drawn)
        for row, place in enumerate(good):
            name = names[start + place]
            group = groups.setdefault(name, Group(CodeUsage(tokenizer.vqgan.config.n_embed)))
            group.add({n: float(v[row]) for n, v in measured.items()}, codes[row])
            if len(group.shown) < options.grid:
                group.shown.append((pixels[row].cpu(), drawn[row].cpu()))
    return groups, errors


def parts(options: ReconstructionReportOptions) -> Iterator[Partition]:
    keep = options.group_by != FOLDER
    listed = ImageList(options.input, options.image_key, keep, options.n_limit)
    for part in listed.parts(1000):
        if part.kept is not None and options.group_by not in part.kept.column_names:
            raise UserError(
                f"{options.input}: no column {options.group_by!r} for --group_by, there are "
                f"{', '.join(part.kept.column_names)}"
            )
        yield part.with_frames(options.frames)


def group_names(options: ReconstructionReportOptions, part: Partition) -> list[str]:
    if part.kept is None:
        return [str(Path(source.name).parent) for source in part.sources]
    return [str(value) for value in part.kept[options.group_by].to_pylist()]


def page(report: dict[str, Any], groups: dict[str, Group]) -> str:
    columns = list(report["all"])
    rows = [
        "<tr><th>"
        + "".join(f"<td>{shown(figures.get(c))}</td>" for c in columns).join(
            (f"{html.escape(name)}</th>", "</tr>")
        )
        for name, figures in [*report["groups"].items(), ("all", report["all"])]
    ]
    grids = "".join(
        f"<h2>{html.escape(name)}</h2><p>Originals above, reconstructions below.</p>"
        f'<img alt="originals and reconstructions of {html.escape(name)}" src="{grid(group)}">'
        for name, group in sorted(groups.items())
    )
    failed = "".join(f"<li>{html.escape(f['error'])}</li>" for f in report["failed"])
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Reconstruction report</title>
<style>body{{font:16px system-ui;margin:2rem auto;max-width:80rem;padding:0 1rem}}
td,th{{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ccc}}
th:first-child{{text-align:left}}img{{max-width:100%;image-rendering:pixelated}}
div{{overflow-x:auto}}</style>
<h1>Reconstruction report</h1>
<p>What the VQGAN of {html.escape(report["checkpoint"])} (token space
{report["token_space"][:12]}) keeps of these pictures. A finding that is lost here, no decoder
can see. PSNR in decibels, mean and lowest; SSIM 1 is equal; LPIPS 0 is equal.</p>
<div><table><tr><th>group{"".join(f"<th>{html.escape(c)}</th>" for c in columns)}</tr>
{"".join(rows)}</table></div>{grids}
{f"<h2>Could not be read</h2><ul>{failed}</ul>" if failed else ""}</html>
"""


def shown(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def grid(group: Group) -> str:
    buffer = io.BytesIO()
    comparison(group.shown).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
