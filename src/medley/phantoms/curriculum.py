"""The endless stream of scans that the embedded decoder trains on; the seed determines it."""

from __future__ import annotations

import numpy as np

from medley.phantoms.scenes import Change, Phantom

SCANS_PER_CHUNK = 384
FOLLOW_UP_INTERVAL = 2  # every second scan of a chunk has a follow-up scan


def sample_chunk(
    seed: int, chunk: int
) -> tuple[list[Phantom], list[tuple[Phantom, Change]], np.random.Generator]:
    """A chunk's scans, the follow-up scans, and the generator for their documents."""
    rng = np.random.default_rng((seed + 1, chunk))
    scans = [Phantom.random(rng) for _ in range(SCANS_PER_CHUNK)]
    return scans, [scan.progression(rng) for scan in scans[::FOLLOW_UP_INTERVAL]], rng


def training_descriptions(seed: int, chunks: int) -> set[str]:
    """Descriptions of all scans in the first chunks of the training with this seed."""
    descriptions = set()
    for chunk in range(chunks):
        scans, follow_ups, _ = sample_chunk(seed, chunk)
        descriptions |= {scan.description for scan in (*scans, *(scan for scan, _ in follow_ups))}
    return descriptions
