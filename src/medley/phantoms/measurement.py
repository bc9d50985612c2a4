"""Extracts the contents of an image from its pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from medley.phantoms.scenes import (
    ALL_MODALITIES,
    BRIGHTNESSES,
    KINDS,
    LEVELS,
    SCALE,
    SHIFT,
    SIDES,
    SIZES,
    Appearances,
    Finding,
    Grid,
    appearances_of,
    background,
    from_rgb,
    grid,
    masks,
    organs_of,
    overlay,
    to_rgb,
)

Offset = tuple[float, float]  # from a finding's nominal center, in units of half an image
_MIN_GAIN = 0.35  # minimum explained part of a finding's own energy
_MAX_SIZE = 256  # pixels along a side
_OFFSETS = (-0.06, -0.03, 0.0, 0.03, 0.06)


@dataclass(frozen=True)
class Measurement:
    """The nearest background and its findings.

    `residual` is the mean absolute difference (0 to 1) between the image and its reconstruction,
    in the square of a sixteenth of the image where it is largest. A local artifact is therefore
    not averaged out by the rest of the image.
    """

    modality: str
    organ: str
    findings: tuple[Finding, ...]
    residual: float


class Background(NamedTuple):
    """A background without findings; displacements are in units of half an image."""

    modality: str
    organ: str
    dx: float
    dy: float
    scale: float

    def coordinates(self, size: int) -> tuple[Grid, Grid]:
        """The organ's own x and y, each (size, size)."""
        x, y = grid(size)
        u, v = (x - self.dx) / self.scale, (y - self.dy) / self.scale
        return u.astype(np.float32), v.astype(np.float32)

    def gray(self, size: int) -> Grid:
        """(size, size)"""
        return background(self.modality, self.organ, *self.coordinates(size))


@cache
def _backgrounds(size: int) -> tuple[list[Background], Grid]:
    """Every modality and organ with small displacements and scales, and their grays (N, H, W)."""
    backgrounds = []
    for modality in ALL_MODALITIES:
        for organ in organs_of(modality):
            for dx in (-SHIFT, 0.0, SHIFT):
                for dy in (-SHIFT, 0.0, SHIFT):
                    for scale in (1 - SCALE, 1.0, 1 + SCALE):
                        backgrounds.append(Background(modality, organ, dx, dy, scale))
    return backgrounds, np.stack([each.gray(size) for each in backgrounds])


@cache
def _background_rgb(size: int) -> Grid:
    """The same in color, (N, H * W * 3)."""
    pairs = zip(*_backgrounds(size), strict=True)
    return np.stack([to_rgb(each.modality, gray).ravel() for each, gray in pairs])


def _nearest_background(rgb: Grid) -> Background:
    """The background that differs least from an image (H, W, 3); searched on a refined grid."""
    size = rgb.shape[0]
    distances = np.abs(_background_rgb(size) - rgb.reshape(1, -1)).mean(1)
    best, least = _backgrounds(size)[0][int(distances.argmin())], float(distances.min())
    for divisor in (2, 4):
        steps = (-1 / divisor, 0.0, 1 / divisor)
        start = best
        for x, y, scale in product(steps, steps, steps):
            candidate = start._replace(
                dx=start.dx + x * SHIFT, dy=start.dy + y * SHIFT, scale=start.scale + scale * SCALE
            )
            difference = to_rgb(candidate.modality, candidate.gray(size)) - rgb
            distance = float(np.abs(difference).mean())
            if distance < least:
                best, least = candidate, distance
    return best


@cache
def _templates(
    size: int, organ: str, appearances: Appearances, side: str, level: str
) -> tuple[list[tuple[Finding, Offset]], Grid, Grid]:
    """Findings of marked contrast at all offsets in a quadrant; the masks of findings and cores.

    Each mask array is (N, H, W).
    """
    x, y = grid(size)
    findings, outers, cores = [], [], []
    for kind in KINDS:
        for name in SIZES:
            finding = Finding(kind, name, side, level)
            for dx in _OFFSETS:
                for dy in _OFFSETS:
                    outer, core = masks(finding, organ, appearances, x, y, (dx, dy))
                    findings.append((finding, (dx, dy)))
                    outers.append(outer)
                    cores.append(np.zeros_like(outer) if core is None else core)
    return findings, np.stack(outers), np.stack(cores)


def measure(pixels: NDArray[np.uint8]) -> Measurement:
    """Finds modality, organ and findings in an image, uint8 (size, size, 3) or (size, size).

    Selects the nearest background. Then, for each quadrant, selects the finding whose rendering
    explains the image best, at the best of several offsets; a finding has to explain a minimum part
    of the remaining difference.

    Raises ValueError for an image that is not square or is larger than 256 pixels, since the memory
    for the cached templates grows with the image's area.
    """
    rgb: Grid = (pixels / 255).astype(np.float32)
    if rgb.ndim == 2:
        rgb = np.repeat(rgb[..., None], 3, -1)
    size = rgb.shape[0]
    if rgb.shape[:2] != (size, size) or size > _MAX_SIZE:
        raise ValueError(
            f"Expected a square image of up to {_MAX_SIZE} pixels (got {rgb.shape[:2]})."
        )
    nearest = _nearest_background(rgb)
    modality, organ = nearest.modality, nearest.organ
    gray, clean = from_rgb(modality, rgb), nearest.gray(size)
    reconstruction, findings = clean, []
    for side in SIDES:
        for level in LEVELS:
            match = _best_finding(gray, clean, organ, appearances_of(modality), side, level)
            if match is not None:
                findings.append(match[0])
                rendered = _refine_offset(gray, clean, nearest, *match)
                reconstruction = np.where(rendered != clean, rendered, reconstruction).astype(
                    np.float32
                )
    error = np.abs(to_rgb(modality, reconstruction) - rgb).mean(-1)
    quarter = max(size // 4, 1)
    residual = float(sliding_window_view(error, (quarter, quarter)).mean((2, 3)).max())
    return Measurement(modality, organ, tuple(findings), residual)


def _refine_offset(
    gray: Grid, clean: Grid, nearest: Background, finding: Finding, offset: Offset
) -> Grid:
    """The background with a finding at the nearby offset that explains the image best."""
    appearances, (u, v) = appearances_of(nearest.modality), nearest.coordinates(len(gray))
    best, least = clean, np.inf
    for step in (0.02, 0.01, 0.005):
        start = offset
        for right, down in product((-step, 0.0, step), repeat=2):
            candidate = (start[0] + right, start[1] + down)
            outer, core = masks(finding, nearest.organ, appearances, u, v, candidate)
            rendered = overlay(clean, finding, appearances, outer, core)
            error = float(np.square(rendered - gray).sum())
            if error < least:
                best, least, offset = rendered, error, candidate
    return best


def _best_finding(
    gray: Grid, clean: Grid, organ: str, appearances: Appearances, side: str, level: str
) -> tuple[Finding, Offset] | None:
    """The finding in a quadrant with its offset, or None."""
    templates, outers, cores = _templates(gray.shape[0], organ, appearances, side, level)
    difference = (gray - clean).ravel()
    best: tuple[float, Finding, Offset] | None = None
    for brightness in BRIGHTNESSES:
        per_kind = len(templates) // len(KINDS)
        for index, kind in enumerate(KINDS):
            own = slice(index * per_kind, (index + 1) * per_kind)
            finding = Finding(kind, "", side, level, brightness)
            core = cores[own] if appearances.of(kind).core is not None else None
            change = overlay(clean, finding, appearances, outers[own], core) - clean
            flat = change.reshape(len(change), -1)
            # The decrease of the squared error by rendering the finding, and the finding's own
            # energy: equal for a perfect match.
            energy = np.einsum("ij,ij->i", flat, flat) + 1e-6
            gain = 2 * (flat @ difference) - energy
            gain[gain <= _MIN_GAIN * energy] = -np.inf
            top = int(gain.argmax())
            if np.isfinite(gain[top]) and (best is None or gain[top] > best[0]):
                template, offset = templates[own][top]
                best = (float(gain[top]), replace(template, brightness=brightness), offset)
    return None if best is None else (best[1], best[2])
