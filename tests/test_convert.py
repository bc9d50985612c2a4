"""`medley convert`: splits, leaks, subsets, bad records, sidecar files, deprecated flags."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from conversion import convert_dataset
from PIL import Image

from medley.data.document import Document
from medley.data.token_dataset import TokenDataset

VQA_RAD = ROOT.parent / "shared" / "data" / "vqa_rad"


def run(*words: Any) -> int:
    return convert_dataset.main([str(word) for word in words])


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset in VQA-RAD's format: eight images in both splits, one of them under two names."""
    source = tmp_path / "vqa_rad"
    (source / "images").mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(source / "images" / f"p{number}.png")
    Image.new("RGB", (4, 4), (0, 0, 0)).save(source / "images" / "copy_of_p0.png")
    rows = [record(i, f"p{i % 8}.png") for i in range(16)] + [record(16, "copy_of_p0.png")]
    (source / "trainset.json").write_text(json.dumps(rows[:12]))
    (source / "testset.json").write_text(json.dumps(rows[12:]))
    return source


def record(number: int, image: str, **change: Any) -> dict[str, Any]:
    row = {
        "qid": number, "image_name": image, "image_organ": "HEAD" if number < 4 else "CHEST",
        "question": "How many?", "answer": number,
        "answer_type": "CLOSED " if number % 2 else "OPEN",
    }  # fmt: skip
    return row | change


def test_published_splits_are_kept_and_leaks_reported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("--from", "vqa_rad", "--input", folder, "--output", out, "--stats") == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "images.csv", "manifest.json", "test.jsonl", "train.jsonl"]  # fmt: skip
    assert len(read_rows(out / "train.jsonl")) == 12
    document = Document.from_json(read_rows(out / "train.jsonl")[1])
    assert document.turns[1].parts == ("1",)
    assert str(document.images[0].path) == str(folder / "images" / "p1.png")
    printed = capsys.readouterr().out
    assert "5 of 5 images of test are also in train" in printed
    assert "numbers read as text: 17 times" in printed
    assert "not the published split of 3064 records" in printed
    assert "       13  CHEST" in printed
    assert len((out / "images.csv").read_text().splitlines()) == 10
    assert run("--from", "vqa_rad", "--input", folder, "--output", out) == 2
    assert "already exists" in capsys.readouterr().err


def test_random_splits_have_no_common_image(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--from", "vqa_rad", "--input", folder, "--test_fraction", 0.5, "--output"]
    assert run(*words, tmp_path / "a") == 0
    assert "0 of " in capsys.readouterr().out
    train, test = (
        {
            Path(row["image_path"]).name.removeprefix("copy_of_")
            for row in read_rows(tmp_path / "a" / f"{split}.jsonl")
        }
        for split in ("train", "test")
    )
    assert train
    assert test
    assert not train & test
    assert run(*words, tmp_path / "b") == 0
    for split in ("train", "test"):
        first, second = (tmp_path / x / f"{split}.jsonl" for x in "ab")
        assert first.read_bytes() == second.read_bytes()
    assert run(*words, tmp_path / "file.jsonl") == 2


def test_random_split_of_texts_has_no_common_text_and_no_empty_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs.jsonl"
    rows = [{"text": f"q{i % 30}<reserved08706>a"} for i in range(60)]
    write_rows(docs, rows)
    words = ["--from", "documents", "--input", docs, "--test_fraction", 0.5, "--output"]
    assert run(*words, tmp_path / "a") == 0
    train, test = (
        {row["text"] for row in read_rows(tmp_path / "a" / f"{split}.jsonl")}
        for split in ("train", "test")
    )
    assert train
    assert test
    assert not train & test
    write_rows(docs, rows[:1])
    assert run(*words, tmp_path / "b") == 2
    assert "The split left one side empty" in capsys.readouterr().err


def test_round_trip_through_other_formats_preserves_documents(folder: Path, tmp_path: Path) -> None:
    images = folder / "images"
    docs = tmp_path / "docs.jsonl"
    assert run("--from", "vqa_rad", "--input", folder, "--output", docs) == 0
    for name, suffix in (("llava", "json"), ("sharegpt", "json"), ("medmax", "jsonl")):
        converted, back = tmp_path / f"{name}.{suffix}", tmp_path / f"{name}.back.jsonl"
        common = ["--image_folder", images]
        assert run("--from", "documents", "--to", name, "--input", docs, "--output", converted,
                   *common) == 0  # fmt: skip
        assert run("--from", name, "--input", converted, "--output", back, *common) == 0
        rows = [{k: v for k, v in row.items() if k != "credential"} for row in read_rows(back)]
        assert rows == read_rows(docs)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert info["sharegpt"]["file_name"] == "sharegpt.json"
    first = json.loads((tmp_path / "llava.json").read_text())[0]
    assert first["image"] == "p0.png"
    assert first["conversations"][0] == {"from": "human", "value": "<image>\nHow many?"}


def test_bad_records_fail_the_conversion_or_are_skipped_and_listed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [record(0, "p0.png"), record(1, "gone.png"), record(2, "p2.png", answer_type="MAYBE"),
            record(3, "../../p.png"), record(4, "broken.png"), record(5, "p5.png"),
            {"qid": 6}, record(5, "p6.png")]  # fmt: skip
    (folder / "images" / "broken.png").write_bytes(b"not an image")
    (folder / "trainset.json").write_text(json.dumps(rows)[:-1])  # truncated
    out = tmp_path / "out.jsonl"
    words = ["--from", "vqa_rad", "--split", "train", "--input", folder, "--output", out]
    assert run(*words) == 3
    errors = capsys.readouterr().err
    path = folder / "trainset.json"
    for number, reason in (
        (1, "No such image"), (2, "answer_type is invalid (got str 'MAYBE'"),
        (3, "outside of the folder"), (4, "The image cannot be read"), (6, "'question' is missing"),
        (8, "ends in the middle"),
    ):  # fmt: skip
        assert f"{path}: record {number}: " in errors
        assert reason in errors
    assert "6 of 9 records are bad (the first 6 are listed above). Nothing was written" in errors
    assert not list(tmp_path.glob("out*"))
    skip = ["--on_error", "skip"]
    assert run(*words, *skip, "--max_errors", 2) == 3  # because the file is truncated
    printed = capsys.readouterr()
    assert printed.err.count(f"{path}: record") == 2
    assert "1 files are truncated" in printed.err
    assert "1 records have the id of an earlier record" in printed.out
    assert [row["id"] for row in read_rows(out)] == [0, 5, 5]
    rejected = read_rows(tmp_path / "out.jsonl.bad.jsonl")
    assert len(rejected) == 6
    assert rejected[0]["record"] == rows[1]
    path.write_text(json.dumps(rows))
    assert run(*words, *skip) == 0
    assert run(*words, *skip, "--validate_images", "none") == 0
    assert len(read_rows(out)) == 5


def test_deprecated_flags_still_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "trainset.json").write_text(json.dumps([record(0, "p0.png"), {"qid": 1}]))
    words = ["--from", "vqa_rad", "--input", folder, "--output", tmp_path / "out"]
    words += ["--skip_bad", "--no_leaks", "--check", "whole", "--max_samples", 3, "--balance",
              "--balance_key", "image_organ"]  # fmt: skip
    words += ["--pictures", tmp_path / "list.csv"]  # alias
    assert run(*words) == 0
    warnings = capsys.readouterr().err
    for flag in ("skip_bad", "no_leaks", "check", "max_samples", "balance", "balance_key"):
        assert f"--{flag} is deprecated" in warnings
    options = json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]
    assert options["on_error"] == "skip"
    assert options["check_leaks"] is False
    assert options["validate_images"] == "full"
    assert options["limit"] == 3
    assert (tmp_path / "list.csv").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The input contains no records"),
        ("[]", "The input contains no records"),
        ("[1]", "The input contains no valid records (1 bad)"),
    ],
)
def test_input_without_records_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(text)
    words = ["--from", "llava", "--input", tmp_path / "a.json", "--output", tmp_path / "o.jsonl"]
    assert run(*words, "--on_error", "skip") == 2
    assert message in capsys.readouterr().err


def test_record_that_the_target_cannot_represent_is_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs.jsonl"
    write_rows(docs, [{"text": "a<reserved08706>b", "id": 1}, {"text": "alone", "id": 2},
                      {"text": "x<reserved08706>\ud800", "id": 3}])  # fmt: skip
    out = tmp_path / "o.json"
    words = ["--from", "documents", "--to", "llava", "--input", docs, "--output", out]
    assert run(*words) == 3
    errors = capsys.readouterr().err
    assert f"{docs}:2: --to llava: The document begins with an assistant turn" in errors
    assert f"{docs}:3: --to llava: A string is not valid Unicode" in errors
    assert run(*words, "--on_error", "skip") == 0
    assert [row["id"] for row in json.loads(out.read_text())] == [1]
    assert run(*[*words[:3], "pathvqa", *words[4:]]) == 2
    assert "--to pathvqa: The format is read-only" in capsys.readouterr().err


def test_subset_is_balanced_over_domains(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    words = ["--from", "vqa_rad", "--input", folder, "--output", out, "--limit", 8]
    assert run(*words, "--balanced", "--balance_by", "image_organ") == 0
    organs = [row["image_organ"] for row in read_rows(out)]
    assert (organs.count("HEAD"), organs.count("CHEST")) == (4, 4)
    ids = [int(row["id"]) for row in read_rows(out)]
    assert ids == sorted(ids)
    assert run(*words) == 0
    assert [int(row["id"]) for row in read_rows(out)] == list(range(8))


@pytest.mark.skipif(
    not VQA_RAD.is_dir(),
    reason="needs VQA-RAD in ../shared/data, which is not part of the repository",
)
def test_published_vqa_rad_is_recognized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--from", "vqa_rad", "--input", VQA_RAD, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert printed.count(", the published split") == 2
    assert "203 of 203 images of test are also in train" in printed


def test_converted_file_can_be_tokenized(folder: Path, tmp_path: Path) -> None:
    from tokenizer import image_tokenization, tokenize_jsonl

    from medley.tiny.embedded import tiny_folder

    out = tmp_path / "out"
    assert run("--from", "vqa_rad", "--input", folder, "--output", out) == 0
    codes = tmp_path / "codes"
    words = ["--input", out / "images.csv", "--output", codes, "--ckpt", "tiny"]
    assert image_tokenization.main(list(map(str, words))) == 0
    tokenizer = tiny_folder() / "tokenizer" / "text_tokenizer.json"
    words = ["--input_file", out / "train.jsonl", "--image_codes", codes]
    words += ["--tokenizer_file", tokenizer, "--output_file", tmp_path / "tokens.jsonl"]
    assert tokenize_jsonl.main(list(map(str, words))) == 0
    assert len(TokenDataset(tmp_path / "tokens.jsonl")) == 12


def test_truncated_image_rejects_only_its_own_records(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "images" / "p3.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:4000])  # The header is valid.
    words = ["--from", "vqa_rad", "--input", folder]
    skip = ["--on_error", "skip"]
    assert run(*words, "--output", tmp_path / "a", *skip) == 0
    assert "1 images could not be compared" in capsys.readouterr().out
    split = ["--output", tmp_path / "b", "--test_fraction", 0.5]
    assert run(*words, *split) == 3
    assert f"{path}: " in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert run(*words, *split, *skip) == 0
    assert len(read_rows(tmp_path / "b" / "bad.jsonl")) == 2
    written = [len(read_rows(tmp_path / "b" / f"{name}.jsonl")) for name in ("train", "test")]
    assert sum(written) == 15
    full = ["--output", tmp_path / "c", "--validate_images", "full"]
    assert run(*words, *full, *skip) == 0
    assert len(read_rows(tmp_path / "c" / "bad.jsonl")) == 2


def test_split_of_a_single_file_and_of_single_outputs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--from", "vqa_rad", "--output", tmp_path / "o.jsonl"]
    assert run(*words, "--input", folder / "trainset.json", "--split", "test") == 2
    assert "trainset.json is train" in capsys.readouterr().err
    assert run(*words, "--input", folder) == 0
    splits = [row["split"] for row in read_rows(tmp_path / "o.jsonl")]
    assert splits == ["train"] * 12 + ["test"] * 5
    assert "5 of 5 images of test are also in train" in capsys.readouterr().out
    docs = ["--from", "documents", "--input", tmp_path / "o.jsonl"]
    assert run(*docs, "--output", tmp_path / "p.jsonl", "--split", "test") == 2
    assert "published without splits" in capsys.readouterr().err


def test_dataset_info_has_an_entry_for_each_split(folder: Path, tmp_path: Path) -> None:
    words = ["--from", "vqa_rad", "--to", "sharegpt", "--dataset", "rad", "--input", folder]
    assert run(*words, "--output", tmp_path / "share") == 0
    info = json.loads((tmp_path / "share" / "dataset_info.json").read_text())
    assert {name: entry["file_name"] for name, entry in info.items()} == {
        "rad_train": "train.json", "rad_test": "test.json"}  # fmt: skip


def test_table_values_are_converted_to_json_and_nan_in_json_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    table = pa.table({
        "file_name": ["a.png"], "caption": ["x"], "day": [datetime.date(2020, 1, 2)],
        "size": [float("nan")],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "m.parquet")
    words = ["--from", "medtrinity", "--input", tmp_path / "m.parquet"]
    assert run(*words, "--image_folder", tmp_path, "--output", tmp_path / "o.jsonl") == 0
    (row,) = read_rows(tmp_path / "o.jsonl")
    assert row["day"] == "2020-01-02"
    assert row["size"] is None
    (tmp_path / "n.jsonl").write_text('{"text": "a", "size": NaN}\n')
    words = ["--from", "documents", "--input", tmp_path / "n.jsonl"]
    assert run(*words, "--output", tmp_path / "p.jsonl") == 3
    assert "JSON cannot represent a value" in capsys.readouterr().err


def test_images_outside_of_the_image_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    docs = tmp_path / "docs.jsonl"
    names = ["a.png", str(tmp_path / "images" / "a.png"), "../out.png", str(tmp_path / "out.png")]
    write_rows(docs, [{"text": "<image>a<reserved08706>b", "image_path": n} for n in names])
    words = ["--from", "documents", "--input", docs, "--output", tmp_path / "o.jsonl"]
    assert run(*words, "--image_folder", tmp_path / "images", "--on_error", "skip") == 0
    assert len(read_rows(tmp_path / "o.jsonl")) == 2
    assert capsys.readouterr().err.count("outside of the folder") == 2
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]
    mix = [{"id": 1, "image": "../../out.png", "conversations": turns}]
    (tmp_path / "deep" / "mix.json").write_text(json.dumps(mix))
    assert run("--from", "llava", "--input", "../mix.json", "--output", "o.jsonl") == 3
    assert "outside of the folder" in capsys.readouterr().err
