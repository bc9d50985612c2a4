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
from medley.data.token_dataset import TokenDataset, write_token_jsonl, write_token_parquet
from medley.data.vocabulary import TextTokenizer
from medley.errors import UserError


@given(lengths=st.lists(st.integers(1, 50), max_size=60), max_length=st.integers(50, 120))
def test_each_document_is_packed_once(lengths: list[int], max_length: int) -> None:
    packed = pack_balanced(lengths, max_length)
    assert sorted(i for indices in packed for i in indices) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in indices) for indices in packed]
    assert all(total <= max_length for total in totals)
    # At most one sequence is less than half full, so no two sequences could be merged.
    assert sum(2 * total < max_length for total in totals) <= 1


def test_packed_sequences_mix_long_and_short_documents() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 400, 2000).tolist()
    packed = pack_balanced(lengths, 2048)
    assert len(packed) <= 1.01 * sum(lengths) / 2048 + 1
    means = [np.mean([lengths[i] for i in indices]) for indices in packed]
    assert np.std(means) < 0.1 * np.mean(lengths)
    assert np.ptp([sum(lengths[i] for i in indices) for indices in packed]) < 0.05 * 2048


def test_document_longer_than_max_length_raises() -> None:
    with pytest.raises(
        SequenceTooLong, match=r"Document 1 is too long \(got 9 tokens, .* at most 8"
    ):
        pack_balanced([3, 9], 8)


def test_labels_of_a_packed_sequence(tokenizer: TextTokenizer) -> None:
    v = tokenizer.vocabulary
    two_turns = np.array([v.bos, 9000, v.end_turn, 9001, v.eos])
    one_turn = np.array([v.bos, 9002, v.eos])
    sequences = [build_sequence([two_turns, one_turn], v), build_sequence([np.full(10, 9003)], v)]
    first = {name: tensor[0] for name, tensor in collate(sequences, v).items()}
    trained = [9001, v.eos, IGNORE_INDEX, 9002, v.eos]
    assert first["labels"].tolist() == [IGNORE_INDEX] * 3 + trained + [IGNORE_INDEX] * 2
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]
    assert first["input_ids"].tolist()[-2:] == [v.pad, v.pad]


def test_padding_token_inside_a_document_keeps_its_label(tokenizer: TextTokenizer) -> None:
    v = tokenizer.vocabulary
    sequence = build_sequence([np.array([v.bos, v.pad, v.eos])], v)
    assert sequence["labels"].tolist() == [IGNORE_INDEX, v.pad, v.eos]


def test_sequences_of_different_lengths_are_padded(tokenizer: TextTokenizer) -> None:
    v = tokenizer.vocabulary
    batch = collate([build_sequence([np.arange(9000, 9000 + n)], v) for n in (2, 4)], v)
    assert batch["input_ids"].shape == (2, 4)
    assert batch["labels"][0, 2:].tolist() == [IGNORE_INDEX, IGNORE_INDEX]
    assert batch["position_ids"][0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_token_file_round_trip(tmp_path: Path, suffix: str) -> None:
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
    count = (write_token_jsonl if suffix == "jsonl" else write_token_parquet)(path, iter(rows))
    dataset = TokenDataset(path)
    assert count == len(dataset) == len(rows)
    assert [dataset[i].tolist() for i in range(len(rows))] == [row["tokens"] for row in rows]
    assert dataset.lengths.tolist() == [len(row["tokens"]) for row in rows]
    assert [dataset.task(i) for i in range(len(dataset))] == [row["task"] for row in rows]


def test_cache_is_rebuilt_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "tokens.jsonl"
    write_token_jsonl(path, iter([{"tokens": [1, 2]}]))
    assert TokenDataset(path)[0].tolist() == [1, 2]
    write_token_jsonl(path, iter([{"tokens": [3, 4]}]))
    assert TokenDataset(path)[0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, "'tokens' is missing"),
        ({"tokens": [70000]}, "got 70000, expected 0 to 65535"),
    ],
)
def test_invalid_tokens_raise_with_their_line(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps({"tokens": [1]}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=rf"tokens\.jsonl:2: .*{message}"):
        TokenDataset(path)


def test_medmax_parquet_tokens_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"tokens": pa.array([[0, 4, 2]], pa.list_(pa.int64())), "credential": ["no"]})
    pq.write_table(table, tmp_path / "medmax.parquet")
    assert TokenDataset(tmp_path / "medmax.parquet")[0].tolist() == [0, 4, 2]


def test_train_on_selects_the_labels(tokenizer: TextTokenizer) -> None:
    vocabulary = tokenizer.vocabulary
    row = {"text": "<image>ab<reserved08706>c<image>", "image_tokens": [[1, 2], [3, 4]]}
    ids = np.array(Document.from_json(row).to_ids(tokenizer))
    turn = int((ids == vocabulary.end_turn).nonzero()[0][0])

    def trained(train_on: Any) -> list[int]:
        return (build_labels(ids, vocabulary, train_on) != IGNORE_INDEX).nonzero()[0].tolist()

    assert trained("assistant") == list(range(turn + 1, len(ids)))
    assert trained("all") == list(range(1, len(ids)))
    assert trained("images") == [1, 2, 3, 4, *range(len(ids) - 5, len(ids) - 1)]
    labels = build_labels(ids, vocabulary, "images")
    assert labels[1] == vocabulary.begin_image
    assert labels[4] == vocabulary.end_image


def test_cache_takes_two_bytes_per_token(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_token_jsonl(path, iter([{"tokens": [7] * 1000, "task": "a long task name"}] * 200))
    assert TokenDataset(path).task(199) == "a long task name"
    cache = sum(p.stat().st_size for p in tmp_path.glob(".t.jsonl.cache*"))
    assert cache / 200_000 < 2.1


def test_files_of_the_same_name_have_separate_user_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    for name in ("train", "val"):
        write_token_jsonl(tmp_path / name / "t.jsonl", iter([{"tokens": [0, 2], "task": name}]))
        assert TokenDataset(tmp_path / name / "t.jsonl").task(0) == name
    assert TokenDataset(tmp_path / "train" / "t.jsonl").task(0) == "train"
