"""conversion.convert_dataset as a user runs it: splits, leaks, subsets, bad records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from conversion import convert_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medley.data.document import Document
from medley.data.token_dataset import TokenDataset
from medley.datasets.splits import assign_split, balanced, connected_components
from medley.datasets.statistics import Duplicates, SplitHash

VQA_RAD = ROOT.parent / "shared" / "data" / "vqa_rad"


def run(*words: Any) -> int:
    return convert_dataset.main([str(word) for word in words])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """VQA-RAD's form: eight pictures, one of them twice under two names, in both splits."""
    source = tmp_path / "vqa_rad"
    (source / "images").mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(source / "images" / f"p{number}.png")
    Image.new("RGB", (4, 4), (0, 0, 0)).save(source / "images" / "copy_of_p0.png")
    rows = [record(i, f"p{i % 8}.png") for i in range(16)] + [record(16, "copy_of_p0.png")]
    (source / "trainset.json").write_text(json.dumps(rows[:12]))
    (source / "testset.json").write_text(json.dumps(rows[12:]))
    return source


def record(number: int, picture: str, **change: Any) -> dict[str, Any]:
    row = {
        "qid": number, "image_name": picture, "image_organ": "HEAD" if number < 4 else "CHEST",
        "question": "How many?", "answer": number,
        "answer_type": "CLOSED " if number % 2 else "OPEN",
    }  # fmt: skip
    return row | change


def test_published_splits_keep_their_leaks_and_say_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("--from", "vqa_rad", "--input", folder, "--output", out, "--stats") == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "manifest.json", "pictures.csv", "test.jsonl", "train.jsonl"]  # fmt: skip
    assert len(lines(out / "train.jsonl")) == 12
    document = Document.from_json(lines(out / "train.jsonl")[1])
    assert document.turns[1].parts == ("1",)
    assert str(document.pictures[0].path) == str(folder / "images" / "p1.png")
    said = capsys.readouterr().out
    assert "5 of 5 pictures of test stand in train, too" in said
    assert "numbers read as text: 17 times" in said
    assert "not the published 3064" in said
    assert "       13  CHEST" in said
    assert len((out / "pictures.csv").read_text().splitlines()) == 10
    assert run("--from", "vqa_rad", "--input", folder, "--output", out) == 2
    assert "exists already" in capsys.readouterr().err


def test_halves_of_pictures_share_none_whatever_its_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--from", "vqa_rad", "--input", folder, "--test_share", 0.5, "--output"]
    assert run(*words, tmp_path / "a") == 0
    assert "0 of " in capsys.readouterr().out
    names = [
        {
            Path(row["image_path"]).name.removeprefix("copy_of_")
            for row in lines(tmp_path / "a" / f"{part}.jsonl")
        }
        for part in ("train", "test")
    ]
    assert names[0]
    assert names[1]
    assert not names[0] & names[1]
    assert run(*words, tmp_path / "b") == 0
    for part in ("train", "test"):
        one, other = (tmp_path / x / f"{part}.jsonl" for x in "ab")
        assert one.read_bytes() == other.read_bytes()
    assert run(*words, tmp_path / "file.jsonl") == 2


def test_the_same_documents_in_other_forms_and_back(folder: Path, tmp_path: Path) -> None:
    images = folder / "images"
    docs = tmp_path / "docs.jsonl"
    assert run("--from", "vqa_rad", "--input", folder, "--output", docs) == 0
    for name, suffix in (("llava", "json"), ("sharegpt", "json"), ("medmax", "jsonl")):
        there, back = tmp_path / f"{name}.{suffix}", tmp_path / f"{name}.back.jsonl"
        common = ["--image_folder", images]
        assert run("--from", "documents", "--to", name, "--input", docs, "--output", there,
                   *common) == 0  # fmt: skip
        assert run("--from", name, "--input", there, "--output", back, *common) == 0
        keep = [{k: v for k, v in row.items() if k != "credential"} for row in lines(back)]
        assert keep == lines(docs)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert info["sharegpt"]["file_name"] == "sharegpt.json"
    first = json.loads((tmp_path / "llava.json").read_text())[0]
    assert first["image"] == "p0.png"
    assert first["conversations"][0] == {"from": "human", "value": "<image>\nHow many?"}


def test_bad_records_are_named_and_the_rest_is_kept_on_demand(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [record(0, "p0.png"), record(1, "gone.png"), record(2, "p2.png", answer_type="MAYBE"),
            record(3, "../../p.png"), record(4, "broken.png"), record(5, "p5.png"),
            {"qid": 6}, record(5, "p6.png")]  # fmt: skip
    (folder / "images" / "broken.png").write_bytes(b"no picture")
    (folder / "trainset.json").write_text(json.dumps(rows)[:-1])  # torn at its end
    out = tmp_path / "out.jsonl"
    words = ["--from", "vqa_rad", "--split", "train", "--input", folder, "--output", out]
    assert run(*words) == 3
    said = capsys.readouterr().err
    path = folder / "trainset.json"
    for number, reason in (
        (1, "no such picture"), (2, "answer_type is str 'MAYBE'"), (3, "outside of the folder"),
        (4, "not a picture"), (6, "'question' is missing"), (8, "ends in the middle"),
    ):  # fmt: skip
        assert f"{path}: record {number}: " in said
        assert reason in said
    assert "6 of 9 records are bad, 6 of them listed above; nothing was written" in said
    assert not list(tmp_path.glob("out*"))
    assert run(*words, "--skip_bad", "--max_errors", 2) == 3  # the file has no end
    said = capsys.readouterr()
    assert said.err.count(f"{path}: record") == 2
    assert "1 records have an id that another one has, too" in said.out
    assert [row["id"] for row in lines(out)] == [0, 5, 5]
    kept = lines(tmp_path / "out.jsonl.bad.jsonl")
    assert len(kept) == 6
    assert kept[0]["record"] == rows[1]
    path.write_text(json.dumps(rows))
    assert run(*words, "--skip_bad") == 0
    assert run(*words, "--skip_bad", "--check", "none") == 0
    assert len(lines(out)) == 5  # pictures are not looked at


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no records in it"), ("[]", "no records in it"), ("[1]", "no record came through")],
)
def test_files_without_a_record_are_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(text)
    words = ["--from", "llava", "--input", tmp_path / "a.json", "--output", tmp_path / "o.jsonl"]
    assert run(*words, "--skip_bad") == 2
    assert message in capsys.readouterr().err


def test_what_a_format_cannot_hold_is_a_bad_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs.jsonl"
    rows = [{"text": "a<reserved08706>b", "id": 1}, {"text": "alone", "id": 2},
            {"text": "x<reserved08706>\ud800", "id": 3}]  # fmt: skip
    docs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "o.json"
    words = ["--from", "documents", "--to", "llava", "--input", docs, "--output", out]
    assert run(*words) == 3
    said = capsys.readouterr().err
    assert f"{docs}:2: --to llava: begins with an answer" in said
    assert f"{docs}:3: --to llava: a text is no Unicode" in said
    assert run(*words, "--skip_bad") == 0
    assert [row["id"] for row in json.loads(out.read_text())] == [1]
    assert run(*[*words[:3], "pathvqa", *words[4:]]) == 2
    assert "--to pathvqa: it can only be read" in capsys.readouterr().err


def test_a_subset_is_balanced_over_concepts(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    words = ["--from", "vqa_rad", "--input", folder, "--output", out, "--max_samples", 8]
    assert run(*words, "--balance", "--balance_key", "image_organ") == 0
    organs = [row["image_organ"] for row in lines(out)]
    assert (organs.count("HEAD"), organs.count("CHEST")) == (4, 4)
    ids = [int(row["id"]) for row in lines(out)]
    assert ids == sorted(ids)
    assert run(*words) == 0
    assert [int(row["id"]) for row in lines(out)] == list(range(8))


@given(
    st.lists(st.sampled_from("abcd"), max_size=40), st.integers(1, 50), st.integers(0, 3)
)  # fmt: skip
def test_balanced_takes_as_many_as_there_are_and_as_evenly(
    concepts: list[str], count: int, seed: int
) -> None:
    taken = balanced(concepts, count, seed)
    assert taken.sum() == min(count, len(concepts))
    have = {c: concepts.count(c) for c in set(concepts)}
    got = {c: sum(t and x == c for t, x in zip(taken, concepts, strict=True)) for c in have}
    most = max(got.values(), default=0)
    assert all(got[c] in (have[c], most, most - 1) for c in have)  # fewer only where none is left


def test_pictures_of_one_record_stay_together() -> None:
    joined = connected_components([["a", "b"], ["c"], ["b", "d"], ["e", "c"]])
    assert joined["a"] == joined["b"] == joined["d"]
    assert joined["c"] == joined["e"] != joined["a"]
    shares = [assign_split(str(i), 0.3) == "test" for i in range(2000)]
    assert 0.25 < np.mean(shares) < 0.35


def test_the_hash_of_a_split_depends_on_its_content_alone() -> None:
    rows = [{"text": f"<image>q{i}<reserved08706>a", "image_path": f"x/{i}.png"} for i in range(4)]
    moved = [{**row, "image_path": f"/elsewhere/{i}.png"} for i, row in enumerate(rows)]
    hashes = []
    for own in (rows, moved[::-1], rows[:3], [*rows[:3], {**rows[3], "text": "<image>q"}]):
        found = SplitHash()
        for row in own:
            found.add(Document.from_json(row))
        hashes.append(found.hexadecimal())
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_ids_that_repeat_are_counted() -> None:
    found = Duplicates()
    for identifier in (1, "1", 2, 1, None, None, 2, 2):
        found.add(identifier)
    assert found.count() == 3


@pytest.mark.skipif(not VQA_RAD.is_dir(), reason="needs shared/data/vqa_rad beside the project")
def test_vqa_rad_whole_is_the_published_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--from", "vqa_rad", "--input", VQA_RAD, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert said.count("the published split") == 2
    assert "203 of 203 pictures of test stand in train, too" in said


def test_a_converted_file_becomes_tokens(folder: Path, tmp_path: Path) -> None:
    from tokenizer import image_tokenization, tokenize_jsonl

    from medley.checkpoints.checkpoint import tiny_folder

    out = tmp_path / "out"
    assert run("--from", "vqa_rad", "--input", folder, "--output", out) == 0
    codes = tmp_path / "codes"
    words = ["--input", out / "pictures.csv", "--output", codes, "--ckpt", "tiny"]
    assert image_tokenization.main(list(map(str, words))) == 0
    tokenizer = tiny_folder() / "tokenizer" / "text_tokenizer.json"
    words = ["--input_file", out / "train.jsonl", "--image_codes", codes]
    words += ["--tokenizer_file", tokenizer, "--output_file", tmp_path / "tokens.jsonl"]
    assert tokenize_jsonl.main(list(map(str, words))) == 0
    assert len(TokenDataset(tmp_path / "tokens.jsonl")) == 12


def test_a_torn_picture_costs_its_own_records_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "images" / "p3.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:4000])  # its header is whole
    words = ["--from", "vqa_rad", "--input", folder]
    assert run(*words, "--output", tmp_path / "a", "--skip_bad") == 0
    assert "1 pictures could not be read and compared" in capsys.readouterr().out
    assert run(*words, "--output", tmp_path / "b", "--test_share", 0.5) == 3
    assert "broken picture" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert run(*words, "--output", tmp_path / "b", "--test_share", 0.5, "--skip_bad") == 0
    assert len(lines(tmp_path / "b" / "bad.jsonl")) == 2
    assert sum(len(lines(tmp_path / "b" / f"{part}.jsonl")) for part in ("train", "test")) == 15
    assert run(*words, "--output", tmp_path / "c", "--check", "whole", "--skip_bad") == 0
    assert len(lines(tmp_path / "c" / "bad.jsonl")) == 2


def test_splits_are_what_was_asked_for_or_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--from", "vqa_rad", "--output", tmp_path / "o.jsonl"]
    assert run(*words, "--input", folder / "trainset.json", "--split", "test") == 2
    assert "trainset.json is train" in capsys.readouterr().err
    assert run(*words, "--input", folder) == 0
    assert [row["split"] for row in lines(tmp_path / "o.jsonl")] == ["train"] * 12 + ["test"] * 5
    assert "5 of 5 pictures of test stand in train, too" in capsys.readouterr().out
    docs = ["--from", "documents", "--input", tmp_path / "o.jsonl"]
    assert run(*docs, "--output", tmp_path / "p.jsonl", "--split", "test") == 2
    assert "published without splits" in capsys.readouterr().err
    words = ["--from", "vqa_rad", "--to", "sharegpt", "--dataset", "rad", "--input", folder]
    assert run(*words, "--output", tmp_path / "share") == 0
    info = json.loads((tmp_path / "share" / "dataset_info.json").read_text())
    assert {name: entry["file_name"] for name, entry in info.items()} == {
        "rad_train": "train.json", "rad_test": "test.json"}  # fmt: skip


def test_texts_have_halves_too_and_none_is_empty_unsaid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs.jsonl"
    rows = [{"text": f"q{i % 30}<reserved08706>a"} for i in range(60)]
    docs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--from", "documents", "--input", docs, "--test_share", 0.5, "--output"]
    assert run(*words, tmp_path / "a") == 0
    halves = [{r["text"] for r in lines(tmp_path / "a" / f"{p}.jsonl")} for p in ("train", "test")]
    assert halves[0] and halves[1] and not halves[0] & halves[1]
    docs.write_text(json.dumps(rows[0]) + "\n")
    assert run(*words, tmp_path / "b") == 2
    assert "all records fell into one half" in capsys.readouterr().err


def test_values_that_json_cannot_hold_are_made_plain_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    table = pa.table({
        "file_name": ["a.png"], "caption": ["x"], "day": [datetime.date(2020, 1, 2)],
        "size": [float("nan")],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "m.parquet")
    words = ["--from", "medtrinity", "--input", tmp_path / "m.parquet"]
    assert run(*words, "--image_folder", tmp_path, "--output", tmp_path / "o.jsonl") == 0
    (row,) = lines(tmp_path / "o.jsonl")
    assert row["day"] == "2020-01-02"
    assert row["size"] is None
    (tmp_path / "n.jsonl").write_text('{"text": "a", "size": NaN}\n')
    words = ["--from", "documents", "--input", tmp_path / "n.jsonl"]
    assert run(*words, "--output", tmp_path / "p.jsonl") == 3
    assert "a value that JSON cannot hold" in capsys.readouterr().err


def test_pictures_of_documents_stay_below_a_folder_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    docs = tmp_path / "docs.jsonl"
    names = ["a.png", str(tmp_path / "pictures" / "a.png"), "../out.png", str(tmp_path / "out.png")]
    rows = [{"text": "<image>a<reserved08706>b", "image_path": name} for name in names]
    docs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--from", "documents", "--input", docs, "--output", tmp_path / "o.jsonl"]
    assert run(*words, "--image_folder", tmp_path / "pictures", "--skip_bad") == 0
    assert len(lines(tmp_path / "o.jsonl")) == 2
    assert capsys.readouterr().err.count("outside of the folder") == 2
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]
    mix = [{"id": 1, "image": "../../out.png", "conversations": turns}]
    (tmp_path / "deep" / "mix.json").write_text(json.dumps(mix))
    assert run("--from", "llava", "--input", "../mix.json", "--output", "o.jsonl") == 3
    assert "outside of the folder" in capsys.readouterr().err
