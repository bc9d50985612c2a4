"""Train and test splits without a common image, balanced subsets, and leaks between splits.

A split or a balanced subset depends on all records, so `plan_split` reads the input once before
`select_records` yields the selected samples.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medley.data.document import Document
from medley.datasets.base import ConversionConfig, FormatSpec, RecordError
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


def assign_split(group: str, test_fraction: float) -> str:
    """train or test for a group of images; depends only on the group's hash."""
    digest = hashlib.sha256(f"split {group}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") / 2**32 < test_fraction else "train"


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
    """

    selected: NDArray[np.bool_] | None = None
    splits: list[str] | None = None
    unreadable: dict[str, str] = field(default_factory=dict)


def plan_split(
    spec: FormatSpec,
    config: ConversionConfig,
    check: ImageCheck,
    test_fraction: float | None,
    balanced_count: int | None,
    balance_by: str | None,
    seed: int,
) -> SplitPlan:
    """Reads the input to plan a random split (`test_fraction`) or subset (`balanced_count`)."""
    if test_fraction is None and balanced_count is None:
        return SplitPlan()
    documents: list[Document] = []
    domains: list[str] = []
    samples = iter_samples(spec, config, check, ConversionStats(), lambda *_: None)
    for _, _, _, sample in tqdm(samples, unit=" records", desc="planning"):
        documents.append(sample.document)
        domains.append(domain_of(sample, balance_by))
    hashes: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    if test_fraction is not None:
        hashes, unreadable = content_hashes(p for d in documents for p in image_paths(d))
        valid = [not any(p in unreadable for p in image_paths(d)) for d in documents]
        domains = [domain for domain, good in zip(domains, valid, strict=True) if good]
        documents = [document for document, good in zip(documents, valid, strict=True) if good]
    selected, splits = None, None
    if balanced_count is not None:
        selected = balanced_subset(domains, balanced_count, seed)
    if test_fraction is not None:
        contents = [content_ids(document, hashes) for document in documents]
        components = connected_components(contents)
        splits = [assign_split(components[ids[0]], test_fraction) for ids in contents]
    return SplitPlan(selected, splits, unreadable)


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
