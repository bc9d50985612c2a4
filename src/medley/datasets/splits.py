"""Train and test splits without a common image, balanced subsets, and leaks between splits.

A split or a balanced subset depends on all records, so `plan_split` reads the input once before
`select_records` yields the selected samples.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medley.data.document import Document
from medley.datasets.base import ConversionConfig, FormatSpec, RecordError, Sample
from medley.datasets.samples import (
    ConversionStats,
    ImageCheck,
    ReadSample,
    RejectRecord,
    iter_samples,
)
from medley.datasets.statistics import document_hash, domain_of
from medley.utils.parallel import ordered_map

# --- image content ------------------------------------------------------------------------


def image_paths(document: Document) -> list[str]:
    return [str(image.path) for image in document.images if image.path is not None]


def _hash_image(path: str) -> tuple[str, str, str | None]:
    from medley.images.preprocess import ImageError, content_hash, open_image  # imports torch

    try:
        return path, content_hash(open_image(path)), None
    except ImageError as error:
        return path, "", str(error)


def content_hashes(paths: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of the pixels of each image, and the reason for each image that cannot be read."""
    unique = sorted(set(paths))
    workers = (os.cpu_count() or 1) if len(unique) > 64 else 1
    hashes: dict[str, str] = {}
    failures: dict[str, str] = {}
    progress = tqdm(total=len(unique), desc="hashing images", unit=" images", disable=not unique)
    with progress:
        for path, digest, problem in ordered_map(_hash_image, unique, workers, lambda: None):
            if problem is None:
                hashes[path] = digest
            else:
                failures[path] = problem
            progress.update()
    return hashes, failures


def patient_of(sample: Sample) -> str | None:
    """The patient of a record; None if it is unknown."""
    patient = sample.fields.get("patient_id")
    return None if patient is None or patient == "" else str(patient)


def group_ids(sample: Sample, hashes: Mapping[str, str]) -> list[str]:
    """What two records of one split share: an image, a file with several frames, or a patient."""
    names = [path.rpartition("#") for path in image_paths(sample.document)]
    files = [f"file {name}" for name, separator, _ in names if separator]
    patient = patient_of(sample)
    patients = [] if patient is None else [f"patient {patient}"]
    return [*content_ids(sample.document, hashes), *files, *patients]


def content_ids(document: Document, hashes: Mapping[str, str]) -> list[str]:
    """Hashes of a document's images (pixels or image codes), or of its text if it has none."""
    ids = []
    for image in document.images:
        if image.path is not None:
            ids.append(hashes[str(image.path)])
        else:
            ids.append(hashlib.sha256(repr(image.codes).encode()).hexdigest())
    return ids or [document_hash(document).hex()]


# --- leaks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leak:
    """Number of images of a split that are also in another one, under any name."""

    split: str
    other: str
    common: int
    total: int


def find_leaks(splits: Mapping[str, Iterable[str]], hashes: Mapping[str, str]) -> list[Leak]:
    """Compares the image contents of each held-out split with train and with earlier splits.

    Args:
        splits: name of a split -> its image paths
        hashes: image path -> content hash
    """
    contents = {
        name: {hashes[path] for path in paths if path in hashes} for name, paths in splits.items()
    }
    held_out = [name for name in contents if name != "train"]
    leaks = []
    for number, name in enumerate(held_out):
        for other in ("train", *held_out[:number]):
            if other in contents:
                common = len(contents[name] & contents[other])
                leaks.append(Leak(name, other, common, len(contents[name])))
    return leaks


def describe_leaks(splits: Mapping[str, Iterable[str]]) -> list[str]:
    """Reads the images of all splits and describes the leaks, one line per pair of splits."""
    hashes, failures = content_hashes(path for paths in splits.values() for path in paths)
    lines = [
        f"{leak.common} of {leak.total} images of {leak.split} are also in {leak.other}"
        for leak in find_leaks(splits, hashes)
    ]
    return [*lines, f"{len(failures)} images could not be compared"] if failures else lines


# --- assignment and subsets ---------------------------------------------------------------


def assign_split(group: str, test_fraction: float, val_fraction: float = 0.0) -> str:
    """train, val or test for a group of images; depends only on the group's hash."""
    position = _position(group)
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def _position(group: str) -> float:
    """A number from 0 to 1 that depends only on the group's name."""
    digest = hashlib.sha256(f"split {group}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def assign_splits(
    groups: Iterable[str], test_fraction: float, val_fraction: float = 0.0
) -> dict[str, str]:
    """Group -> train, val or test by `assign_split`.

    A split of a small dataset that would be empty gets the group that is nearest to it by hash.
    """
    splits = {group: assign_split(group, test_fraction, val_fraction) for group in sorted(groups)}
    known = test_fraction + val_fraction
    for name, low, high in (
        ("test", 0.0, test_fraction), ("val", test_fraction, known), ("train", known, 1.0),
    ):  # fmt: skip
        counts = Counter(splits.values())
        movable = [group for group, split in splits.items() if counts[split] > 1]
        if low < high and not counts[name] and movable:
            center = (low + high) / 2
            splits[min(movable, key=lambda group: abs(_position(group) - center))] = name
    return splits


def connected_components(records: Iterable[Sequence[str]]) -> dict[str, str]:
    """Content ids of each record -> component of each id; records that share an id are connected.

    The smallest id of a component is its name.
    """
    parents: dict[str, str] = {}

    def root(content: str) -> str:
        parents.setdefault(content, content)
        while parents[content] != content:
            parents[content] = parents[parents[content]]
            content = parents[content]
        return content

    for contents in records:
        for other in contents[1:]:
            low, high = sorted((root(contents[0]), root(other)))
            parents[high] = low
        if contents:
            root(contents[0])
    return {content: root(content) for content in parents}


def balanced_subset(domains: Sequence[str], count: int, seed: int) -> NDArray[np.bool_]:
    """Selects `count` records as evenly over domains as possible.

    A domain with fewer records than its share gives all of them; the others share the rest.

    Args:
        domains: domain of each record
        count: number of records to select
        seed: seed of the selection within a domain

    Returns:
        For each record, whether it is selected.
    """
    indices: dict[str, list[int]] = defaultdict(list)
    for index, domain in enumerate(domains):
        indices[domain].append(index)
    remaining, selected = min(count, len(domains)), np.zeros(len(domains), bool)
    random = np.random.default_rng(seed)
    by_size = sorted(indices, key=lambda domain: (len(indices[domain]), domain))
    for number, domain in enumerate(by_size):
        share = min(-(-remaining // (len(by_size) - number)), len(indices[domain]))
        selected[random.choice(indices[domain], share, replace=False)] = True
        remaining -= share
    return selected


# --- planning -----------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitPlan:
    """Which records are written, and to which split.

    Attributes:
        selected: for each valid record, whether it is written; None for all
        splits: for each valid record, its split; None for the published splits
        unreadable: path of an image that cannot be decoded -> reason
        patients: number of patients that a random split keeps together
    """

    selected: NDArray[np.bool_] | None = None
    splits: list[str] | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    patients: int = 0


def plan_split(
    spec: FormatSpec,
    config: ConversionConfig,
    check: ImageCheck,
    test_fraction: float | None,
    balanced_count: int | None,
    balance_by: str | None,
    seed: int,
    val_fraction: float = 0.0,
) -> SplitPlan:
    """Reads the input to plan a random split (`test_fraction`) or subset (`balanced_count`).

    A split keeps the records together that share an image, a file with several frames, or a
    patient (the field `patient_id`).
    """
    if test_fraction is None and balanced_count is None:
        return SplitPlan()
    samples = [
        item.sample
        for item in tqdm(
            iter_samples(spec, config, check, ConversionStats(), lambda *_: None),
            unit=" records", desc="planning",
        )
    ]  # fmt: skip
    unreadable: dict[str, str] = {}
    splits, patients = None, 0
    if test_fraction is not None:
        hashes, unreadable = content_hashes(p for s in samples for p in image_paths(s.document))
        samples = [s for s in samples if not any(p in unreadable for p in image_paths(s.document))]
        groups = [group_ids(sample, hashes) for sample in samples]
        components = connected_components(groups)
        assigned = assign_splits(set(components.values()), test_fraction, val_fraction)
        splits = [assigned[components[ids[0]]] for ids in groups]
        patients = len({patient_of(sample) for sample in samples} - {None})
    selected = None
    if balanced_count is not None:
        domains = [domain_of(sample, balance_by) for sample in samples]
        selected = balanced_subset(domains, balanced_count, seed)
    return SplitPlan(selected, splits, unreadable, patients)


def select_records(
    spec: FormatSpec,
    config: ConversionConfig,
    check: ImageCheck,
    stats: ConversionStats,
    reject: RejectRecord,
    plan: SplitPlan,
) -> Iterator[ReadSample]:
    """The samples to write, each with its split.

    Records with an image that cannot be decoded are passed to `reject`.
    """
    number = -1
    for item in iter_samples(spec, config, check, stats, reject):
        paths = image_paths(item.sample.document) if plan.unreadable else []
        if problems := [plan.unreadable[path] for path in paths if path in plan.unreadable]:
            stats.counts["bad"] += 1
            reject(item.where, RecordError(problems[0]), item.record)
            continue
        number += 1
        if plan.selected is None or plan.selected[number]:
            split = (item.split or "all") if plan.splits is None else plan.splits[number]
            yield item._replace(split=split)
