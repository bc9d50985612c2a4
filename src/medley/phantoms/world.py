"""Scans, what they show, and how each modality makes it look.

A phantom is a small picture of an organ in the look of one modality, with zero to three findings of
different kinds. What a kind of finding looks like, and on which side of the picture "left" lies, is
told by the modality's `Signs`. Everything is drawn on one scale from 0 to 1; a modality adds its
noise and its colours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grid = NDArray[np.float32]

MODALITIES = ("CT", "MR", "X-ray", "histology")  # what the embedded model has learned
VQGAN_MODALITIES = (*MODALITIES, "ultrasound")  # what its VQGAN and its text tokenizer have
# Kept out of all of its training: the adapter of `make demo` learns it. Made up, and named by words
# that the model knows: an adapter of the layers cannot spell what the output head never learned.
NEW_MODALITY = "MR-CT"
ALL_MODALITIES = (*VQGAN_MODALITIES, NEW_MODALITY)
KINDS = ("nodule", "cyst", "abscess")
SIZES = ("small", "large")
BRIGHTNESSES = ("marked", "faint")  # how far a finding stands out
SIDES = ("left", "right")
LEVELS = ("upper", "lower")
_ORGANS = ("head", "chest", "abdomen")
_TISSUES = ("brain", "lung", "liver")  # the same fields, on a slide

# Half width and half height of the field in which findings lie, in units of half a picture; a
# finding's centre stands at about 0.55 of it from the middle.
_FIELD = {
    "head": (0.62, 0.70), "chest": (0.80, 0.64), "abdomen": (0.80, 0.68),
    "brain": (0.74, 0.74), "lung": (0.80, 0.68), "liver": (0.68, 0.80),
}  # fmt: skip
_RADIUS = {"small": 0.17, "large": 0.28}  # in units of half a picture
_HEART = 0.62  # of a finding's radius: how far a heart of another grey reaches
_STRENGTH = {"marked": 1.0, "faint": 0.5}
_CENTRE = 0.55  # of the field's half width: how far from the middle a finding is drawn
SHIFT, SCALE, JITTER = 0.03, 0.03, 0.05  # the most that a scan, or a finding in it, is moved
# Greys: surroundings, wall of the body, inside, structures of the organ.
_LOOK = {
    "CT": (0.02, 0.92, 0.45, 0.60),
    "MR": (0.04, 0.20, 0.55, 0.42),
    "X-ray": (0.80, 0.70, 0.42, 0.60),
    "histology": (0.05, 0.40, 0.52, 0.62),
    "ultrasound": (0.00, 0.30, 0.45, 0.27),
    NEW_MODALITY: (0.80, 0.62, 0.48, 0.36),
}
# Haematoxylin and eosin: glass, pink, purple, at 0, 0.5 and 1.
_STAIN = np.array([[0.97, 0.95, 0.97], [0.91, 0.56, 0.74], [0.30, 0.13, 0.46]], np.float32)

ChangeKind = Literal["grown", "shrunk", "new", "gone", "none"]


class Sign(NamedTuple):
    """The grey of a kind of finding, and that of its heart if it has one."""

    outer: float
    heart: float | None = None


class Signs(NamedTuple):
    """How a modality shows each kind; `mirrored`: "left" lies on the right of its pictures."""

    nodule: Sign
    cyst: Sign
    abscess: Sign
    mirrored: bool = False

    def of(self, kind: str) -> Sign:
        found: Sign = getattr(self, kind)
        return found


_USUAL = Signs(nodule=Sign(1.0), cyst=Sign(0.0), abscess=Sign(1.0, 0.0))
# Each kind looks as another does elsewhere: who has not learned the modality cannot read it.
_OTHER = Signs(nodule=Sign(0.0), cyst=Sign(1.0, 0.0), abscess=Sign(1.0))


def signs_of(modality: str) -> Signs:
    if modality in MODALITIES:
        return _USUAL
    return _OTHER._replace(mirrored=modality in VQGAN_MODALITIES)


def organs_of(modality: str) -> tuple[str, ...]:
    return _TISSUES if modality == "histology" else _ORGANS


@dataclass(frozen=True)
class Finding:
    kind: str
    size: str
    side: str
    level: str
    brightness: str = "marked"

    @property
    def place(self) -> str:
        return f"{self.level} {self.side}"

    @property
    def name(self) -> str:
        return f"{self.size} {self.brightness} {self.kind}"


@dataclass(frozen=True)
class Change:
    """What is different in a later scan: of which finding, and how."""

    kind: ChangeKind
    finding: Finding | None = None


@dataclass(frozen=True)
class Phantom:
    """One scan: what it shows, and the seed of its noise and small shifts."""

    modality: str
    organ: str
    findings: tuple[Finding, ...] = ()
    seed: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator, modalities: tuple[str, ...] = MODALITIES) -> Phantom:
        """Draws a scan: no finding in 2 of 8, one in 3 of 8, two in 2 of 8, three in 1 of 8."""
        count = (0, 0, 1, 1, 1, 2, 2, 3)[rng.integers(8)]
        places = [(side, level) for side in SIDES for level in LEVELS]
        chosen = [places[i] for i in rng.permutation(len(places))[:count]]
        findings = tuple(
            Finding(KINDS[kind], SIZES[rng.integers(2)], side, level, BRIGHTNESSES[rng.integers(2)])
            for kind, (side, level) in zip(rng.permutation(3), chosen, strict=False)
        )
        modality = modalities[rng.integers(len(modalities))]
        organs = organs_of(modality)
        return cls(modality, organs[rng.integers(3)], findings, int(rng.integers(2**31)))

    def draw(self, size: int) -> NDArray[np.uint8]:
        """The picture, uint8 (size, size, 3)."""
        rng = np.random.default_rng(self.seed)
        dx, dy = rng.uniform(-SHIFT, SHIFT, 2)
        scale = 1 + rng.uniform(-SCALE, SCALE)
        x, y = grid(size)
        x, y = ((x - dx) / scale).astype(np.float32), ((y - dy) / scale).astype(np.float32)
        grey = background(self.modality, self.organ, x, y)
        for finding in self.findings:
            jitter = rng.uniform(-JITTER, JITTER, 2)
            moved = (float(jitter[0]), float(jitter[1]))
            lying = masks(finding, self.organ, signs_of(self.modality), x, y, moved)
            grey = laid_over(grey, finding, signs_of(self.modality), *lying)
        grey = _noisy(self.modality, grey, rng)
        return (coloured(self.modality, grey) * 255).round().astype(np.uint8)

    def image(self, size: int) -> Image.Image:
        return Image.fromarray(self.draw(size))

    def later(self, rng: np.random.Generator) -> tuple[Phantom, Change]:
        """A second scan of the same organ, in which at most one finding has changed."""
        kinds: list[tuple[ChangeKind, Finding | None]] = [("none", None)]
        for there in self.findings:
            kinds.append(("grown" if there.size == "small" else "shrunk", there))
            kinds.append(("gone", there))
        if (new := self._possible(rng)) is not None:
            kinds += [("new", new), ("new", new)]
        kind, finding = kinds[rng.integers(len(kinds))]
        kept = tuple(f for f in self.findings if f != finding)
        if kind in ("grown", "shrunk"):
            assert finding is not None
            size = "large" if kind == "grown" else "small"
            kept = tuple(replace(f, size=size) if f == finding else f for f in self.findings)
        elif kind == "new":
            assert finding is not None
            kept = (*self.findings, finding)
        scan = replace(self, findings=kept, seed=int(rng.integers(2**31)))
        return scan, Change(kind, finding)

    def _possible(self, rng: np.random.Generator) -> Finding | None:
        """A finding of another kind in a free place; None for a scan that has all kinds."""
        kinds = [k for k in KINDS if k not in {f.kind for f in self.findings}]
        taken = {(f.side, f.level) for f in self.findings}
        free = [(s, v) for s in SIDES for v in LEVELS if (s, v) not in taken]
        if not kinds:
            return None
        side, level = free[rng.integers(len(free))]
        kind = kinds[rng.integers(len(kinds))]
        return Finding(kind, SIZES[rng.integers(2)], side, level, BRIGHTNESSES[rng.integers(2)])

    @property
    def subject(self) -> str:
        """`a CT scan of the head`."""
        what = "slide" if self.modality == "histology" else "scan"
        return f"{article(self.modality)} {self.modality} {what} of the {self.organ}"

    @property
    def ordered(self) -> list[Finding]:
        """Findings as they are told: upper before lower, left before right."""
        return sorted(self.findings, key=lambda f: (f.level != "upper", f.side != "left"))

    @property
    def finding_text(self) -> str:
        if not self.findings:
            return "no finding"
        return " and ".join(f"a {f.name} in the {f.place}" for f in self.ordered)

    @property
    def description(self) -> str:
        """`a CT scan of the head with a large marked cyst in the upper left`."""
        return f"{self.subject} with {self.finding_text}"


def article(word: str) -> str:
    return "an" if word in ("MR", "X-ray", "ultrasound", NEW_MODALITY, "abscess") else "a"


# --- drawing ----------------------------------------------------------------------------------


@cache
def grid(size: int) -> tuple[Grid, Grid]:
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2 - 1
    x, y = np.meshgrid(axis, axis)
    return x.astype(np.float32), y.astype(np.float32)


def _ellipse(x: Grid, y: Grid, centre: tuple[float, float], half: tuple[float, float]) -> Grid:
    """1 inside, 0 outside, with an edge of about a sixteenth of the ellipse."""
    u, v = (x - np.float32(centre[0])) / half[0], (y - np.float32(centre[1])) / half[1]
    edge = np.float32(min(half) * 32)
    return np.clip((1 - np.sqrt(u * u + v * v)) * edge + np.float32(0.5), 0, 1)


def _blend(grey: Grid, value: float, weight: Grid) -> Grid:
    return grey + (np.float32(value) - grey) * weight


def background(modality: str, organ: str, x: Grid, y: Grid) -> Grid:
    """A clean organ in the look of a modality, without noise, (H, W) in 0 to 1."""
    outside, wall, inside, structure = _LOOK[modality]
    field = _FIELD[organ]
    grey = np.full(x.shape, outside, np.float32)
    body = _ellipse(x, y, (0, 0), (field[0] + 0.14, field[1] + 0.14))
    grey = _blend(grey, wall, body)
    tissue = _ellipse(x, y, (0, 0), (field[0] + 0.05, field[1] + 0.05))
    grey = _blend(grey, inside, tissue)
    if organ == "head":  # a midline
        grey = _blend(grey, structure, _ellipse(x, y, (0, 0), (0.05, 0.5)))
    elif organ == "chest":  # what lies between the lungs
        grey = _blend(grey, structure, _ellipse(x, y, (0, 0), (0.12, field[1])))
    elif organ == "abdomen":  # a spine, and a vessel before it
        grey = _blend(grey, wall, _ellipse(x, y, (0, 0.55), (0.12, 0.13)))
        grey = _blend(grey, structure, _ellipse(x, y, (0, 0.1), (0.08, 0.2)))
    elif organ == "brain":  # cells, far apart
        grey = grey + np.float32(0.07) * np.cos(x * 17) * np.cos(y * 17) * tissue
    elif organ == "lung":  # walls of air spaces
        walls = np.clip(np.cos(x * 13) + np.cos(y * 13), -1, 1)
        grey = grey - np.float32(0.07) * walls * tissue
    else:  # the liver's cords
        grey = grey + np.float32(0.06) * np.cos((x + y) * 13) * tissue
    if modality == "X-ray":  # a body is thickest in its middle; ribs lie over it
        depth = np.clip(1 - (x / (field[0] + 0.14)) ** 2 - (y / (field[1] + 0.14)) ** 2, 0, 1)
        grey = grey + np.float32(0.10) * (np.sqrt(depth) - np.float32(0.7)) * body
        grey = grey + np.float32(0.04) * np.cos(y * 22) * tissue
    elif modality == "MR":  # a coil brightens one corner
        grey = grey * (1 + np.float32(0.06) * (y - x))
    elif modality == "ultrasound":  # two vessels on the midline, in the fan that a probe sees
        for height in (-0.3, 0.3):
            grey = _blend(grey, structure, _ellipse(x, y, (0, height), (0.08, 0.08)))
        angle = np.abs(np.arctan2(x, y + 1.5))
        grey = grey * np.clip((0.62 - angle) * 16, 0, 1)
    elif modality == NEW_MODALITY:  # two vessels: round, dark, and no finding
        for height in (-0.5, 0.5):
            grey = _blend(grey, 0.05, _ellipse(x, y, (0, height * field[1]), (0.13, 0.13)))
    return grey.astype(np.float32)


def masks(
    finding: Finding, organ: str, signs: Signs, x: Grid, y: Grid, jitter: tuple[float, float]
) -> tuple[Grid, Grid | None]:
    """Where a finding lies, and its heart if it has one, each (H, W) in 0 to 1."""
    field, radius = _FIELD[organ], _RADIUS[finding.size]
    centre = (
        (-1 if (finding.side == "left") != signs.mirrored else 1) * field[0] * _CENTRE + jitter[0],
        (-1 if finding.level == "upper" else 1) * field[1] * _CENTRE + jitter[1],
    )
    outer = _ellipse(x, y, centre, (radius, radius))
    if signs.of(finding.kind).heart is None:
        return outer, None
    return outer, _ellipse(x, y, centre, (radius * _HEART, radius * _HEART))


def laid_over(grey: Grid, finding: Finding, signs: Signs, outer: Grid, heart: Grid | None) -> Grid:
    """Grey (..., H, W) with a finding in it; a faint one goes half of the way."""
    sign = signs.of(finding.kind)
    drawn = _blend(grey, sign.outer, outer)
    if heart is not None and sign.heart is not None:
        drawn = _blend(drawn, sign.heart, heart)
    return grey + np.float32(_STRENGTH[finding.brightness]) * (drawn - grey)


def _noisy(modality: str, grey: Grid, rng: np.random.Generator) -> Grid:
    """What the way of taking a picture adds."""
    noise = rng.standard_normal(grey.shape, dtype=np.float32)
    if modality == "MR":  # the magnitude of a complex signal: Rician
        other = rng.standard_normal(grey.shape, dtype=np.float32)
        found = np.sqrt((grey + 0.010 * noise) ** 2 + (0.010 * other) ** 2)
    elif modality == "X-ray":  # counted photons: more noise where it is brighter
        found = grey + 0.012 * np.sqrt(np.clip(grey, 0, 1)) * noise
    elif modality == "histology":  # a slide is stained a little more or less
        found = grey * np.float32(1 + rng.uniform(-0.04, 0.04)) + 0.006 * noise
    elif modality == "ultrasound":  # speckle grows with the signal
        found = grey * (1 + 0.05 * noise)
    elif modality == NEW_MODALITY:  # more noise where it is darker
        found = grey + 0.014 * np.sqrt(np.clip(1 - grey, 0, 1)) * noise
    else:
        found = grey + 0.008 * noise
    return np.clip(found, 0, 1).astype(np.float32)


def coloured(modality: str, grey: Grid) -> Grid:
    """(H, W) -> (H, W, 3), both in 0 to 1."""
    if modality != "histology":
        return np.repeat(grey[..., None], 3, -1)
    upper = np.clip(grey * 2, 0, 1)[..., None]
    lower = np.clip(grey * 2 - 1, 0, 1)[..., None]
    found = _STAIN[0] + (_STAIN[1] - _STAIN[0]) * upper + (_STAIN[2] - _STAIN[1]) * lower
    return found.astype(np.float32)


def uncoloured(modality: str, colours: Grid) -> Grid:
    """The inverse, (H, W, 3) -> (H, W): the point of the stain's two lines that lies nearest."""
    if modality != "histology":
        return colours.mean(-1).astype(np.float32)
    best = np.full(colours.shape[:2], np.inf, np.float32)
    found = np.zeros(colours.shape[:2], np.float32)
    for part in (0, 1):
        line = _STAIN[part + 1] - _STAIN[part]
        place = np.clip(((colours - _STAIN[part]) @ line) / float(line @ line), 0, 1)
        far = ((colours - _STAIN[part] - place[..., None] * line) ** 2).sum(-1)
        found = np.where(far < best, (part + place) / 2, found)
        best = np.minimum(best, far)
    return found.astype(np.float32)
