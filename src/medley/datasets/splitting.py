"""Which records are converted, and to which half: a first pass, where that depends on others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medley.data.document import Document
from medley.datasets.base import ConversionConfig, FormatSpec, Sample
from medley.datasets.conversion import Check, ConversionStats, iter_samples
from medley.datasets.splits import (
    assign_split,
    balanced,
    connected_components,
    content_hashes,
    content_ids,
    paths_of,
)
from medley.datasets.statistics import domain_of


@dataclass(frozen=True)
class SplitPlan:
    """For each good record whether it is taken, and its half (None: all of them, and the published
    splits); and the pictures that cannot be read as a whole, with the reason."""

    taken: NDArray[np.bool_] | None = None
    halves: list[str] | None = None
    broken: dict[str, str] = field(default_factory=dict)


def plan_split(
    form: FormatSpec,
    choices: ConversionConfig,
    check: Check,
    test_share: float | None,
    balanced_count: int | None,
    balance_key: str | None,
    seed: int,
) -> SplitPlan:
    """Reads everything once for halves without a common picture (`test_share`), and for a subset
    that is even over concepts (`balanced_count`)."""
    if test_share is None and balanced_count is None:
        return SplitPlan()
    documents: list[Document] = []
    concepts: list[str] = []
    found = iter_samples(form, choices, check, ConversionStats(), lambda *_: None)
    for _, _, _, sample in tqdm(found, unit=" records", desc="planning"):
        documents.append(sample.document)
        concepts.append(domain_of(sample, balance_key))
    hashes: dict[str, str] = {}
    broken: dict[str, str] = {}
    if test_share is not None:
        hashes, broken = content_hashes(p for d in documents for p in paths_of(d))
        whole = [not any(p in broken for p in paths_of(d)) for d in documents]
        concepts = [c for c, good in zip(concepts, whole, strict=True) if good]
        documents = [d for d, good in zip(documents, whole, strict=True) if good]
    taken, halves = None, None
    if balanced_count is not None:
        taken = balanced(concepts, balanced_count, seed)
    if test_share is not None:
        contents = [content_ids(document, hashes) for document in documents]
        joined = connected_components(contents)
        halves = [assign_split(joined[own[0]], test_share) for own in contents]
    return SplitPlan(taken, halves, broken)


def select_records(
    form: FormatSpec,
    choices: ConversionConfig,
    check: Check,
    tally: ConversionStats,
    keep: Callable[[str, str, Any], None],
    plan: SplitPlan,
) -> Iterator[tuple[str, str, Any, Sample]]:
    """(place, split or half, record, sample) of what is to be written; a record with a picture that
    cannot be read as a whole goes to `keep`."""
    number = -1
    for where, split, record, sample in iter_samples(form, choices, check, tally, keep):
        if broken := [plan.broken[p] for p in paths_of(sample.document) if p in plan.broken]:
            tally.counts["bad"] += 1
            keep(where, broken[0], record)
            continue
        number += 1
        if plan.taken is None or plan.taken[number]:
            yield (
                where,
                (split or "all") if plan.halves is None else plan.halves[number],
                record,
                sample,
            )
