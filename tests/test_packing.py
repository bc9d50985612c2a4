from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medley.data.document import Document
from medley.data.packing import (
    IGNORE_INDEX,
    SequenceTooLong,
    build_labels,
    build_sequence,
    collate,
    pack_balanced,
)
from medley.data.token_dataset import TokenDataset, write_jsonl, write_parquet
from medley.data.vocabulary import TextTokenizer
from medley.errors import UserError


@given(lengths=st.lists(st.integers(1, 50), max_size=60), row=st.integers(50, 120))
def test_every_document_is_packed_once_and_whole(lengths: list[int], row: int) -> None:
    rows = pack_balanced(lengths, row)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in r) <= row for r in rows)
    # No two rows could have been one: at most one is less than half full.
    assert sum(2 * sum(lengths[i] for i in r) < row for r in rows) <= 1


def test_rows_hold_long_documents_and_short_ones() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 400, 2000).tolist()
    rows = pack_balanced(lengths, 2048)
    assert len(rows) <= 1.01 * sum(lengths) / 2048 + 1
    means = [np.mean([lengths[i] for i in row]) for row in rows]
    assert np.std(means) < 0.1 * np.mean(lengths)
    assert np.ptp([sum(lengths[i] for i in row) for row in rows]) < 0.05 * 2048


def test_a_document_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(SequenceTooLong, match="document 1 has 9 tokens, a row 8"):
        pack_balanced([3, 9], 8)


def test_labels_of_a_row(tokenizer: TextTokenizer) -> None:
    v = tokenizer.vocabulary
    asked = np.array([v.bos, 9000, v.end_turn, 9001, v.eos])
    whole = np.array([v.bos, 9002, v.eos])
    rows = [build_sequence([asked, whole], v), build_sequence([np.full(10, 9003)], v)]
    row = {name: tensor[0] for name, tensor in collate(rows, v).items()}
    assert (
        row["labels"].tolist()
        == [IGNORE_INDEX] * 3 + [9001, v.eos, IGNORE_INDEX, 9002, v.eos] + [IGNORE_INDEX] * 2
    )
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]
    assert row["input_ids"].tolist()[-2:] == [v.pad, v.pad]


def test_a_padding_id_inside_of_a_document_keeps_its_label(tokenizer: TextTokenizer) -> None:
    v = tokenizer.vocabulary
    row = build_sequence([np.array([v.bos, v.pad, v.eos])], v)
    assert row["labels"].tolist() == [IGNORE_INDEX, v.pad, v.eos]


def test_rows_of_unequal_lengths_are_stacked(tokenizer: TextTokenizer) -> None:
    v = tokenizer.vocabulary
    rows = [build_sequence([np.arange(9000, 9000 + n)], v) for n in (2, 4)]
    batch = collate(rows, v)
    assert batch["input_ids"].shape == (2, 4)
    assert batch["labels"][0, 2:].tolist() == [IGNORE_INDEX, IGNORE_INDEX]
    assert batch["position_ids"][0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_shards_give_back_what_was_written(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "tokens": rng.integers(0, 65536, rng.integers(1, 9)).tolist(),
            "task": f"t{i}",
            "source": "s",
        }
        for i in range(4500)  # more than two batches of the cache
    ]
    path = tmp_path / f"tokens.{suffix}"
    count = (write_jsonl if suffix == "jsonl" else write_parquet)(path, iter(rows))
    shards = TokenDataset(path)
    assert count == len(shards) == len(rows)
    assert [shards[i].tolist() for i in range(len(rows))] == [row["tokens"] for row in rows]
    assert shards.lengths.tolist() == [len(row["tokens"]) for row in rows]
    assert [shards.task(i) for i in range(len(shards))] == [row["task"] for row in rows]


def test_the_cache_is_made_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "tokens.jsonl"
    write_jsonl(path, iter([{"tokens": [1, 2]}]))
    assert TokenDataset(path)[0].tolist() == [1, 2]
    write_jsonl(path, iter([{"tokens": [3, 4]}]))
    assert TokenDataset(path)[0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [({"text": "x"}, "no 'tokens'"), ({"tokens": [70000]}, "outside of 0 to 65535")],
)
def test_bad_tokens_are_named(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps({"tokens": [1]}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=rf"tokens\.jsonl:2: .*{message}"):
        TokenDataset(path)


def test_medmax_tokens_of_parquet_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"tokens": pa.array([[0, 4, 2]], pa.list_(pa.int64())), "credential": ["no"]})
    pq.write_table(table, tmp_path / "medmax.parquet")
    assert TokenDataset(tmp_path / "medmax.parquet")[0].tolist() == [0, 4, 2]


def test_what_has_labels(tokenizer: TextTokenizer) -> None:
    marks = tokenizer.vocabulary
    row = {"text": "<image>ab<reserved08706>c<image>", "image_tokens": [[1, 2], [3, 4]]}
    ids = np.array(Document.from_json(row).to_ids(tokenizer))
    turn = int((ids == marks.end_turn).nonzero()[0][0])

    def learned(learn: Any) -> list[int]:
        return (build_labels(ids, marks, learn) != IGNORE_INDEX).nonzero()[0].tolist()

    assert learned("answers") == list(range(turn + 1, len(ids)))
    assert learned("everything") == list(range(1, len(ids)))
    assert learned("pictures") == [1, 2, 3, 4, *range(len(ids) - 5, len(ids) - 1)]
    labels = build_labels(ids, marks, "pictures")
    assert labels[1] == marks.begin_image
    assert labels[4] == marks.end_image


def test_the_cache_takes_two_bytes_a_token(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_jsonl(path, iter([{"tokens": [7] * 1000, "task": "a long name of a task"}] * 200))
    assert TokenDataset(path).task(199) == "a long name of a task"
    cache = sum(p.stat().st_size for p in tmp_path.glob(".t.jsonl.cache*"))
    assert cache / 200_000 < 2.1


def test_two_files_of_one_name_keep_their_tasks_apart_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    for name in ("train", "val"):
        write_jsonl(tmp_path / name / "t.jsonl", iter([{"tokens": [0, 2], "task": name}]))
        assert TokenDataset(tmp_path / name / "t.jsonl").task(0) == name
    assert TokenDataset(tmp_path / "train" / "t.jsonl").task(0) == "train"
