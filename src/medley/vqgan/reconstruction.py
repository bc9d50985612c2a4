"""Measures how well a VQGAN reconstructs images: by group for a report, or in a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medley.images.dataloader import ImageBatch
from medley.images.preprocess import uint8_to_pixels
from medley.images.sources import Partition
from medley.utils.html import data_url, render
from medley.vqgan.image_tokenizer import ImageTokenizer
from medley.vqgan.metrics import CodeUsage, comparison_grid, psnr, ssim
from medley.vqgan.model import VQGAN
from medley.vqgan.perceptual import PerceptualDistance

Example = tuple[Tensor, Tensor]  # pixels (3, H, W) of an image and of its reconstruction


@dataclass
class ReconstructionStats:
    """Metrics of each image of a group, codebook usage, and the first images as examples."""

    usage: CodeUsage
    values: dict[str, list[float]] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    def add(self, metrics: dict[str, float], codes: Tensor) -> None:
        """Adds one image: its metrics by name, and its image codes."""
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)
        self.usage.add(codes)

    def summary(self) -> dict[str, float]:
        if not self.values:
            return {"images": 0}
        means = {name: sum(v) / len(v) for name, v in self.values.items()}
        lowest = {"psnr_lowest": min(self.values["psnr"])}
        return {"images": len(self.values["psnr"]), **means, **lowest, **self.usage.summary()}


def merge_stats(groups: Iterable[ReconstructionStats], n_embed: int) -> ReconstructionStats:
    """The statistics of all groups together, without examples."""
    merged = ReconstructionStats(CodeUsage(n_embed))
    for group in groups:
        merged.usage.counts += group.usage.counts
        for name, values in group.values.items():
            merged.values.setdefault(name, []).extend(values)
    return merged


def measure_groups(
    tokenizer: ImageTokenizer,
    batches: Iterable[ImageBatch],
    group_names: Callable[[Partition], Sequence[str]],
    perceptual: PerceptualDistance | None,
    example_count: int,
) -> tuple[dict[str, ReconstructionStats], list[tuple[str, str]]]:
    """Statistics by group, and the name and the error of each image that cannot be read.

    Args:
        group_names: partition -> the group of each of its images
        perceptual: measures LPIPS, too
        example_count: number of examples that each group keeps
    """
    groups: dict[str, ReconstructionStats] = {}
    errors: list[tuple[str, str]] = []
    positions: dict[int, int] = {}  # number of a partition -> its images read so far
    for batch in batches:
        names = group_names(batch.partition)
        start = positions.get(batch.partition.number, 0)
        positions = {batch.partition.number: start + len(batch.names)}
        readable = [i for i, error in enumerate(batch.errors) if not error]
        errors += [(n, e) for n, e in zip(batch.names, batch.errors, strict=True) if e]
        if not readable:
            continue
        codes = tokenizer.encode_bytes(batch.images)
        pixels = uint8_to_pixels(batch.images.to(tokenizer.device)).contiguous()
        reconstructed = tokenizer.decode_pixels(codes).clamp(-1, 1)
        metrics = {"psnr": psnr(pixels, reconstructed), "ssim": ssim(pixels, reconstructed)}
        if perceptual is not None:
            with torch.inference_mode():
                metrics["lpips"] = perceptual(pixels, reconstructed)
        for index, position in enumerate(readable):
            usage = CodeUsage(tokenizer.vqgan.config.n_embed)
            group = groups.setdefault(names[start + position], ReconstructionStats(usage))
            group.add({n: float(v[index]) for n, v in metrics.items()}, codes[index])
            if len(group.examples) < example_count:
                group.examples.append((pixels[index].cpu(), reconstructed[index].cpu()))
    return groups, errors


def folder_names(partition: Partition) -> list[str]:
    """Groups images by their folder."""
    return [str(Path(source.name).parent) for source in partition.sources]


def render_report(report: dict[str, Any], groups: dict[str, ReconstructionStats]) -> str:
    """The HTML report: a table of all metrics, and originals above reconstructions by group."""
    columns = list(report["all"])
    rows = [
        (name, [format_metric(metrics.get(column)) for column in columns])
        for name, metrics in [*report["groups"].items(), ("all", report["all"])]
    ]
    grids = [
        (name, data_url(comparison_grid(group.examples))) for name, group in sorted(groups.items())
    ]
    return render(
        "reconstruction.html", "Reconstruction report",
        checkpoint=report["checkpoint"], token_space=report["token_space"][:12],
        columns=columns, rows=rows, grids=grids, failed=report["failed"],
    )  # fmt: skip


def format_metric(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


@dataclass(frozen=True)
class Validation:
    """Means over the held-out images, codebook usage, and the first images as examples."""

    psnr: float
    ssim: float
    usage: CodeUsage
    examples: list[Example]


@torch.no_grad()
def validate(
    vqgan: VQGAN, batches: Iterable[ImageBatch], device: torch.device, example_count: int
) -> Validation:
    """Measures a VQGAN in a training run. The VQGAN is in training mode before and after."""
    usage = CodeUsage(vqgan.config.n_embed)
    psnrs, ssims = [], []
    examples: list[Example] = []
    vqgan.eval()
    for batch in batches:
        pixels = uint8_to_pixels(batch.images.to(device))
        codes = vqgan.encode(pixels)
        reconstructed = vqgan.decode(codes)
        usage.add(codes)
        psnrs.append(psnr(pixels, reconstructed))
        ssims.append(ssim(pixels, reconstructed))
        pairs = list(zip(pixels, reconstructed, strict=True))
        examples += pairs[: example_count - len(examples)]
    vqgan.train()
    return Validation(
        float(torch.cat(psnrs).mean()), float(torch.cat(ssims).mean()), usage, examples
    )
