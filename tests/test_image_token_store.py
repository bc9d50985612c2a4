from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT

from medley.data.document import Document, ImagePart
from medley.data.image_token_store import (
    ImageTokenStore,
    TokenizationFailure,
    assign_partitions,
    finished_partitions,
    partition_file,
    read_failures,
    write_error_lists,
    write_partition,
)
from medley.data.image_tokenization import encode_partitions
from medley.data.vocabulary import TextTokenizer
from medley.errors import UserError
from medley.images.dataloader import ImageBatch
from medley.images.sources import Partition

REAL = ROOT.parent / "shared" / "data" / "chameleon_tokens"


def codes(*rows: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    return np.array(rows, dtype=np.uint16)


def test_codes_are_found_by_path_and_by_real_path(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.touch()
    write_partition(tmp_path / "partition_0_rank_0.parquet", [str(image)], codes([1, 8191]), [])
    store = ImageTokenStore(tmp_path)
    for name in (str(image), str(tmp_path / "sub" / ".." / "a.png")):
        stored = store.get(name)
        assert stored is not None
        assert stored.tolist() == [1, 8191]
    assert store.get("b.png") is None


def test_failures_are_stored_in_their_partition(tmp_path: Path) -> None:
    failure = TokenizationFailure("ü.png", "ü.png: broken")
    path = tmp_path / "partition_0_rank_3.parquet"
    write_partition(path, [], np.zeros((0, 4), np.uint16), [failure])
    assert read_failures(path) == [failure]
    assert write_error_lists(tmp_path) == (0, 1)
    line = json.loads((tmp_path / "errors_rank_3.jsonl").read_text())
    assert line == {"img_path": "ü.png", "error": "ü.png: broken"}


def test_duplicate_path_with_different_codes_raises(tmp_path: Path) -> None:
    write_partition(tmp_path / "partition_0_rank_0.parquet", ["a"], codes([1, 2]), [])
    write_partition(tmp_path / "partition_1_rank_0.parquet", ["a"], codes([1, 3]), [])
    with pytest.raises(UserError, match="Duplicate path a with different image codes"):
        ImageTokenStore(tmp_path)


def test_empty_folder_and_broken_file_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No Parquet files"):
        ImageTokenStore(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"x\.parquet"):
        ImageTokenStore(tmp_path)


@pytest.mark.skipif(
    not REAL.is_dir(), reason="needs ../shared/data, which is not part of the repository"
)
def test_real_chameleon_codes_round_trip(tokenizer: TextTokenizer) -> None:
    store = ImageTokenStore(REAL / "partition_0_rank_0.parquet")
    assert len(store) == 7
    assert store.codes_per_image == 1024
    for path in store.paths():
        stored = store.get(path)
        assert stored is not None
        own = tuple(stored.tolist())
        document = Document.from_json({"text": "<image>", "image_tokens": list(own)})
        ids = document.to_ids(tokenizer)
        assert ids == [0, 8197, *(code + 4 for code in own), 8196, 2]
        assert Document.from_ids(ids, tokenizer).images == [ImagePart(codes=own)]


def test_medmax_lists_are_read_and_cache_is_rebuilt_after_a_change(tmp_path: Path) -> None:
    path = tmp_path / "partition_0_rank_0.parquet"
    for value in (7, 8):
        table = {"img_path": ["a", "b"], "img_tokens": [[value, 2], [3, 4]]}
        pq.write_table(pa.table(table), path)  # list<int64>, as MedMax writes it
        os.utime(path, ns=(value, value))
        store = ImageTokenStore(tmp_path)
        stored = store.get("a")
        assert stored is not None
        assert stored.tolist() == [value, 2]
        assert list(store.paths()) == ["a", "b"]


def test_invalid_codes_and_different_numbers_of_codes_raise(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"img_path": ["a"], "img_tokens": [[-1, 2]]}), path)
    with pytest.raises(
        UserError, match=r"x\.parquet: img_tokens contains a value that is not a valid"
    ):
        ImageTokenStore(path)
    pq.write_table(pa.table({"img_path": ["a", "b"], "img_tokens": [[1, 2], [1]]}), path)
    with pytest.raises(UserError, match=r"different numbers of codes \(\[1, 2\]\)"):
        ImageTokenStore(path)


def test_store_in_read_only_folder_uses_user_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_partition(tmp_path / "partition_0_rank_0.parquet", ["a"], codes([5, 6]), [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "a" in ImageTokenStore(tmp_path)
    assert len(list((tmp_path / "cache" / "medley").iterdir())) == 2
    assert not list(tmp_path.glob(".*codes*"))


def test_second_run_cannot_write_the_same_partition(tmp_path: Path) -> None:
    write_partition(partition_file(tmp_path, 1, 0), ["a"], codes([1, 2]), [])
    write_partition(partition_file(tmp_path, 11, 1), ["b"], codes([1, 2]), [])
    with pytest.raises(UserError, match="another run is writing"):
        write_partition(partition_file(tmp_path, 1, 1), ["a"], codes([1, 2]), [])
    (tmp_path / "partition_1_rank_1.parquet").touch()
    with pytest.raises(UserError, match="Duplicate partition 1"):
        finished_partitions(tmp_path)


def test_unfinished_partitions_are_divided_among_ranks() -> None:
    own = [assign_partitions(41, 10, {1}, rank, 3) for rank in range(3)]
    assert own == [{0, 4}, {2}, {3}]
    assert assign_partitions(20, 10, {0, 1}, 0, 1) == set()


def test_partition_is_written_after_its_last_batch(tmp_path: Path) -> None:
    partition = Partition(3, [], pa.table({"label": ["a", "b", "c"]}))
    images = [torch.full((n, 2, 2, 3), 7, dtype=torch.uint8) for n in (1, 1)]
    batches = [
        ImageBatch(partition, False, ["0.png", "1.png"], ["", "1.png: broken"], images[0]),
        ImageBatch(partition, True, ["2.png"], [""], images[1]),
    ]

    def start(images: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: images.flatten(1)[:, :2].long()

    for number, _ in enumerate(encode_partitions(batches, start, tmp_path, 1)):
        assert bool(finished_partitions(tmp_path)) is False, number
    path = finished_partitions(tmp_path)[3]
    assert pq.read_table(path).to_pylist() == [
        {"img_path": "0.png", "img_tokens": [7, 7], "label": "a"},
        {"img_path": "2.png", "img_tokens": [7, 7], "label": "c"},
    ]
    assert read_failures(path) == [TokenizationFailure("1.png", "1.png: broken")]


@pytest.mark.parametrize(("written", "asked"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_codes_are_found_by_a_name_in_the_other_normal_form(
    tmp_path: Path, written: Literal["NFC", "NFD"], asked: Literal["NFC", "NFD"]
) -> None:
    name = "Schädel.png"
    file = tmp_path / "partition_0_rank_0.parquet"
    write_partition(file, [unicodedata.normalize(written, name)], codes([1, 2]), [])
    store = ImageTokenStore(tmp_path)
    found = store.get(unicodedata.normalize(asked, name))
    assert found is not None
    assert found.tolist() == [1, 2]
    assert unicodedata.normalize(asked, name) in store
    assert store.get("Schadel.png") is None


def test_values_that_many_rows_share_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    """Files of some hundred bytes, whose decoded rows would take gigabytes."""
    rows = 5000
    path = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(rows, np.int32)), pa.array(["a" * 256_000])
    )
    equal = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * 4, np.uint16)), 4)
    length = 1 << 26
    offsets = pa.array([0, length, 2 * length], pa.int64())
    long = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(2 * length, np.uint16)))
    for name, table, message in (
        ("paths", {"img_path": path, "img_tokens": equal}, "a value of 256000 bytes"),
        ("codes", {"img_path": pa.array(["a", "b"]), "img_tokens": long}, "may expand to"),
    ):
        file = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(table), file, store_schema=False)
        with pytest.raises(UserError, match=rf"{name}\.parquet: .*{message}"):
            ImageTokenStore(file)
        assert not list(tmp_path.glob(".*codes*"))
