"""What a picture shows, found in its pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
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
_LARGEST = 256  # pixels along a side
_STEPS = (-0.06, -0.03, 0.0, 0.03, 0.06)  # places at which a finding is tried


@dataclass(frozen=True)
class Measurement:
    """The nearest clean background and the findings laid over it.

    `residual` is the mean absolute difference to the picture drawn again, 0 to 1, in that square
    of a sixteenth of the picture where it is largest: a torn corner is not outweighed by the rest.
    """

    modality: str
    organ: str
    findings: tuple[Finding, ...]
    residual: float


class Background(NamedTuple):
    """A clean background: of what, how far it is moved (in units of half a picture), its scale."""

    modality: str
    organ: str
    dx: float
    dy: float
    scale: float

    def places(self, size: int) -> tuple[Grid, Grid]:
        """The organ's own x and y, each (size, size)."""
        x, y = grid(size)
        u, v = (x - self.dx) / self.scale, (y - self.dy) / self.scale
        return u.astype(np.float32), v.astype(np.float32)

    def grey(self, size: int) -> Grid:
        """(size, size)"""
        return background(self.modality, self.organ, *self.places(size))


@cache
def _backgrounds(size: int) -> tuple[list[Background], Grid]:
    """Every look and organ under small shifts and scales, and their greys (N, H, W)."""
    looks = []
    for modality in ALL_MODALITIES:
        for organ in organs_of(modality):
            for dx in (-SHIFT, 0.0, SHIFT):
                for dy in (-SHIFT, 0.0, SHIFT):
                    for scale in (1 - SCALE, 1.0, 1 + SCALE):
                        looks.append(Background(modality, organ, dx, dy, scale))
    return looks, np.stack([look.grey(size) for look in looks])


@cache
def _colours(size: int) -> Grid:
    """The same in colour, (N, H * W * 3)."""
    pairs = zip(*_backgrounds(size), strict=True)
    return np.stack([coloured(look.modality, row).ravel() for look, row in pairs])


def _nearest(colours: Grid) -> Background:
    """The background (H, W, 3) that differs least from a picture, on a fine grid of places."""
    size = colours.shape[0]
    far = np.abs(_colours(size) - colours.reshape(1, -1)).mean(1)
    best, least = _backgrounds(size)[0][int(far.argmin())], float(far.min())
    for part in (2, 4):
        moves = (-1 / part, 0.0, 1 / part)
        start = best
        for x, y, scale in product(moves, moves, moves):
            look = start._replace(
                dx=start.dx + x * SHIFT, dy=start.dy + y * SHIFT, scale=start.scale + scale * SCALE
            )
            found = float(np.abs(coloured(look.modality, look.grey(size)) - colours).mean())
            if found < least:
                best, least = look, found
    return best


@cache
def _templates(
    size: int, organ: str, signs: Signs, side: str, level: str
) -> tuple[list[tuple[Finding, tuple[float, float]]], Grid, Grid]:
    """Marked findings and how far they lie from their middle, at all the places where one can lie,
    with their masks, each (N, H, W)."""
    x, y = grid(size)
    findings, outers, hearts = [], [], []
    for kind in KINDS:
        for name in SIZES:
            finding = Finding(kind, name, side, level)
            for dx in _STEPS:
                for dy in _STEPS:
                    outer, heart = masks(finding, organ, signs, x, y, (dx, dy))
                    findings.append((finding, (dx, dy)))
                    outers.append(outer)
                    hearts.append(np.zeros_like(outer) if heart is None else heart)
    return findings, np.stack(outers), np.stack(hearts)


def measure(pixels: NDArray[np.uint8]) -> Measurement:
    """Finds modality, organ and findings in a picture, uint8 (size, size, 3) or (size, size).

    Raises ValueError for one that is not square, or larger than 256 pixels (shrink it: what is kept
    of all the looks grows with its area).

    The nearest of all clean backgrounds is taken; then, quadrant by quadrant, the finding (or
    none) whose drawing explains the picture best, tried at the places where one can lie. It
    has to explain a good part of what is left, or there is none.
    """
    colours: Grid = (pixels / 255).astype(np.float32)
    if colours.ndim == 2:
        colours = np.repeat(colours[..., None], 3, -1)
    size = colours.shape[0]
    if colours.shape[:2] != (size, size) or size > _LARGEST:
        raise ValueError(
            f"a picture of {colours.shape[:2]} pixels; expected a square up to {_LARGEST}"
        )
    look = _nearest(colours)
    modality, organ = look.modality, look.organ
    grey, clean = uncoloured(modality, colours), look.grey(size)
    redrawn, findings = clean, []
    for side in SIDES:
        for level in LEVELS:
            found = _best_finding(grey, clean, organ, signs_of(modality), side, level)
            if found is not None:
                findings.append(found[0])
                drawn = _settled(grey, clean, look, *found)
                redrawn = np.where(drawn != clean, drawn, redrawn).astype(np.float32)
    wrong = np.abs(coloured(modality, redrawn) - colours).mean(-1)
    quarter = max(size // 4, 1)
    residual = float(sliding_window_view(wrong, (quarter, quarter)).mean((2, 3)).max())
    return Measurement(modality, organ, tuple(findings), residual)


def _settled(
    grey: Grid, clean: Grid, look: Background, finding: Finding, place: tuple[float, float]
) -> Grid:
    """The clean background with a finding, at the place nearby that explains the picture best."""
    signs, (u, v) = signs_of(look.modality), look.places(len(grey))
    best, least = clean, np.inf
    for step in (0.02, 0.01, 0.005):
        start = place
        for right, down in product((-step, 0.0, step), repeat=2):
            moved = (start[0] + right, start[1] + down)
            lying = masks(finding, look.organ, signs, u, v, moved)
            drawn = laid_over(clean, finding, signs, *lying)
            error = float(np.square(drawn - grey).sum())
            if error < least:
                best, least, place = drawn, error, moved
    return best


def _best_finding(
    grey: Grid, clean: Grid, organ: str, signs: Signs, side: str, level: str
) -> tuple[Finding, tuple[float, float]] | None:
    """What lies in a quadrant, and how far from its middle."""
    found, outers, hearts = _templates(grey.shape[0], organ, signs, side, level)
    left = (grey - clean).ravel()
    best: tuple[float, Finding, tuple[float, float]] | None = None
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
                like, moved = found[own][top]
                best = (float(gain[top]), replace(like, brightness=brightness), moved)
    return None if best is None else (best[1], best[2])
