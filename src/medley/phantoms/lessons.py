"""The scans that the embedded decoder learns from: the same for the same seed, without an end."""

from __future__ import annotations

import numpy as np

from medley.phantoms.world import Change, Phantom

SCANS = 384  # of a chunk, drawn at a time
CHANGED = 2  # every second scan has a later one


def chunk_of_scans(
    seed: int, chunk: int
) -> tuple[list[Phantom], list[tuple[Phantom, Change]], np.random.Generator]:
    """The scans of a chunk, the later ones of every second, and what draws their documents."""
    rng = np.random.default_rng((seed + 1, chunk))
    scans = [Phantom.random(rng) for _ in range(SCANS)]
    return scans, [scan.later(rng) for scan in scans[::CHANGED]], rng


def learned_descriptions(seed: int, chunks: int) -> set[str]:
    """Of all the scans that the first chunks of a training with that seed show."""
    found = set()
    for chunk in range(chunks):
        scans, later, _ = chunk_of_scans(seed, chunk)
        found |= {scan.description for scan in (*scans, *(scan for scan, _ in later))}
    return found
