"""`medley tokenize`: good lines, bad lines, truncation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from tokenizer import tokenize_jsonl

from medley.data import document_tokenizer
from medley.data.document import Document, DocumentError, ImagePart, Turn
from medley.data.document_tokenizer import (
    DocumentTokenizer,
    DocumentTooLong,
    MissingImageCodes,
    TokenizedDocument,
    parse_line,
    truncate_text,
)
from medley.data.file_tokenizer import TokenizationStats
from medley.data.image_token_store import write_partition
from medley.data.token_dataset import TokenDataset
from medley.data.vocabulary import TextTokenizer
from medley.errors import UserError
from medley.utils.jsonl import line_ranges
from medley.utils.manifest import read_manifest

PROGRAM = "tokenizer.tokenize_jsonl"
TOKENIZER = GOLDEN / "tiny_chameleon_tokenizer" / "text_tokenizer_modified.json"


def write_lines(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def documents(count: int) -> list[dict[str, Any]]:
    return [
        {"text": f"<image>What {i}?<reserved08706>An ä {i}.", "image_path": f"{i % 7}.png",
         "source": "x", "task": "VQA", "id": i}
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def codes_folder(tmp_path: Path) -> Path:
    codes = np.arange(7 * 4, dtype=np.uint16).reshape(7, 4)
    names = [f"{i}.png" for i in range(7)]
    write_partition(tmp_path / "codes" / "partition_0_rank_0.parquet", names, codes, [])
    return tmp_path / "codes"


def test_output_does_not_depend_on_number_of_workers(
    tmp_path: Path, codes_folder: Path, program: Callable[..., Any]
) -> None:
    source = write_lines(tmp_path / "docs.jsonl", documents(4000))
    flags = ["--input_file", source, "--tokenizer_file", TOKENIZER, "--image_codes", codes_folder]
    done = program(PROGRAM, *flags, "--output_file", tmp_path / "a.jsonl", "--num_workers", 3)
    assert "4000 documents" in done.stdout
    assert "tokens up to" in done.stdout
    program(PROGRAM, *flags, "--output_file", tmp_path / "b.jsonl", "--num_workers", 1)
    program(PROGRAM, *flags, "--output_file", tmp_path / "c.parquet", "--num_workers", 2)
    written = (tmp_path / "a.jsonl").read_bytes()
    assert written == (tmp_path / "b.jsonl").read_bytes()
    tokenizer = DocumentTokenizer(TOKENIZER, codes_folder)
    expected = []
    for row in documents(4000):
        document = tokenizer.tokenize(row)
        assert document is not None
        expected.append(json.dumps({**row, "tokens": document.ids}))
    assert written.decode().splitlines() == expected
    parquet, jsonl = TokenDataset(tmp_path / "c.parquet"), TokenDataset(tmp_path / "a.jsonl")
    assert all((a == b).all() for a, b in zip(parquet, jsonl, strict=True))
    assert parquet.task(3999) == jsonl.task(3999) == "VQA"
    counts = read_manifest(tmp_path / "c.parquet")["counts"]
    assert counts["images"] == 4000
    assert counts["image_tokens"] == 4000 * 6
    assert counts["tokens"] == int(parquet.lengths.sum())


BAD: list[tuple[Any, str]] = [
    (b"{not json", "Invalid JSON (Expecting property name"),
    ([1, 2], "expected an object"),
    ({"image_path": "1.png"}, "neither 'text' nor 'messages'"),
    (
        {"text": "<image><image>", "image_path": "1.png"},
        "placeholders (2) differs from the number of images (1)",
    ),
    ({"text": "<image>", "image_tokens": [1, 2, 3, 8192]}, "Image code 8192 is out of range"),
    ({"text": "<image>", "image_tokens": [1, 2, 3]}, "An image has 3 codes (expected 4"),
    ({"text": "<image>", "image_path": "none.png"}, "The image none.png has no codes in"),
    (b'{"text": "\xff"}', "not UTF-8 (byte 10"),
    ({"text": "word " * 500}, "--max_length is 100"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "Unsupported role 'tool'"),
    (b'{"text": "bad \\ud800"}', "unpaired surrogate"),
    ({"text": "<image>", "image_path": "a\0b.png"}, "contains a NUL"),
    (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", "Unsupported JSON"),
]


def test_bad_lines_are_listed_and_nothing_is_written(
    tmp_path: Path, codes_folder: Path, program: Callable[..., Any]
) -> None:
    good = documents(3)
    source = write_lines(tmp_path / "docs.jsonl", [good[0], *(b for b, _ in BAD), *good[1:]])
    flags = ["--input_file", source, "--tokenizer_file", TOKENIZER, "--image_codes", codes_folder]
    flags += ["--max_length", "100", "--output_file", tmp_path / "out.jsonl"]
    done = program(PROGRAM, *flags, status=3)
    for number, (_, reason) in enumerate(BAD, 2):
        assert f"{source}:{number}: " in done.stderr
        assert reason in done.stderr
    assert f"{len(BAD)} bad lines" in done.stderr
    assert "1 without codes of an image, 1 too long" in done.stderr
    assert not list(tmp_path.glob("out*"))
    done = program(PROGRAM, *flags, "--max_errors", 2, status=3)
    assert done.stderr.count(f"{source}:") == 3  # two lines and the total

    done = program(PROGRAM, *flags, "--on_error", "skip")
    assert f"{len(BAD)} bad lines" in done.stdout
    rows = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2]
    bad_lines = [
        json.loads(x) for x in (tmp_path / "out.jsonl.bad_lines.jsonl").read_text().splitlines()
    ]
    assert [bad["line"] for bad in bad_lines] == list(range(2, 2 + len(BAD)))
    assert bad_lines[1]["content"] == "[1, 2]"
    assert bad_lines[7]["content"] == '{"text": "\\xff"}'


def test_too_long_line_is_reported_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(document_tokenizer, "MAX_LINE_BYTES", 1 << 18)
    rows = [{"text": "a"}, {"text": "b" * (1 << 19)}, {"text": "c"}]
    source = write_lines(tmp_path / "docs.jsonl", rows)
    flags = ["--input_file", source, "--tokenizer_file", TOKENIZER, "--num_workers", 1]
    flags += ["--output_file", tmp_path / "out.jsonl", "--on_error", "skip"]
    assert tokenize_jsonl.main(list(map(str, flags))) == 0
    assert (
        "docs.jsonl:2: The line is too long (got 524301 bytes, expected at most 262144)"
        in capsys.readouterr().err
    )
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_byte_order_mark_and_crlf_are_accepted(tmp_path: Path, program: Callable[..., Any]) -> None:
    source = tmp_path / "docs.jsonl"
    rows = "\r\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in ("中文", "б", "a\r\nb"))
    source.write_bytes(b"\xef\xbb\xbf" + rows.encode() + b"\r\n\r\n")
    out = tmp_path / "out.jsonl"
    program(PROGRAM, "--input_file", source, "--tokenizer_file", TOKENIZER, "--output_file", out)
    tokenizer = TextTokenizer.from_file(TOKENIZER)
    documents = [
        Document.from_ids(json.loads(line)["tokens"], tokenizer)
        for line in out.read_text().splitlines()
    ]
    assert [d.turns[0].parts for d in documents] == [("中文",), ("б",), ("a\r\nb",)]


def test_manifest_has_token_space_only_if_all_codes_come_from_the_store(
    tmp_path: Path, codes_folder: Path, program: Callable[..., Any]
) -> None:
    (codes_folder / "manifest.json").write_text('{"token_space": "abc", "fit": "pad"}')
    rows: list[Any] = [{"text": "<image>", "image_path": "1.png"}]
    out = tmp_path / "out.jsonl"
    for more, expected in ([], "abc"), ([{"text": "<image>", "image_tokens": [1, 2, 3, 4]}], None):
        source = write_lines(tmp_path / "docs.jsonl", rows + more)
        flags = [
            "--input_file",
            source,
            "--tokenizer_file",
            TOKENIZER,
            "--image_codes",
            codes_folder,
        ]
        program(PROGRAM, *flags, "--output_file", out)
        assert read_manifest(out)["token_space"] == expected


@given(
    text=st.lists(st.sampled_from([b"a", b"\n", b"long line ", b"\r\n"]), max_size=60),
    size=st.integers(1, 30),
)
def test_line_ranges_contain_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, text: list[bytes], size: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes(b"".join(text))
    lines = [line for where in line_ranges(path, size) for line in where.lines(path)]
    expected = enumerate(b"".join(text).split(b"\n"), 1)
    assert lines == [(n, line.rstrip(b"\r")) for n, line in expected if line.strip()]


PARTS = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=30),
    st.lists(st.integers(0, 8191), min_size=4, max_size=4).map(lambda c: ImagePart(codes=tuple(c))),
)


@given(
    turns=st.lists(st.lists(PARTS, max_size=4), min_size=2, max_size=4),
    limit=st.integers(2, 60),
)
def test_truncation_keeps_images_and_turns(
    tokenizer: TextTokenizer, turns: list[list[Any]], limit: int
) -> None:
    if len(turns) % 2:
        turns = turns[:1]
    roles = ["assistant"] if len(turns) == 1 else ["user", "assistant"] * 2
    document = Document(tuple(Turn(r, tuple(p)) for r, p in zip(roles, turns, strict=False)))
    ids = document.to_ids(tokenizer)
    if len(ids) <= limit:
        return
    try:
        short = truncate_text(ids, limit, tokenizer.vocabulary)
    except DocumentTooLong as error:
        assert f"--max_length is {limit}" in str(error)
        return
    assert len(short) == limit
    again = Document.from_ids(short, tokenizer)
    assert again.images == document.images
    assert len(again.turns) == len(document.turns)


def test_truncation_removes_start_of_questions_then_end_of_answers(
    tokenizer: TextTokenizer,
) -> None:
    document = Document.from_json({"text": "abc def<reserved08706>ghi jkl"})
    ids = document.to_ids(tokenizer)
    question_tokens = len(tokenizer.encode("abc def"))
    short = truncate_text(ids, len(ids) - 1, tokenizer.vocabulary)
    turns = Document.from_ids(short, tokenizer).turns
    assert "abc def".endswith(str(turns[0].parts[0]))
    assert turns[1].parts == ("ghi jkl",)
    short = truncate_text(ids, len(ids) - question_tokens - 1, tokenizer.vocabulary)
    turns = Document.from_ids(short, tokenizer).turns
    assert turns[0].parts == ()
    assert "ghi jkl".startswith(str(turns[1].parts[0]))
    twice = Document.from_json({"text": "a<reserved08706>bcd<reserved08706>e<reserved08706>fgh"})
    ids = twice.to_ids(tokenizer)
    for limit in range(8, len(ids)):  # an empty answer would train the model to give none
        try:
            turns = Document.from_ids(
                truncate_text(ids, limit, tokenizer.vocabulary), tokenizer
            ).turns
        except DocumentTooLong:
            continue
        assert turns[1].parts and turns[3].parts


def test_overflow_options(tmp_path: Path, program: Callable[..., Any]) -> None:
    rows = [
        {"text": "word " * 50},
        {"text": "short"},
        {"text": "<image>", "image_tokens": [1] * 40},
    ]
    source = write_lines(tmp_path / "docs.jsonl", rows)
    flags = ["--input_file", source, "--tokenizer_file", TOKENIZER, "--max_length", 20]
    flags += ["--output_file", tmp_path / "out.jsonl"]
    done = program(PROGRAM, *flags, "--overflow", "trim_text", status=3)
    assert (
        "docs.jsonl:3: The document has 44 tokens, and 44 of them cannot be truncated"
        in done.stderr
    )
    done = program(PROGRAM, *flags, "--overflow", "drop")
    assert "1 documents" in done.stdout
    assert "2 documents dropped because they are too long" in done.stdout
    source = write_lines(tmp_path / "docs.jsonl", rows[:2])
    done = program(PROGRAM, *flags, "--overflow", "trim_text")
    assert "1 truncated by" in done.stdout
    assert TokenDataset(tmp_path / "out.jsonl").lengths.max() == 20


def test_invalid_options_exit_with_status_2(tmp_path: Path, program: Callable[..., Any]) -> None:
    flags = ["--tokenizer_file", TOKENIZER, "--output_file", tmp_path / "o.jsonl"]
    done = program(PROGRAM, "--input_file", tmp_path / "none.jsonl", *flags, status=2)
    assert "none.jsonl: File not found" in done.stderr
    source = write_lines(tmp_path / "docs.jsonl", [])
    done = program(PROGRAM, "--input_file", source, *flags, status=2)
    assert "The file has no documents to write" in done.stderr
    done = program(PROGRAM, "--input_file", source, *flags[:2], "--output_file", "x.csv", status=2)
    assert "expected .jsonl or .parquet" in done.stderr
    broken = tmp_path / "broken.json"
    broken.write_text(TOKENIZER.read_text().replace("<eoss>", "<other>"))
    flags[1] = broken
    done = program(PROGRAM, "--input_file", source, *flags, status=2)
    assert "The special token '<eoss>' is missing" in done.stderr


def test_image_without_codes_raises_with_the_fix() -> None:
    with pytest.raises(
        MissingImageCodes, match=r"a\.png has no codes in the line\. .*--image_codes"
    ):
        DocumentTokenizer(TOKENIZER)(b'{"text": "<image>", "image_path": "a.png"}')


def test_deeply_nested_json_raises() -> None:
    with pytest.raises(DocumentError, match="nested too deeply"):
        parse_line(b"[" * 100_000)
    assert issubclass(DocumentError, UserError)


def test_stats_of_ranges_are_merged() -> None:
    total = TokenizationStats()
    for length in (5, 8, 9):
        own = TokenizationStats()
        own.add_document(TokenizedDocument({}, [0] * length, 1, 3, 0, truncated_tokens=length % 2))
        own.add_error(MissingImageCodes("x"))
        total.merge(own)
    assert total.lengths == {8: 2, 16: 1}
    assert total.counts() == {
        "documents": 3, "tokens": 22, "images": 3, "image_tokens": 9,
        "images_with_inline_codes": 0, "truncated_documents": 2, "truncated_tokens": 2,
        "dropped_documents": 0, "bad_lines": 3, "missing_image_codes": 3, "too_long": 0,
    }  # fmt: skip
    assert "3 documents, 22 tokens (13 text tokens, 9 image tokens of 3 images)" in total.report()
