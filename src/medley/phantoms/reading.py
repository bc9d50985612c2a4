"""What a picture shows, found in its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from medley.phantoms.world import (
    ALL_MODALITIES,
    BRIGHTNESSES,
    KINDS,
    LEVELS,
    SCALE,
    SHIFT,
    SIDES,
    SIZES,
    Finding,
    Grid,
    Signs,
    background,
    coloured,
    grid,
    laid_over,
    masks,
    organs_of,
    signs_of,
    uncoloured,
)

_LEAST_GAIN = 0.35  # of a finding's own energy, that it has to explain to be there
_STEPS = (-0.06, -0.03, 0.0, 0.03, 0.06)  # places at which a finding is tried


@dataclass(frozen=True)
class Measurement:
    """The nearest clean background and the findings laid over it. `residual` is the mean absolute
    difference to the picture drawn again, 0 to 1."""

    modality: str
    organ: str
    findings: tuple[Finding, ...]
    residual: float


@cache
def _backgrounds(size: int) -> tuple[list[tuple[str, str]], Grid]:
    """Every look and organ under small shifts and scales: names and greys (N, H, W)."""
    names, rows = [], []
    x, y = grid(size)
    for modality in ALL_MODALITIES:
        for organ in organs_of(modality):
            for dx in (-SHIFT, 0.0, SHIFT):
                for dy in (-SHIFT, 0.0, SHIFT):
                    for scale in (1 - SCALE, 1.0, 1 + SCALE):
                        names.append((modality, organ))
                        u, v = ((x - dx) / scale).astype(np.float32), (y - dy) / scale
                        rows.append(background(modality, organ, u, v.astype(np.float32)))
    return names, np.stack(rows)


@cache
def _colours(size: int) -> Grid:
    """The same in colour, (N, H * W * 3)."""
    names, rows = _backgrounds(size)
    pairs = zip(names, rows, strict=True)
    return np.stack([coloured(modality, row).ravel() for (modality, _), row in pairs])


@cache
def _templates(
    size: int, organ: str, signs: Signs, side: str, level: str
) -> tuple[list[Finding], Grid, Grid]:
    """Marked findings at all the places where one can lie, with their masks, each (N, H, W)."""
    x, y = grid(size)
    findings, outers, hearts = [], [], []
    for kind in KINDS:
        for name in SIZES:
            finding = Finding(kind, name, side, level)
            for dx in _STEPS:
                for dy in _STEPS:
                    outer, heart = masks(finding, organ, signs, x, y, (dx, dy))
                    findings.append(finding)
                    outers.append(outer)
                    hearts.append(np.zeros_like(outer) if heart is None else heart)
    return findings, np.stack(outers), np.stack(hearts)


def measure(pixels: NDArray[np.uint8]) -> Measurement:
    """Finds modality, organ and findings in a picture, uint8 (size, size, 3) or (size, size).

    The nearest of all clean backgrounds is taken; then, quadrant by quadrant, the finding (or
    none) whose drawing explains the picture best, tried at the places where one can lie. It
    has to explain a good part of what is left, or there is none.
    """
    colours: Grid = (pixels / 255).astype(np.float32)
    if colours.ndim == 2:
        colours = np.repeat(colours[..., None], 3, -1)
    size = colours.shape[0]
    names, rows = _backgrounds(size)
    far = np.abs(_colours(size) - colours.reshape(1, -1)).mean(1)
    nearest = int(far.argmin())
    modality, organ = names[nearest]
    grey, clean = uncoloured(modality, colours), rows[nearest]
    redrawn, findings = clean, []
    for side in SIDES:
        for level in LEVELS:
            found = _best_finding(grey, clean, organ, signs_of(modality), side, level)
            if found is not None:
                findings.append(found[0])
                redrawn = np.where(found[1] != clean, found[1], redrawn).astype(np.float32)
    residual = float(np.abs(coloured(modality, redrawn) - colours).mean())
    return Measurement(modality, organ, tuple(findings), residual)


def _best_finding(
    grey: Grid, clean: Grid, organ: str, signs: Signs, side: str, level: str
) -> tuple[Finding, Grid] | None:
    found, outers, hearts = _templates(grey.shape[0], organ, signs, side, level)
    left = (grey - clean).ravel()
    best: tuple[float, Finding, Grid] | None = None
    for brightness in BRIGHTNESSES:
        each = len(found) // len(KINDS)
        for place, kind in enumerate(KINDS):
            own = slice(place * each, (place + 1) * each)
            finding = Finding(kind, "", side, level, brightness)
            heart = hearts[own] if signs.of(kind).heart is not None else None
            change = laid_over(clean, finding, signs, outers[own], heart) - clean
            flat = change.reshape(len(change), -1)
            # How much smaller the squared error gets by drawing it, and the finding's own energy:
            # equal for a perfect match.
            energy = np.einsum("ij,ij->i", flat, flat) + 1e-6
            gain = 2 * (flat @ left) - energy
            gain[gain <= _LEAST_GAIN * energy] = -np.inf
            top = int(gain.argmax())
            if np.isfinite(gain[top]) and (best is None or gain[top] > best[0]):
                size = found[own][top].size
                chosen = Finding(kind, size, side, level, brightness)
                best = (float(gain[top]), chosen, clean + change[top])
    return None if best is None else (best[1], best[2])
