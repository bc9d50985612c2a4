"""Halves of a data set without a common picture; leaks between published ones; subsets."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medley.data.document import Document
from medley.datasets.statistics import document_hash
from medley.utils.parallel import ordered_map


def paths_of(document: Document) -> list[str]:
    return [str(picture.path) for picture in document.pictures if picture.path is not None]


def _hash(path: str) -> tuple[str, str, str | None]:
    from medley.images.preprocess import ImageError, content_hash, open_image  # brings torch

    try:
        return path, content_hash(open_image(path)), None
    except ImageError as error:
        return path, "", str(error)


def content_hashes(paths: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of the pixels of each picture, read in all cores; and why some could not be read."""
    wanted = sorted(set(paths))
    workers = (os.cpu_count() or 1) if len(wanted) > 64 else 1
    found: dict[str, str] = {}
    failed: dict[str, str] = {}
    done = tqdm(total=len(wanted), desc="reading pictures", unit=" pictures", disable=not wanted)
    with done:
        for path, digest, reason in ordered_map(_hash, wanted, workers, lambda: None):
            if reason is None:
                found[path] = digest
            else:
                failed[path] = reason
            done.update()
    return found, failed


def content_ids(document: Document, hashes: Mapping[str, str]) -> list[str]:
    """What a record shows: its pictures' pixels or codes; where it has none, its words."""
    shown = []
    for picture in document.pictures:
        if picture.path is not None:
            shown.append(hashes[str(picture.path)])
        else:
            shown.append(hashlib.sha256(repr(picture.codes).encode()).hexdigest())
    return shown or [document_hash(document).hex()]


@dataclass(frozen=True)
class Leak:
    """Pictures of one part that stand in another, too, under any name."""

    part: str
    other: str
    pictures: int
    of: int


def find_leaks(parts: Mapping[str, Iterable[str]], hashes: Mapping[str, str]) -> list[Leak]:
    """Which pictures of test and validation stand in training, by content; `parts` gives the
    pictures' paths of each split."""
    contents = {
        name: {hashes[path] for path in paths if path in hashes} for name, paths in parts.items()
    }
    held_out = [name for name in contents if name != "train"]
    found = []
    for number, name in enumerate(held_out):
        for other in ("train", *held_out[:number]):
            if other in contents:
                common = len(contents[name] & contents[other])
                found.append(Leak(name, other, common, len(contents[name])))
    return found


def assign_split(group: str, test_share: float) -> str:
    """train or test, by a picture's content alone: the same one on every machine."""
    digest = hashlib.sha256(f"split {group}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") / 2**32 < test_share else "train"


def connected_components(records: Iterable[Sequence[str]]) -> dict[str, str]:
    """The contents of records -> one name for all pictures that are joined by common records."""
    above: dict[str, str] = {}

    def top(content: str) -> str:
        above.setdefault(content, content)
        while above[content] != content:
            above[content] = above[above[content]]
            content = above[content]
        return content

    for contents in records:
        for other in contents[1:]:
            low, high = sorted((top(contents[0]), top(other)))
            above[high] = low
        if contents:
            top(contents[0])
    return {content: top(content) for content in above}


def balanced(concepts: Sequence[str], count: int, seed: int) -> NDArray[np.bool_]:
    """Marks `count` of the records, as evenly over their concepts as they are there: a concept with
    fewer gives all it has, and the others share the rest."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, concept in enumerate(concepts):
        places[concept].append(place)
    left, taken = min(count, len(concepts)), np.zeros(len(concepts), bool)
    random = np.random.default_rng(seed)
    by_size = sorted(places, key=lambda concept: (len(places[concept]), concept))
    for number, concept in enumerate(by_size):
        share = min(-(-left // (len(by_size) - number)), len(places[concept]))
        taken[random.choice(places[concept], share, replace=False)] = True
        left -= share
    return taken
