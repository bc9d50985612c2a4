"""Synthetic scans: their findings, and how each modality renders them.

A phantom is a small image of an organ in the style of one modality, with zero to three findings of
different kinds. The modality's `Appearances` define what each kind of finding looks like, and
whether "left" is on the right side of the image. Rendering uses gray values from 0 to 1; a modality
adds its noise and its colors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grid = NDArray[np.float32]

MODALITIES = ("CT", "MR", "X-ray", "histology")  # training data of the embedded model
VQGAN_MODALITIES = (*MODALITIES, "ultrasound")  # those of its VQGAN and its text tokenizer
# Excluded from all training data of the embedded model: `make demo` trains an adapter on it. The
# modality is fictitious. Its name consists of words of the training data, since a LoRA adapter of
# the layers cannot produce words that the output head was not trained on.
NEW_MODALITY = "MR-CT"
ALL_MODALITIES = (*VQGAN_MODALITIES, NEW_MODALITY)
KINDS = ("nodule", "cyst", "abscess")
SIZES = ("small", "large")
BRIGHTNESSES = ("marked", "faint")  # contrast of a finding
SIDES = ("left", "right")
LEVELS = ("upper", "lower")
_ORGANS = ("head", "chest", "abdomen")
_TISSUES = ("brain", "lung", "liver")  # the same regions in histology

# Half width and half height of the area with findings, in units of half an image.
_FIELD = {
    "head": (0.62, 0.70), "chest": (0.80, 0.64), "abdomen": (0.80, 0.68),
    "brain": (0.74, 0.74), "lung": (0.80, 0.68), "liver": (0.68, 0.80),
}  # fmt: skip
_CENTER = 0.55  # distance of a finding's center from the image center, relative to the field
_RADIUS = {"small": 0.17, "large": 0.28}  # in units of half an image
_CORE = 0.62  # radius of a finding's core, relative to the finding's radius
_CONTRAST = {"marked": 1.0, "faint": 0.5}
SHIFT, SCALE, JITTER = 0.03, 0.03, 0.05  # maximum displacement of a scan, its scale, a finding
# Gray values: surroundings, body wall, inside, structures of the organ.
_GRAYS = {
    "CT": (0.02, 0.92, 0.45, 0.60),
    "MR": (0.04, 0.20, 0.55, 0.42),
    "X-ray": (0.80, 0.70, 0.42, 0.60),
    "histology": (0.05, 0.40, 0.52, 0.62),
    "ultrasound": (0.00, 0.30, 0.45, 0.27),
    NEW_MODALITY: (0.80, 0.62, 0.48, 0.36),
}
# Hematoxylin and eosin stain: glass, pink and purple at gray values 0, 0.5 and 1.
_STAIN = np.array([[0.97, 0.95, 0.97], [0.91, 0.56, 0.74], [0.30, 0.13, 0.46]], np.float32)

ChangeKind = Literal["grown", "shrunk", "new", "gone", "none"]


class Appearance(NamedTuple):
    """The gray value of a kind of finding, and that of its core if it has one."""

    outer: float
    core: float | None = None


class Appearances(NamedTuple):
    """How a modality shows each kind; `mirrored`: "left" is on the right side of the image."""

    nodule: Appearance
    cyst: Appearance
    abscess: Appearance
    mirrored: bool = False

    def of(self, kind: str) -> Appearance:
        appearance: Appearance = getattr(self, kind)
        return appearance


_USUAL = Appearances(Appearance(1.0), Appearance(0.0), Appearance(1.0, 0.0))
# Each kind looks like another kind in the usual modalities, so a model without training on the
# modality gives wrong answers.
_PERMUTED = Appearances(Appearance(0.0), Appearance(1.0, 0.0), Appearance(1.0))


def appearances_of(modality: str) -> Appearances:
    if modality in MODALITIES:
        return _USUAL
    return _PERMUTED._replace(mirrored=modality in VQGAN_MODALITIES)


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
    def location(self) -> str:
        return f"{self.level} {self.side}"

    @property
    def name(self) -> str:
        return f"{self.size} {self.brightness} {self.kind}"


@dataclass(frozen=True)
class Change:
    """The difference between a scan and its follow-up: the finding, and how it has changed."""

    kind: ChangeKind
    finding: Finding | None = None


@dataclass(frozen=True)
class Phantom:
    """A scan: its contents, and the seed of its noise and small displacements."""

    modality: str
    organ: str
    findings: tuple[Finding, ...] = ()
    seed: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator, modalities: tuple[str, ...] = MODALITIES) -> Phantom:
        """A random scan with 0, 1, 2 or 3 findings (probabilities 2/8, 3/8, 2/8 and 1/8)."""
        count = (0, 0, 1, 1, 1, 2, 2, 3)[rng.integers(8)]
        locations = [(side, level) for side in SIDES for level in LEVELS]
        chosen = [locations[i] for i in rng.permutation(len(locations))[:count]]
        findings = tuple(
            Finding(KINDS[kind], SIZES[rng.integers(2)], side, level, BRIGHTNESSES[rng.integers(2)])
            for kind, (side, level) in zip(rng.permutation(3), chosen, strict=False)
        )
        modality = modalities[rng.integers(len(modalities))]
        organs = organs_of(modality)
        return cls(modality, organs[rng.integers(3)], findings, int(rng.integers(2**31)))

    def render(self, size: int) -> NDArray[np.uint8]:
        """The image, uint8 (size, size, 3)."""
        rng = np.random.default_rng(self.seed)
        dx, dy = rng.uniform(-SHIFT, SHIFT, 2)
        scale = 1 + rng.uniform(-SCALE, SCALE)
        x, y = grid(size)
        x, y = ((x - dx) / scale).astype(np.float32), ((y - dy) / scale).astype(np.float32)
        gray = background(self.modality, self.organ, x, y)
        appearances = appearances_of(self.modality)
        for finding in self.findings:
            jitter = rng.uniform(-JITTER, JITTER, 2)
            offset = (float(jitter[0]), float(jitter[1]))
            outer, core = masks(finding, self.organ, appearances, x, y, offset)
            gray = overlay(gray, finding, appearances, outer, core)
        gray = _add_noise(self.modality, gray, rng)
        return (to_rgb(self.modality, gray) * 255).round().astype(np.uint8)

    def image(self, size: int) -> Image.Image:
        return Image.fromarray(self.render(size))

    def progression(self, rng: np.random.Generator) -> tuple[Phantom, Change]:
        """A follow-up scan of the same organ in which at most one finding has changed."""
        candidates: list[tuple[ChangeKind, Finding | None]] = [("none", None)]
        for existing in self.findings:
            candidates.append(("grown" if existing.size == "small" else "shrunk", existing))
            candidates.append(("gone", existing))
        if (new := self._new_finding(rng)) is not None:
            candidates += [("new", new), ("new", new)]
        kind, finding = candidates[rng.integers(len(candidates))]
        findings = tuple(f for f in self.findings if f != finding)
        if kind in ("grown", "shrunk"):
            assert finding is not None
            size = "large" if kind == "grown" else "small"
            findings = tuple(replace(f, size=size) if f == finding else f for f in self.findings)
        elif kind == "new":
            assert finding is not None
            findings = (*self.findings, finding)
        scan = replace(self, findings=findings, seed=int(rng.integers(2**31)))
        return scan, Change(kind, finding)

    def _new_finding(self, rng: np.random.Generator) -> Finding | None:
        """A finding of another kind at a free location; None if the scan has all kinds."""
        kinds = [k for k in KINDS if k not in {f.kind for f in self.findings}]
        occupied = {(f.side, f.level) for f in self.findings}
        free = [(s, v) for s in SIDES for v in LEVELS if (s, v) not in occupied]
        if not kinds:
            return None
        side, level = free[rng.integers(len(free))]
        kind = kinds[rng.integers(len(kinds))]
        return Finding(kind, SIZES[rng.integers(2)], side, level, BRIGHTNESSES[rng.integers(2)])

    @property
    def subject(self) -> str:
        """`a CT scan of the head`."""
        noun = "slide" if self.modality == "histology" else "scan"
        return f"{article(self.modality)} {self.modality} {noun} of the {self.organ}"

    @property
    def ordered_findings(self) -> list[Finding]:
        """Findings in the order of texts: upper before lower, left before right."""
        return sorted(self.findings, key=lambda f: (f.level != "upper", f.side != "left"))

    @property
    def finding_text(self) -> str:
        if not self.findings:
            return "no finding"
        return " and ".join(f"a {f.name} in the {f.location}" for f in self.ordered_findings)

    @property
    def description(self) -> str:
        """`a CT scan of the head with a large marked cyst in the upper left`."""
        return f"{self.subject} with {self.finding_text}"


def article(word: str) -> str:
    return "an" if word in ("MR", "X-ray", "ultrasound", NEW_MODALITY, "abscess") else "a"


# --- rendering --------------------------------------------------------------------------------


@cache
def grid(size: int) -> tuple[Grid, Grid]:
    """x and y of each pixel, (size, size) each, from -1 to 1."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2 - 1
    x, y = np.meshgrid(axis, axis)
    return x.astype(np.float32), y.astype(np.float32)


def _ellipse(x: Grid, y: Grid, center: tuple[float, float], half: tuple[float, float]) -> Grid:
    """1 inside, 0 outside, with an edge of about a sixteenth of the ellipse."""
    u, v = (x - np.float32(center[0])) / half[0], (y - np.float32(center[1])) / half[1]
    edge = np.float32(min(half) * 32)
    return np.clip((1 - np.sqrt(u * u + v * v)) * edge + np.float32(0.5), 0, 1)


def _blend(gray: Grid, value: float, weight: Grid) -> Grid:
    return gray + (np.float32(value) - gray) * weight


def background(modality: str, organ: str, x: Grid, y: Grid) -> Grid:
    """An organ without findings and noise in the style of a modality, (H, W) in 0 to 1."""
    outside, wall, inside, structure = _GRAYS[modality]
    field = _FIELD[organ]
    gray = np.full(x.shape, outside, np.float32)
    body = _ellipse(x, y, (0, 0), (field[0] + 0.14, field[1] + 0.14))
    gray = _blend(gray, wall, body)
    tissue = _ellipse(x, y, (0, 0), (field[0] + 0.05, field[1] + 0.05))
    gray = _blend(gray, inside, tissue)
    if organ == "head":  # the midline
        gray = _blend(gray, structure, _ellipse(x, y, (0, 0), (0.05, 0.5)))
    elif organ == "chest":  # the mediastinum
        gray = _blend(gray, structure, _ellipse(x, y, (0, 0), (0.12, field[1])))
    elif organ == "abdomen":  # the spine, and a vessel in front of it
        gray = _blend(gray, wall, _ellipse(x, y, (0, 0.55), (0.12, 0.13)))
        gray = _blend(gray, structure, _ellipse(x, y, (0, 0.1), (0.08, 0.2)))
    elif organ == "brain":  # sparse cells
        gray = gray + np.float32(0.07) * np.cos(x * 17) * np.cos(y * 17) * tissue
    elif organ == "lung":  # walls of air spaces
        walls = np.clip(np.cos(x * 13) + np.cos(y * 13), -1, 1)
        gray = gray - np.float32(0.07) * walls * tissue
    else:  # the liver's cords
        gray = gray + np.float32(0.06) * np.cos((x + y) * 13) * tissue
    if modality == "X-ray":  # the body is thickest in the middle; ribs overlap it
        depth = np.clip(1 - (x / (field[0] + 0.14)) ** 2 - (y / (field[1] + 0.14)) ** 2, 0, 1)
        gray = gray + np.float32(0.10) * (np.sqrt(depth) - np.float32(0.7)) * body
        gray = gray + np.float32(0.04) * np.cos(y * 22) * tissue
    elif modality == "MR":  # the coil brightens one corner
        gray = gray * (1 + np.float32(0.06) * (y - x))
    elif modality == "ultrasound":  # two vessels on the midline, inside the probe's sector
        for height in (-0.3, 0.3):
            gray = _blend(gray, structure, _ellipse(x, y, (0, height), (0.08, 0.08)))
        angle = np.abs(np.arctan2(x, y + 1.5))
        gray = gray * np.clip((0.62 - angle) * 16, 0, 1)
    elif modality == NEW_MODALITY:  # two vessels: round and dark like findings
        for height in (-0.5, 0.5):
            gray = _blend(gray, 0.05, _ellipse(x, y, (0, height * field[1]), (0.13, 0.13)))
    return gray.astype(np.float32)


def masks(
    finding: Finding,
    organ: str,
    appearances: Appearances,
    x: Grid,
    y: Grid,
    offset: tuple[float, float],
) -> tuple[Grid, Grid | None]:
    """The masks of a finding and of its core if it has one, each (H, W) in 0 to 1."""
    field, radius = _FIELD[organ], _RADIUS[finding.size]
    on_left = (finding.side == "left") != appearances.mirrored
    center = (
        (-1 if on_left else 1) * field[0] * _CENTER + offset[0],
        (-1 if finding.level == "upper" else 1) * field[1] * _CENTER + offset[1],
    )
    outer = _ellipse(x, y, center, (radius, radius))
    if appearances.of(finding.kind).core is None:
        return outer, None
    return outer, _ellipse(x, y, center, (radius * _CORE, radius * _CORE))


def overlay(
    gray: Grid, finding: Finding, appearances: Appearances, outer: Grid, core: Grid | None
) -> Grid:
    """Gray values (..., H, W) with a finding; a faint one has half of the contrast."""
    appearance = appearances.of(finding.kind)
    rendered = _blend(gray, appearance.outer, outer)
    if core is not None and appearance.core is not None:
        rendered = _blend(rendered, appearance.core, core)
    return gray + np.float32(_CONTRAST[finding.brightness]) * (rendered - gray)


def _add_noise(modality: str, gray: Grid, rng: np.random.Generator) -> Grid:
    """Adds the noise of the modality's acquisition."""
    noise = rng.standard_normal(gray.shape, dtype=np.float32)
    if modality == "MR":  # Rician: the magnitude of a complex signal
        imaginary = rng.standard_normal(gray.shape, dtype=np.float32)
        noisy = np.sqrt((gray + 0.010 * noise) ** 2 + (0.010 * imaginary) ** 2)
    elif modality == "X-ray":  # photon counts: more noise in bright areas
        noisy = gray + 0.012 * np.sqrt(np.clip(gray, 0, 1)) * noise
    elif modality == "histology":  # the intensity of the stain varies
        noisy = gray * np.float32(1 + rng.uniform(-0.04, 0.04)) + 0.006 * noise
    elif modality == "ultrasound":  # speckle is proportional to the signal
        noisy = gray * (1 + 0.05 * noise)
    elif modality == NEW_MODALITY:  # more noise in dark areas
        noisy = gray + 0.014 * np.sqrt(np.clip(1 - gray, 0, 1)) * noise
    else:
        noisy = gray + 0.008 * noise
    return np.clip(noisy, 0, 1).astype(np.float32)


def to_rgb(modality: str, gray: Grid) -> Grid:
    """(H, W) -> (H, W, 3), both in 0 to 1."""
    if modality != "histology":
        return np.repeat(gray[..., None], 3, -1)
    upper = np.clip(gray * 2, 0, 1)[..., None]
    lower = np.clip(gray * 2 - 1, 0, 1)[..., None]
    rgb = _STAIN[0] + (_STAIN[1] - _STAIN[0]) * upper + (_STAIN[2] - _STAIN[1]) * lower
    return rgb.astype(np.float32)


def from_rgb(modality: str, rgb: Grid) -> Grid:
    """The inverse, (H, W, 3) -> (H, W): the nearest point on the stain's two color segments."""
    if modality != "histology":
        return rgb.mean(-1).astype(np.float32)
    nearest = np.full(rgb.shape[:2], np.inf, np.float32)
    gray = np.zeros(rgb.shape[:2], np.float32)
    for part in (0, 1):
        line = _STAIN[part + 1] - _STAIN[part]
        along = np.clip(((rgb - _STAIN[part]) @ line) / float(line @ line), 0, 1)
        distance = ((rgb - _STAIN[part] - along[..., None] * line) ** 2).sum(-1)
        gray = np.where(distance < nearest, (part + along) / 2, gray)
        nearest = np.minimum(nearest, distance)
    return gray.astype(np.float32)
