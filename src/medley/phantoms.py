"""Drawn scans whose true contents are known: the data of the embedded model.

A phantom is a small grey picture of an organ in the look of one modality, with zero to two
findings. Everything that can be asked about it is known by construction, and `measure` reads
the findings back from pixels, so that a generated picture is scored without a human or a
judge. Sides are sides of the picture (its left is "left"), not of a patient.

    scan = Phantom.random(numpy.random.default_rng(0))
    pixels = scan.draw(size=64)          # uint8 (64, 64)
    measure(pixels).findings             # the same findings
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medley.document import Document, Part, Picture, Turn

Grid = NDArray[np.float32]

MODALITIES = ("CT", "MR", "X-ray")  # what the embedded model has seen
NEW_MODALITY = "ultrasound"  # kept out of its training: the adapter of `make demo` learns it
ALL_MODALITIES = (*MODALITIES, NEW_MODALITY)
ORGANS = ("head", "chest", "abdomen")
KINDS = ("nodule", "cyst", "abscess")
SIZES = ("small", "large")
SIDES = ("left", "right")
LEVELS = ("upper", "lower")

# Half width and half height of the field in which findings lie, for each organ, in units of
# half a picture; a finding's centre stands at about 0.55 of it from the middle.
_FIELD = {"head": (0.58, 0.68), "chest": (0.78, 0.58), "abdomen": (0.80, 0.64)}
_RADIUS = {"small": 0.13, "large": 0.21}  # in units of half a picture
# Grey values: surroundings, wall of the body, inside, structures of the organ.
_LOOK = {
    "CT": (0.02, 0.95, 0.45, 0.62),
    "MR": (0.04, 0.20, 0.60, 0.42),
    "X-ray": (0.75, 0.88, 0.38, 0.55),
    "ultrasound": (0.00, 0.30, 0.42, 0.24),
}
_CENTRE = 0.55  # of the field's half width: how far from the middle a finding is drawn


@dataclass(frozen=True)
class Finding:
    kind: str
    size: str
    side: str
    level: str

    @property
    def place(self) -> str:
        return f"{self.level} {self.side}"

    @property
    def name(self) -> str:
        return f"{self.size} {self.kind}"


@dataclass(frozen=True)
class Phantom:
    """One scan: what it shows, and the seed of its noise and small shifts."""

    modality: str
    organ: str
    findings: tuple[Finding, ...] = ()
    seed: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator, modalities: tuple[str, ...] = MODALITIES) -> Phantom:
        """Draws a scan: no finding in 2 of 5, one in 2 of 5, two in 1 of 5."""
        count = int(rng.choice([0, 0, 1, 1, 2]))
        places = [(side, level) for side in SIDES for level in LEVELS]
        chosen = [places[i] for i in rng.permutation(len(places))[:count]]
        kinds = rng.permutation(KINDS)[:count]
        findings = tuple(
            Finding(str(kind), str(rng.choice(SIZES)), side, level)
            for kind, (side, level) in zip(kinds, chosen, strict=True)
        )
        modality, organ = str(rng.choice(modalities)), str(rng.choice(ORGANS))
        return cls(modality, organ, findings, int(rng.integers(2**31)))

    def draw(self, size: int) -> NDArray[np.uint8]:
        """The picture, uint8 (size, size)."""
        rng = np.random.default_rng(self.seed)
        shift = rng.uniform(-0.03, 0.03, 2)
        scale = rng.uniform(0.97, 1.03)
        x, y = _grid(size)
        x, y = (x - shift[0]) / scale, (y - shift[1]) / scale
        grey = _background(self.modality, self.organ, x, y)
        for finding in self.findings:
            jitter = rng.uniform(-0.05, 0.05, 2)
            grey = _draw_finding(grey, finding, self.organ, x, y, jitter)
        noise = rng.standard_normal((size, size), dtype=np.float32)
        if self.modality == "ultrasound":  # speckle grows with the signal
            grey = grey * (1 + 0.05 * noise)
        else:
            grey = grey + 0.008 * noise
        return (grey.clip(0, 1) * 255).round().astype(np.uint8)

    def image(self, size: int) -> Image.Image:
        return Image.fromarray(self.draw(size)).convert("RGB")

    @property
    def description(self) -> str:
        """`a CT scan of the head with a large cyst in the upper left`."""
        return f"{self.subject} with {self.finding_text}"

    @property
    def subject(self) -> str:
        return f"{_article(self.modality)} {self.modality} scan of the {self.organ}"

    @property
    def finding_text(self) -> str:
        if not self.findings:
            return "no finding"
        ordered = sorted(self.findings, key=lambda f: (f.level != "upper", f.side != "left"))
        return " and ".join(f"a {f.name} in the {f.place}" for f in ordered)


@cache
def _grid(size: int) -> tuple[Grid, Grid]:
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2 - 1
    x, y = np.meshgrid(axis, axis)
    return x.astype(np.float32), y.astype(np.float32)


def _ellipse(x: Grid, y: Grid, centre: tuple[float, float], half: tuple[float, float]) -> Grid:
    """1 inside, 0 outside, with an edge of about a sixteenth of the ellipse."""
    radius = np.sqrt(((x - centre[0]) / half[0]) ** 2 + ((y - centre[1]) / half[1]) ** 2)
    return ((1 - radius) * (min(half) * 32) + 0.5).clip(0, 1).astype(np.float32)


def _blend(grey: Grid, value: float, weight: Grid) -> Grid:
    return grey + (value - grey) * weight


def _background(modality: str, organ: str, x: Grid, y: Grid) -> Grid:
    outside, wall, inside, structure = _LOOK[modality]
    field = _FIELD[organ]
    grey = np.full(x.shape, outside, np.float32)
    grey = _blend(grey, wall, _ellipse(x, y, (0, 0), (field[0] + 0.16, field[1] + 0.16)))
    grey = _blend(grey, inside, _ellipse(x, y, (0, 0), (field[0] + 0.05, field[1] + 0.05)))
    if organ == "head":  # a midline
        grey = _blend(grey, structure, _ellipse(x, y, (0, 0), (0.06, 0.5)))
    elif organ == "chest":  # the heart, and what lies between the lungs
        grey = _blend(grey, structure, _ellipse(x, y, (0, 0), (0.13, field[1])))
        grey = _blend(grey, structure, _ellipse(x, y, (0.05, 0.1), (0.2, 0.2)))
    else:  # a spine, and the liver's edge
        grey = _blend(grey, wall, _ellipse(x, y, (0, 0.5), (0.11, 0.13)))
        grey = _blend(grey, structure, _ellipse(x, y, (-0.1, -0.05), (0.12, 0.22)))
    if modality == "X-ray":  # ribs
        ribs: Grid = (0.05 * np.cos(y * 22)).astype(np.float32)
        grey = grey + ribs * _ellipse(x, y, (0, 0), field)
    elif modality == "MR":  # a coil brightens one corner
        grey = grey * (1 + np.float32(0.05) * (y - x))
    elif modality == "ultrasound":  # the fan that a probe sees
        angle = np.abs(np.arctan2(x, y + 1.5))
        grey = (grey * ((0.62 - angle) * 16).clip(0, 1)).astype(np.float32)
    return grey.astype(np.float32)


def _draw_finding(
    grey: Grid, finding: Finding, organ: str, x: Grid, y: Grid, jitter: NDArray[np.float64]
) -> Grid:
    field = _FIELD[organ]
    sign_x = -1 if finding.side == "left" else 1
    sign_y = -1 if finding.level == "upper" else 1
    centre = (
        sign_x * field[0] * _CENTRE + float(jitter[0]),
        sign_y * field[1] * _CENTRE + float(jitter[1]),
    )
    radius = _RADIUS[finding.size]
    outer = _ellipse(x, y, centre, (radius, radius))
    inner = _ellipse(x, y, centre, (radius * 0.55, radius * 0.55))
    if finding.kind == "nodule":
        return _blend(grey, 1.0, outer)
    if finding.kind == "cyst":
        return _blend(grey, 0.0, outer)
    return _blend(_blend(grey, 1.0, outer), 0.0, inner)  # an abscess: bright rim, dark heart


# --- reading a picture back ---------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """What `measure` sees: the nearest clean background and the findings laid over it."""

    modality: str
    organ: str
    findings: tuple[Finding, ...]
    residual: float  # mean absolute difference to the redrawn picture, 0 to 1


@cache
def _backgrounds(size: int, modalities: tuple[str, ...]) -> tuple[list[tuple[str, str]], Grid]:
    """Every look and organ under small shifts and scales: names and (N, size * size) greys."""
    names, rows = [], []
    x, y = _grid(size)
    for modality in modalities:
        for organ in ORGANS:
            for dx in (-0.03, 0.0, 0.03):
                for dy in (-0.03, 0.0, 0.03):
                    for scale in (0.97, 1.0, 1.03):
                        grey = _background(modality, organ, (x - dx) / scale, (y - dy) / scale)
                        names.append((modality, organ))
                        rows.append(grey.ravel())
    return names, np.stack(rows)


def measure(pixels: NDArray[np.uint8], modalities: tuple[str, ...] = ALL_MODALITIES) -> Measurement:
    """Finds modality, organ and findings in a picture, uint8 (size, size) or (size, size, 3).

    The nearest of all clean backgrounds is taken; then, quadrant by quadrant, the finding (or
    none) whose drawing explains the picture best, tried at the places where one can lie. It
    has to explain a good part of what is left, or there is none.
    """
    grey: Grid = (pixels / 255).astype(np.float32)
    if grey.ndim == 3:
        grey = grey.mean(-1).astype(np.float32)
    size = grey.shape[0]
    names, rows = _backgrounds(size, modalities)
    nearest = int(np.abs(rows - grey.reshape(1, -1)).mean(1).argmin())
    modality, organ = names[nearest]
    clean = rows[nearest].reshape(size, size)
    redrawn, findings = clean, []
    for side in SIDES:
        for level in LEVELS:
            best = _best_finding(grey, clean, organ, side, level)
            if best is not None:
                finding, drawn = best
                findings.append(finding)
                redrawn = np.where(drawn != clean, drawn, redrawn).astype(np.float32)
    residual = float(np.abs(redrawn - grey).mean())
    return Measurement(modality, organ, tuple(findings), residual)


def _best_finding(
    grey: Grid, clean: Grid, organ: str, side: str, level: str
) -> tuple[Finding, Grid] | None:
    x, y = _grid(grey.shape[0])
    best: tuple[float, Finding, Grid] | None = None
    steps = (-0.06, -0.03, 0.0, 0.03, 0.06)
    for kind in KINDS:
        for name in SIZES:
            finding = Finding(kind, name, side, level)
            for dx in steps:
                for dy in steps:
                    drawn = _draw_finding(clean, finding, organ, x, y, np.array((dx, dy)))
                    change = drawn - clean
                    # How much smaller the squared error gets by drawing it, as a share of
                    # the finding's own energy: 1 for a perfect match, below 0 for none.
                    energy = float((change**2).sum()) + 1e-6
                    gain = float(((grey - clean) ** 2 - (grey - drawn) ** 2).sum())
                    if gain > 0.35 * energy and (best is None or gain > best[0]):
                        best = (gain, finding, drawn)
    return None if best is None else (best[1], best[2])


# --- documents ----------------------------------------------------------------------------


def questions(scan: Phantom) -> list[tuple[str, str]]:
    """Every question about a scan with its answer, closed and open."""
    kinds = {f.kind for f in scan.findings}
    pairs = [(f"Is there {_article(kind)} {kind}?", _yes(kind in kinds)) for kind in KINDS]
    pairs += [
        (f"Is there a finding on the {side}?", _yes(any(f.side == side for f in scan.findings)))
        for side in SIDES
    ]
    pairs += [
        ("What modality is this?", scan.modality),
        ("Which organ is shown?", scan.organ),
        ("How many findings are there?", str(len(scan.findings))),
    ]
    for f in scan.findings:
        pairs += [
            (f"Where is the {f.kind}?", f.place),
            (f"What is in the {f.place}?", f"a {f.name}"),
            (f"Is the {f.kind} large?", _yes(f.size == "large")),
        ]
    return pairs


def _article(word: str) -> str:
    return "an" if word in ("MR", "X-ray", "ultrasound", "abscess") else "a"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def caption(scan: Phantom) -> str:
    return f"This is {scan.description}."


def report(scan: Phantom) -> str:
    impression = "Normal scan." if not scan.findings else f"Findings: {len(scan.findings)}."
    return (
        f"Technique: {scan.modality}. Region: {scan.organ}. Seen: {scan.finding_text}. {impression}"
    )


def documents(scan: Phantom, picture: Picture, rng: np.random.Generator) -> Iterator[Document]:
    """Documents about one scan: a talk of several turns, a picture from text, a report.

    A talk opens with the picture and asks four to nine questions. The report is interleaved:
    words, the picture, words. One picture in eight also stands alone, since guidance needs a
    model that knows pictures without words.
    """
    pairs = questions(scan)
    pairs += [("Describe the picture.", caption(scan)), ("Write a report.", report(scan))]
    picked = [pairs[i] for i in rng.permutation(len(pairs))[: rng.integers(4, 10)]]
    turns = []
    for number, (question, answer) in enumerate(picked):
        asked: tuple[Part, ...] = (picture, question) if number == 0 else (question,)
        turns += [Turn("user", asked), Turn("assistant", (answer,))]
    yield Document(tuple(turns))
    yield Document((Turn("user", (request(scan),)), Turn("assistant", (picture,))))
    yield illustrated_report(scan, picture)
    if rng.random() < 0.125:
        yield Document((Turn("assistant", (picture,)),))


def request(scan: Phantom) -> str:
    return f"Show me {scan.description}."


def illustrated_report(scan: Phantom, picture: Picture) -> Document:
    asked = f"Write an illustrated report of {scan.description}."
    before = f"Technique: {scan.modality}. Region: {scan.organ}."
    after = f"Seen: {scan.finding_text}."
    return Document((Turn("user", (asked,)), Turn("assistant", (before, picture, after))))
