"""Records that are no records: named, and no reader is brought down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medley.data.document import Document
from medley.data.vocabulary import IMAGE
from medley.datasets.conversion import read_record
from medley.datasets.readers import records_of
from medley.datasets.registry import FORMATS, ConversionConfig, RecordError, Sample
from medley.errors import UserError

HERE = ConversionConfig(Path())


def read_all(name: str, choices: ConversionConfig) -> list[Sample]:
    form = FORMATS[name]
    return [form.read(record, choices) for _, _, record in form.records(choices)]


def said(document: Document) -> list[tuple[str, str]]:
    """Roles and words, with a mark for each picture."""
    return [
        (turn.role, "".join(p if isinstance(p, str) else IMAGE for p in turn.parts))
        for turn in document.turns
    ]


GOOD = {"id": 1, "image": "a.png", "conversations": [
    {"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]}  # fmt: skip


def turns(*messages: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": a, "value": b} for a, b in messages]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (turns(("human", "Q"), ("gpt", "A")), "0 <image> for one picture"),
        (turns(("human", "<image><image>"), ("gpt", "A")), "2 <image> for one picture"),
        (turns(("gpt", "<image>"), ("human", "A")), "message 0 is from str 'gpt', expected human"),
        (turns(("human", "<image>"), ("human", "A")), "message 1 is from"),
        (turns(("system", "<image>")), "expected human"),
        (turns(("human", None)), "'value' is NoneType"),
        (turns(("human", True)), "'value' is bool"),
        ({"conversations": []}, "expected a list of messages"),
        ({"conversations": "x"}, "expected a list of messages"),
        ({"image": "../../etc/passwd"}, "outside of the folder"),
        ({"image": "/etc/passwd"}, "outside of the folder"),
        ({"image": 3}, "expected a path"),
        ({"image": ["a.png", "b.png"]}, "expected a path"),
    ],
)
def test_bad_llava_records_say_why(change: dict[str, Any], message: str) -> None:
    choices = ConversionConfig(Path("x.json"), image_folder=Path("pictures"))
    FORMATS["llava"].read(GOOD, choices)
    with pytest.raises(RecordError, match=message.replace("'", ".").replace("(", ".")):
        FORMATS["llava"].read({**GOOD, **change}, choices)


def test_numbers_become_text_and_are_remarked() -> None:
    sample = FORMATS["llava"].read({**GOOD, **turns(("human", "<image>"), ("gpt", 4))}, HERE)
    assert said(sample.document)[1] == ("assistant", "4")
    assert sample.remarks == ("numbers read as text",)


@pytest.mark.parametrize("record", [None, 3, "x", [], [1], {}])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_record_brings_a_reader_down(name: str, record: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(RecordError):
        choices = ConversionConfig(tmp_path / "x.json", image_folder=Path("p"))
        read_record(FORMATS[name], record, choices)


WHOLE: dict[str, dict[str, Any]] = {
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
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_value_brings_a_reader_down(name: str, tmp_path: Path) -> None:
    """Every value of a good record, and every one inside of its lists, replaced by others."""
    (tmp_path / "x.json").write_text("[]")
    form, choices = FORMATS[name], ConversionConfig(tmp_path / "x.json", image_folder=Path("p"))
    read_record(form, WHOLE[name], choices)
    odd: list[Any] = [
        None,
        [],
        {},
        5,
        -1,
        True,
        1.5,
        float("nan"),
        "",
        "\0",
        [[]],
        ["a", "b"],
        b"x",
    ]
    deep = json.loads("[" * 300 + "]" * 300)
    for key in WHOLE[name]:
        for value in (*odd, deep, [{}], [{"from": []}], [{"from": {}, "value": 1}], {"a": [1]}):
            try:
                sample = read_record(form, {**WHOLE[name], key: value}, choices)
                json.dumps(sample.document.to_json())
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "text", "good", "message"),
    [
        ("a.json", b'[{"id": 1}, {"id": 2}, {"id"', 2, "ends in the middle"),
        ("a.json", b'[{"id": 1}, {"id": 2},]', 2, "not JSON"),
        ("a.json", b'[{"id": 1}, {"id": 2} {"id": 3}]', 2, "not JSON"),
        ("a.json", b'\xef\xbb\xbf [{"id": "\xff"}]', 0, "not UTF-8"),
        ("a.json", b'[{"id": 1}, {"id": 12345678901234567890123456789}]', 2, ""),
        ("a.json", b'[{"id": 1}, {"x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}]", 1, "too deep"),
        ("a.json", b'[{"id": 1}] x', 1, "behind the list"),
        ("a.jsonl", b'{"id": 1}\r\n\r\nno\n{"id": 2}\n', 2, "not JSON"),
        ("a.csv", b"id,b\n1,2\n3\n4,5\n", 2, "1 cells, the first line names 2"),
        ("a.csv", b'id,b\n"1" x,2\n3,4\n', 1, "not CSV"),
        ("a.TSV", b"id\tb\n1\t2\n", 1, ""),
        ("a.jsonl", b'{"id": 1}\n{"id": ' + b"9" * 5000 + b"}\n", 1, "not JSON"),
        ("a.csv", b'id,b\n1,2\n3,"x\n', 1, "not CSV"),
    ],
)
def test_half_a_file_gives_what_is_whole_and_names_where_it_breaks(
    name: str, text: bytes, good: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(text)
    found = list(records_of(tmp_path / name))
    bad = [(place, record) for place, _, record in found if isinstance(record, RecordError)]
    assert len(found) - len(bad) == good
    assert len(bad) == bool(message)
    if not message:
        return
    assert message in str(bad[0][1])
    assert str(tmp_path / name) in bad[0][0]


def test_a_long_list_is_read_piece_by_piece(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("medley.datasets.readers._PIECE", 7)
    rows = [{"id": i, "text": "größe " * (i % 5), "list": [1, [2.5, None]]} for i in range(60)]
    for indent in (None, 1):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
        assert [record for _, _, record in records_of(path)] == rows
    numbers = list(range(0, 4000, 7))
    path.write_text(json.dumps(numbers))
    assert [record for _, _, record in records_of(path)] == numbers
