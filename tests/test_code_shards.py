from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from medley.data.document import Document, ImagePart
from medley.data.image_token_store import (
    ImageTokenStore,
    TokenizationFailure,
    read_failures,
    write_error_lists,
    write_partition,
)
from medley.data.vocabulary import TextTokenizer
from medley.errors import UserError

REAL = ROOT.parent / "shared" / "data" / "chameleon_tokens"


def codes(*rows: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    return np.array(rows, dtype=np.uint16)


def test_written_codes_are_found_by_path_and_by_real_path(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.touch()
    write_partition(tmp_path / "partition_0_rank_0.parquet", [str(picture)], codes([1, 8191]), [])
    shards = ImageTokenStore(tmp_path)
    for name in (str(picture), str(tmp_path / "sub" / ".." / "a.png")):
        found = shards.get(name)
        assert found is not None
        assert found.tolist() == [1, 8191]
    assert shards.get("b.png") is None


def test_failures_travel_with_their_partition(tmp_path: Path) -> None:
    failure = TokenizationFailure("ü.png", "ü.png: broken")
    path = tmp_path / "partition_0_rank_3.parquet"
    write_partition(path, [], np.zeros((0, 4), np.uint16), [failure])
    assert read_failures(path) == [failure]
    assert write_error_lists(tmp_path) == (0, 1)
    line = json.loads((tmp_path / "errors_rank_3.jsonl").read_text())
    assert line == {"img_path": "ü.png", "error": "ü.png: broken"}


def test_one_path_with_two_codes_is_an_error(tmp_path: Path) -> None:
    write_partition(tmp_path / "partition_0_rank_0.parquet", ["a"], codes([1, 2]), [])
    write_partition(tmp_path / "partition_1_rank_0.parquet", ["a"], codes([1, 3]), [])
    with pytest.raises(UserError, match="stands twice"):
        ImageTokenStore(tmp_path)


def test_an_empty_folder_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Parquet files"):
        ImageTokenStore(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"x\.parquet"):
        ImageTokenStore(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data beside the project are not here")
def test_real_chameleon_codes_pass_unchanged(tokenizer: TextTokenizer) -> None:
    shards = ImageTokenStore(REAL / "partition_0_rank_0.parquet")
    assert len(shards) == 7
    assert shards.codes_per_image == 1024
    for path in shards.paths():
        found = shards.get(path)
        assert found is not None
        own = tuple(found.tolist())
        document = Document.from_json({"text": "<image>", "image_tokens": list(own)})
        ids = document.to_ids(tokenizer)
        assert ids == [0, 8197, *(code + 4 for code in own), 8196, 2]
        assert Document.from_ids(ids, tokenizer).pictures == [ImagePart(codes=own)]


def test_medmaxs_lists_are_read_and_the_cache_follows_its_shards(tmp_path: Path) -> None:
    path = tmp_path / "partition_0_rank_0.parquet"
    for value in (7, 8):
        table = {"img_path": ["a", "b"], "img_tokens": [[value, 2], [3, 4]]}
        pq.write_table(pa.table(table), path)  # list<int64>, as MedMax writes it
        os.utime(path, ns=(value, value))
        shards = ImageTokenStore(tmp_path)
        found = shards.get("a")
        assert found is not None
        assert found.tolist() == [value, 2]
        assert list(shards.paths()) == ["a", "b"]


def test_codes_that_are_none_and_lists_of_two_lengths_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"img_path": ["a"], "img_tokens": [[-1, 2]]}), path)
    with pytest.raises(UserError, match=r"x\.parquet: a code that is none"):
        ImageTokenStore(path)
    pq.write_table(pa.table({"img_path": ["a", "b"], "img_tokens": [[1, 2], [1]]}), path)
    with pytest.raises(UserError, match=r"different numbers of codes: \[1, 2\]"):
        ImageTokenStore(path)


def test_shards_in_a_folder_that_cannot_be_written_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_partition(tmp_path / "partition_0_rank_0.parquet", ["a"], codes([5, 6]), [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "a" in ImageTokenStore(tmp_path)
    assert len(list((tmp_path / "cache" / "medley").iterdir())) == 2
    assert not list(tmp_path.glob(".*codes*"))
