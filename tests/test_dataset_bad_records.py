"""Invalid records and files: the error names the problem, and no reader crashes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from dataset_records import role_texts

from medley.datasets.base import ConversionConfig, RecordError
from medley.datasets.classification import LabelSet
from medley.datasets.readers import records_of
from medley.datasets.registry import FORMATS, FormatName
from medley.datasets.samples import read_record
from medley.errors import UserError

HERE = ConversionConfig(Path())
VALID = {"id": 1, "image": "a.png", "conversations": [
    {"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]}  # fmt: skip


def turns(*messages: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": a, "value": b} for a, b in messages]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            turns(("human", "Q"), ("gpt", "A")),
            "placeholders differs from the number of images (got 0, expected 1",
        ),
        (
            turns(("human", "<image><image>"), ("gpt", "A")),
            "differs from the number of images (got 2, expected 1",
        ),
        (turns(("gpt", "<image>"), ("human", "A")), "Message 0 has an invalid sender (got str"),
        (turns(("human", "<image>"), ("human", "A")), "Message 1 has an invalid sender"),
        (turns(("system", "<image>")), "expected human"),
        (turns(("human", None)), "'value' is not a string (got NoneType"),
        (turns(("human", True)), "'value' is not a string (got bool"),
        ({"conversations": []}, "is not a list of messages"),
        ({"conversations": "x"}, "is not a list of messages"),
        ({"image": "../../etc/passwd"}, "outside of the folder"),
        ({"image": "/etc/passwd"}, "outside of the folder"),
        ({"image": 3}, "An image path is invalid"),
        ({"image": ["a.png", "b.png"]}, "got 1, expected 2"),
    ],
)
def test_invalid_llava_record_gives_the_reason(change: dict[str, Any], message: str) -> None:
    config = ConversionConfig(Path("x.json"), image_folder=Path("images"))
    FORMATS["llava"].read(VALID, config)
    with pytest.raises(RecordError, match=re.escape(message)):
        FORMATS["llava"].read({**VALID, **change}, config)


def test_numbers_are_read_as_text_with_a_remark() -> None:
    sample = FORMATS["llava"].read({**VALID, **turns(("human", "<image>"), ("gpt", 4))}, HERE)
    assert role_texts(sample.document)[1] == ("assistant", "4")
    assert sample.remarks == ("numbers read as text",)


@pytest.mark.parametrize("record", [None, 3, "x", [], [1], {}])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_value_that_is_not_a_record_raises_record_error(
    name: FormatName, record: Any, tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text("[]")
    config = ConversionConfig(tmp_path / "x.json", image_folder=Path("p"))
    with pytest.raises(RecordError):
        read_record(FORMATS[name], record, config)


LABELED: dict[FormatName, Any] = {
    "medmnist": "ordinal", "image_folder": "one_label", "labels_csv": "each_label",
}  # fmt: skip
VALID_RECORDS: dict[FormatName, dict[str, Any]] = {
    "documents": {"text": "<image>a<reserved08706>b", "image_path": "a.png"},
    "llava": {"id": 1, "image": "a.png", "domain": {}, "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "medmax": {"text": "<image>a<reserved08706>b", "image_path": "a.png", "credential": "no"},
    "medtrinity": {"file_name": "a.png", "caption": "b", "id": "1"},
    "vqa_rad": {"qid": 1, "image_name": "a.png", "question": "a", "answer": "b",
                "answer_type": "OPEN"},
    "slake": {"qid": 1, "img_name": "a.png", "question": "a", "answer": "b", "answer_type": "OPEN",
              "q_lang": "en"},
    "pathvqa": {"image": "a", "question": "a", "answer": "b", "split": "val", "id": "1"},
    "pmc_vqa": {"Figure_path": "a.png", "Question": "a", "Answer": "b", "Choice A": "b",
                "Choice B": "c", "Choice C": "d", "Choice D": "e", "Answer_label": "A"},
    "science_qa": {"id": "1", "question": "a", "choices": ["b", "c"], "answer": 1, "hint": "",
                   "image": "a.png", "lecture": "", "solution": "", "split": "test"},
    "text_qa": {"question": "a", "answer": "b"},
    "text_qa_csv": {"question": "a", "answer": "b"},
    "captions": {"image": "a.png", "caption": "b"},
    **{name: {"id": "a", "image_id": "a", "image": "a.png", "asked": "b", "value": "positive",
              "patient": None, "fields": {},
              "labels": LabelSet("x", name, kind, ("b", "c"))} for name, kind in LABELED.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_unexpected_value_of_any_field_raises_one_line_error(
    name: FormatName, tmp_path: Path
) -> None:
    """Replaces each field of a valid record with values of other types and nested values."""
    (tmp_path / "x.json").write_text("[]")
    spec, config = FORMATS[name], ConversionConfig(tmp_path / "x.json", image_folder=Path("p"))
    read_record(spec, VALID_RECORDS[name], config)
    unexpected: list[Any] = [
        None, [], {}, 5, -1, True, 1.5, float("nan"), "", "\0", [[]], ["a", "b"], b"x",
    ]  # fmt: skip
    unexpected += [json.loads("[" * 300 + "]" * 300), [{}], [{"from": []}]]
    unexpected += [[{"from": {}, "value": 1}], {"a": [1]}]
    for key in VALID_RECORDS[name]:
        for value in unexpected:
            try:
                sample = read_record(spec, {**VALID_RECORDS[name], key: value}, config)
                json.dumps(sample.document.to_json())
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "text", "valid", "message"),
    [
        ("a.json", b'[{"id": 1}, {"id": 2}, {"id"', 2, "ends in the middle"),
        ("a.json", b'[{"id": 1}, {"id": 2},]', 2, "Invalid JSON (trailing comma"),
        ("a.json", b'[{"id": 1}, {"id": 2} {"id": 3}]', 2, "Invalid JSON (missing comma)"),
        ("a.json", b'\xef\xbb\xbf [{"id": "\xff"}]', 0, "Invalid UTF-8"),
        ("a.json", b'[{"id": 1}, {"id": 12345678901234567890123456789}]', 2, ""),
        ("a.json", b'[{"id": 1}, {"x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}]", 1, "too deep"),
        ("a.json", b'[{"id": 1}] x', 1, "extra data after the list"),
        ("a.jsonl", b'{"id": 1}\r\n\r\nno\n{"id": 2}\n', 2, "Invalid JSON"),
        ("a.csv", b"id,b\n1,2\n3\n4,5\n", 2, "cells is invalid (got 1, expected 2)"),
        ("a.csv", b'id,b\n"1" x,2\n3,4\n', 1, "Invalid CSV"),
        ("a.TSV", b"id\tb\n1\t2\n", 1, ""),
        ("a.jsonl", b'{"id": 1}\n{"id": ' + b"9" * 5000 + b"}\n", 1, "Invalid JSON"),
        ("a.csv", b'id,b\n1,2\n3,"x\n', 1, "Invalid CSV"),
    ],
)
def test_damaged_file_gives_its_valid_records_and_one_error(
    name: str, text: bytes, valid: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(text)
    records = list(records_of(tmp_path / name))
    errors = [(where, record) for where, _, record in records if isinstance(record, RecordError)]
    assert len(records) - len(errors) == valid
    assert len(errors) == bool(message)
    if message:
        assert message in str(errors[0][1])
        assert str(tmp_path / name) in errors[0][0]


def test_json_list_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medley.datasets.readers._CHUNK", 7)
    rows = [{"id": i, "text": "größe " * (i % 5), "list": [1, [2.5, None]]} for i in range(60)]
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
        assert [record for _, _, record in records_of(path)] == rows
    numbers = list(range(0, 4000, 7))
    path.write_text(json.dumps(numbers))
    assert [record for _, _, record in records_of(path)] == numbers
