"""Kinds of faults in users' datasets: nothing is lost silently, and refusals name the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dataset_records import (
    MESSAGES,
    PLAIN,
    TURNS,
    convert,
    names_of,
    png,
    role_texts,
    write_json,
)

from medley import cli
from medley.data.document import Document
from medley.datasets.base import ConversionConfig, RecordError
from medley.datasets.registry import FORMATS, FormatName
from medley.datasets.samples import read_record
from medley.errors import UserError
from medley.evaluation.questions import read_questions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images p0.png to p2.png."""
    for number in range(3):
        (tmp_path / f"p{number}.png").write_bytes(png(number))
    return tmp_path


# --- an image becomes words -------------------------------------------------------------------


@pytest.mark.parametrize("key", ["image", "images", "image_path"])
@pytest.mark.parametrize("names", ["p0.png", ["p0.png"], ["p0.png", "p1.png"]])
@pytest.mark.parametrize("identifier", [{"id": 7}, {"sample_id": 7}, {}])
def test_llava_images_are_read_from_each_usual_key(
    key: str, names: Any, identifier: dict[str, int], folder: Path
) -> None:
    count = 1 if isinstance(names, str) else len(names)
    turns = [
        {"from": "human", "value": "<image>\n" * count + "What changed?"},
        TURNS[1],
    ]
    path = write_json(folder / "d.json", [{**identifier, key: names, "conversations": turns}])
    status, (row,) = convert(folder, "llava", path)
    assert status == 0
    assert row["text"] == "<image>" * count + "What changed?<reserved08706>A scan."
    document = Document.from_json(row)
    assert names_of(document) == ([names] if isinstance(names, str) else names)
    assert row.get("id") == (7 if identifier else None)


def test_llava_images_stay_at_their_placeholders(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "First: <image>\nSecond: <image>\nWhat changed?"},
        TURNS[1],
    ]
    record = {"image": ["p0.png", "p1.png"], "conversations": turns}
    config = ConversionConfig(folder, image_folder=folder)
    sample = FORMATS["llava"].read(record, config)
    parts = sample.document.turns[0].parts
    assert [p if isinstance(p, str) else "#" for p in parts] == [
        "First: ", "#", "\nSecond: ", "#", "\nWhat changed?"]  # fmt: skip


@pytest.mark.parametrize("key", ["img", "pics", "figure", "x_ray", "photo_paths"])
@pytest.mark.parametrize(
    ("source", "record"),
    [
        ("llava", {"id": 1, "conversations": TURNS}),
        ("sharegpt", {"conversations": TURNS}),
        ("sharegpt", {"messages": MESSAGES}),
        ("text_qa", {"question": "<image> What?", "answer": "a"}),
    ],
)
def test_unread_image_key_is_named(
    key: str, source: str, record: dict[str, Any], folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write_json(folder / "d.json", [{**record, key: "p0.png"}])
    assert convert(folder, source, path)[0] == 3
    assert f"(got 1, expected 0). The key '{key}' is not read" in capsys.readouterr().err


QA_RECORDS: dict[FormatName, dict[str, Any]] = {
    "vqa_rad": {"qid": 1, "image_name": "p0.png", "answer": "b", "answer_type": "OPEN"},
    "slake": {"qid": 1, "img_name": "p0.png", "answer": "b", "answer_type": "OPEN", "q_lang": "en"},
    "pathvqa": {"image": "p0.png", "answer": "b", "medley_row": "0"},
}


@pytest.mark.parametrize("name", sorted(QA_RECORDS))
def test_placeholder_in_a_question_is_the_image(name: FormatName, folder: Path) -> None:
    config = ConversionConfig(folder, image_folder=folder)
    for question in ("What?", "<image>\nWhat?", "<image>What?"):
        sample = read_record(FORMATS[name], {**QA_RECORDS[name], "question": question}, config)
        assert role_texts(sample.document)[0] == ("user", "<image>What?")
    for question in ("<image><image>What?", "a <image> b <image>"):
        with pytest.raises(RecordError, match="got 2, expected 1"):
            read_record(FORMATS[name], {**QA_RECORDS[name], "question": question}, config)


@pytest.mark.parametrize(
    ("record", "texts"),
    [
        ({"conversations": TURNS}, [("user", "<image>\nWhat is it?"), ("assistant", "A scan.")]),
        ({"messages": MESSAGES}, [("user", "<image>What is it?"), ("assistant", "A scan.")]),
        ({"instruction": "<image>What?", "input": "", "output": "a"},
         [("user", "<image>What?"), ("assistant", "a")]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("images", [["p0.png"], "p0.png"])
def test_llama_factory_file_without_entry_reads_its_images(
    record: dict[str, Any], texts: Any, images: Any, folder: Path
) -> None:
    path = write_json(folder / "lone.json", [{**record, "images": images}])
    sample = FORMATS["sharegpt"].read(
        {**record, "images": images}, ConversionConfig(path, image_folder=folder)
    )
    assert role_texts(sample.document) == texts
    assert names_of(sample.document) == ["p0.png"]


def write_entry(folder: Path, record: Any, **entry: Any) -> Path:
    """A LLaMA-Factory dataset; returns its data file."""
    info = {"d": {"file_name": "data.json", "formatting": "sharegpt", **entry}}
    write_json(folder / "dataset_info.json", info)
    return write_json(folder / "data.json", [record])


def test_entry_that_omits_images_reads_them_with_a_remark(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"conversations": TURNS, "images": ["p0.png"]}
    path = write_entry(folder, record, columns={"messages": "conversations"})
    status, (row,) = convert(folder, "sharegpt", path)
    assert status == 0
    assert names_of(Document.from_json(row)) == ["p0.png"]
    assert "'images' read although dataset_info.json does not list it: 1" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["image", "images", "image_path"])
@pytest.mark.parametrize("names", ["p0.png", ["p0.png"], ["p0.png", "p1.png"]])
def test_questions_have_their_images(key: str, names: Any, folder: Path) -> None:
    count = 1 if isinstance(names, str) else len(names)
    for text in ("<image>\n" * count + "What?", "What?"):
        path = folder / "q.jsonl"
        path.write_text(json.dumps({"text": text, key: names}) + "\n")
        (question,) = read_questions(path, "llava", ConversionConfig(path, image_folder=folder))
        assert names_of(question.prompt) == ([names] if isinstance(names, str) else names)
        assert (question.identifier, question.text) == (0, "What?")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"img": "p0.png", "text": "<image>a"}, "The key 'img' is not read"),
        ({"text": "<image>a"}, "no image in 'image' or 'images' or 'image_path'"),
        ({"image": "p0.png", "text": "<image><image>a"}, "got 2, expected 1"),
        ({"video": "a.mp4", "text": "<video>a"}, "The record has video ('video')"),
    ],
)
def test_questions_that_lack_an_image_are_refused(
    row: dict[str, Any], message: str, folder: Path
) -> None:
    path = folder / "q.jsonl"
    path.write_text(json.dumps({"question_id": 1, **row}) + "\n")
    with pytest.raises(UserError) as caught:
        read_questions(path, "llava", ConversionConfig(path, image_folder=folder))
    assert message in str(caught.value)


# --- weights, tags, tools, other media, system texts ------------------------------------------


@pytest.mark.parametrize(
    ("source", "record", "name"),
    [
        ("llava", {"id": 1, "conversations": PLAIN, "video": "a.mp4"}, "video"),
        ("llava", {"id": 1, "conversations": PLAIN, "videos": ["a.mp4"]}, "videos"),
        ("llava", {"id": 1, "conversations": PLAIN, "audio_path": "a.wav"}, "audio_path"),
        ("llava", {"id": 1, "conversations": PLAIN, "tools": '[{"name": "f"}]'}, "tools"),
        ("llava", {"id": 1, "conversations": [PLAIN[0], {**PLAIN[1], "tool_calls": [{"a": 1}]}]},
         "tool_calls"),
        ("sharegpt", {"conversations": PLAIN, "audios": ["a.wav"]}, "audios"),
        ("sharegpt", {"conversations": PLAIN, "kto_tag": False}, "kto_tag"),
        ("sharegpt", {"conversations": PLAIN, "kto_tag": "no"}, "kto_tag"),
        ("sharegpt", {"conversations": PLAIN[:1], "chosen": PLAIN[1], "rejected": PLAIN[1]},
         "chosen"),
        ("sharegpt", {"instruction": "a", "output": ["good", "bad"]}, "output"),
        ("sharegpt", {"conversations": [PLAIN[0], {"from": "function_call", "value": "{}"}]},
         "function_call"),
    ],
)  # fmt: skip
def test_unsupported_keys_are_refused_by_name(
    source: str, record: dict[str, Any], name: str, folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write_json(folder / "lone.json", [record])
    assert convert(folder, source, path)[0] == 3
    error = capsys.readouterr().err.split("record 0: ")[1].splitlines()[0]
    assert f"'{name}'" in error


@pytest.mark.parametrize(
    ("column", "value"),
    [("videos", ["a.mp4"]), ("audios", ["a.wav"]), ("tools", '[{"name": "f"}]'),
     ("kto_tag", False), ("chosen", PLAIN[1])],
)  # fmt: skip
def test_unsupported_columns_of_an_entry_are_refused_by_the_name_in_the_record(
    column: str, value: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"messages": "conversations", column: "label"}
    path = write_entry(folder, {"conversations": PLAIN, "label": value}, columns=columns)
    assert convert(folder, "sharegpt", path)[0] == 3
    assert "'label'" in capsys.readouterr().err
    good = True if column == "kto_tag" else [] if column != "tools" else "[]"
    write_json(path, [{"conversations": PLAIN, "label": good}])
    assert convert(folder, "sharegpt", path)[0] == 0


def test_ranking_entry_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_entry(folder, {"conversations": PLAIN}, ranking=True)
    assert convert(folder, "sharegpt", path)[0] == 2
    assert "(ranking: true)" in capsys.readouterr().err


def test_entry_with_only_a_prompt_is_text_to_learn(folder: Path) -> None:
    path = write_entry(
        folder, {"text": "Once upon a time"}, formatting="alpaca", columns={"prompt": "text"}
    )
    _, (row,) = convert(folder, "sharegpt", path)
    assert row == {"text": "Once upon a time"}


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("source", ["llava", "sharegpt"])
def test_system_text_beside_a_conversation_is_read(key: str, source: str, folder: Path) -> None:
    record = {"id": 1, "conversations": PLAIN, key: "Say what you see."}
    path = write_json(folder / "lone.json", [record])
    _, (row,) = convert(folder, source, path)
    assert row["text"] == "Say what you see.\nWhat is it?<reserved08706>A scan."
    assert key not in row


@pytest.mark.parametrize("key", ["weight", "loss", "train"])
@pytest.mark.parametrize("source", ["llava", "sharegpt"])
def test_message_of_weight_zero_is_not_trained(key: str, source: str, folder: Path) -> None:
    turns = [PLAIN[0], {**PLAIN[1], key: 0}, PLAIN[0], {**PLAIN[1], key: 1}]
    path = write_json(folder / "lone.json", [{"id": 1, "conversations": turns}])
    _, (row,) = convert(folder, source, path)
    assert Document.from_json(row).untrained_turns == (1,)
    (folder / "docs.jsonl").write_text(json.dumps(row) + "\n")
    back = folder / "back.json"
    words = ["convert", "--from", "documents", "--to", source, "--input", folder / "docs.jsonl"]
    assert cli.main([*map(str, words), "--output", str(back)]) == 0
    assert "weight" in back.read_text()
    _, (again,) = convert(folder, source, back)
    assert Document.from_json(again) == Document.from_json(row)


def test_keys_with_text_that_are_not_read_are_counted_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [PLAIN[0], {**PLAIN[1], "thought": "Because."}]
    records = [{"id": 1, "conversations": turns, "reasoning": "x", "size": 3, "tags": []}]
    records += [{"id": 2, "conversations": PLAIN, "reasoning": "y", "tags": ["z"]}]
    assert convert(folder, "llava", write_json(folder / "d.json", records))[0] == 0
    printed = capsys.readouterr().out
    assert "keys with text that are not part of the documents: reasoning (2), tags (1)" in printed
    assert "message key 'thought' not read: 1 times" in printed
    manifest = json.loads((folder / "o.jsonl.manifest.json").read_text())
    assert manifest["unread_keys"] == {"reasoning": 2, "tags": 1}
    assert manifest["remarks"] == {"message key 'thought' not read": 1}
