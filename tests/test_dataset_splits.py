"""Split assignment, balanced subsets, split hashes and duplicate ids."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from medley.data.document import Document
from medley.datasets.splits import (
    Leak,
    assign_split,
    assign_splits,
    balanced_subset,
    connected_components,
    find_leaks,
)
from medley.datasets.statistics import DuplicateCounter, SplitHash


@given(
    st.lists(st.sampled_from("abcd"), max_size=40), st.integers(1, 50), st.integers(0, 3)
)  # fmt: skip
def test_balanced_subset_has_the_requested_size_and_even_shares(
    domains: list[str], count: int, seed: int
) -> None:
    selected = balanced_subset(domains, count, seed)
    assert selected.sum() == min(count, len(domains))
    available = {d: domains.count(d) for d in set(domains)}
    shares = {d: int(selected[[x == d for x in domains]].sum()) for d in available}
    largest = max(shares.values(), default=0)
    # A domain has a smaller share only if all of its records are selected.
    assert all(shares[d] in (available[d], largest, largest - 1) for d in available)


def test_images_of_one_record_are_in_one_split() -> None:
    components = connected_components([["a", "b"], ["c"], ["b", "d"], ["e", "c"]])
    assert components["a"] == components["b"] == components["d"]
    assert components["c"] == components["e"] != components["a"]
    in_test = [assign_split(str(i), 0.3) == "test" for i in range(2000)]
    assert 0.25 < np.mean(in_test) < 0.35


@given(
    st.sets(st.text(max_size=4), min_size=1, max_size=9),
    st.floats(0.01, 0.49), st.sampled_from([0.0, 0.01, 0.3]),
)  # fmt: skip
def test_no_split_of_a_small_dataset_is_empty(
    groups: set[str], test_fraction: float, val_fraction: float
) -> None:
    splits = assign_splits(groups, test_fraction, val_fraction)
    assert set(splits) == groups
    expected = {"train", "test", *(["val"] if val_fraction else [])}
    assert len(set(splits.values())) == min(len(groups), len(expected))
    many = {str(number) for number in range(400)}
    assert assign_splits(many, 0.2, 0.1) == {g: assign_split(g, 0.2, 0.1) for g in many}


def test_split_hash_depends_on_the_content_only() -> None:
    rows = [{"text": f"<image>q{i}<reserved08706>a", "image_path": f"x/{i}.png"} for i in range(4)]
    moved = [{**row, "image_path": f"/elsewhere/{i}.png"} for i, row in enumerate(rows)]
    changed = [*rows[:3], {**rows[3], "text": "<image>q"}]
    hashes = []
    for split in (rows, moved[::-1], rows[:3], changed):
        split_hash = SplitHash()
        for row in split:
            split_hash.add(Document.from_json(row))
        hashes.append(split_hash.hexadecimal())
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_duplicate_ids_are_counted() -> None:
    counter = DuplicateCounter()
    for identifier in (1, "1", 2, 1, None, None, 2, 2):
        counter.add(identifier)
    assert counter.count() == 3


def test_leaks_are_found_by_content() -> None:
    splits = {"train": ["a", "b"], "val": ["c", "d"], "test": ["e", "unreadable"]}
    hashes = {"a": "1", "b": "2", "c": "2", "d": "3", "e": "3"}
    assert find_leaks(splits, hashes) == [
        Leak("val", "train", common=1, total=2),
        Leak("test", "train", common=0, total=1),
        Leak("test", "val", common=1, total=1),
    ]
