"""`medley answer`: answer files, resuming, chunks and devices."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_inputs import read_rows, write_rows, write_scans
from conftest import golden

from medley.data.document import Document, Turn
from medley.errors import UserError
from medley.evaluation.answer_files import format_answer, model_name, question_keys, shard
from medley.evaluation.answer_shards import merge_shards, parse_devices, shard_path
from medley.evaluation.questions import Question

Run = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = ["medley.cli", "answer", "--ckpt", "tiny"]
LLAVA_UTILS = golden("llava_utils.json")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans"))


def write_questions(folder: Path) -> Path:
    rows = [{"question_id": i if i % 2 else f"q{i}", "image": f"{i % 4}.png",
             "text": f"Is there a cyst? {i}\n<image>"} for i in range(5)]  # fmt: skip
    return write_rows(folder / "questions.jsonl", rows)


# --- the command --------------------------------------------------------------------------------


def test_answers_are_in_llavas_format(scans: Path, tmp_path: Path, program: Run) -> None:
    questions, output = write_questions(tmp_path), tmp_path / "answers.jsonl"
    words = [*COMMAND, "--questions", questions, "--image_folder", scans, "--text_greedy"]
    words += ["--mode", "text", "--output"]
    program(*words, output)
    rows = read_rows(output)
    assert [row["question_id"] for row in rows] == ["q0", 1, "q2", 3, "q4"]
    assert list(rows[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert rows[0]["prompt"] == "Is there a cyst? 0\n<image>"
    assert len(rows[0]["answer_id"]) == 22
    assert len({row["answer_id"] for row in rows}) == 5
    complete = output.read_text()
    output.write_text("".join(complete.splitlines(keepends=True)[2:]) + '{"question')
    assert "3 questions are answered already" in program(*words, output).stdout
    assert [row["question_id"] for row in read_rows(output)] == ["q0", 1, "q2", 3, "q4"]
    program(*words, tmp_path / "twice.jsonl", "--answer_prompter")
    assert "\n The answer is " in read_rows(tmp_path / "twice.jsonl")[0]["text"]


def test_generated_images_are_saved_beside_the_answers(tmp_path: Path, program: Run) -> None:
    questions = write_rows(tmp_path / "q.jsonl", [{"question_id": 1, "text": "Show me a head."}])
    program(*COMMAND, "--questions", questions, "--output", tmp_path / "a.jsonl", "--mode", "image")
    (row,) = read_rows(tmp_path / "a.jsonl")
    assert row["metadata"] == {"images": ["a_images/000000_0.png"]}
    assert (tmp_path / "a_images" / "000000_0.png").is_file()


def test_repeated_ids_and_questions_get_one_answer_each(tmp_path: Path, program: Run) -> None:
    texts = ["Is it red?", "Is there a cyst?", "Is it red?"]
    path = write_rows(tmp_path / "q.jsonl", [{"question_id": 1, "text": t} for t in texts])
    output = tmp_path / "a.jsonl"
    words = [*COMMAND, "--questions", path, "--output", output, "--max_new_tokens", 4]
    program(*words)
    assert [row["prompt"] for row in read_rows(output)] == texts
    complete = output.read_bytes()
    incomplete = '{"text": "café'.encode()[:-1]
    output.write_bytes(complete.splitlines(keepends=True)[0] + incomplete)
    assert "1 questions are answered already" in program(*words).stdout
    assert [(row["prompt"], row["text"]) for row in read_rows(output)] == [
        (row["prompt"], row["text"]) for row in map(json.loads, complete.splitlines())
    ]
    resumed = output.read_bytes()
    errors = program(*words, "--seed", 7, status=2).stderr
    assert "results of a run with other options (seed was 0, now 7)" in errors
    assert output.read_bytes() == resumed
    output.write_text('{"index": 0}\n')
    assert "The row has no 'question_id'" in program(*words, status=2).stderr


def test_published_datasets_are_read_by_format(scans: Path, tmp_path: Path, program: Run) -> None:
    data = tmp_path / "VQA_RAD"
    data.mkdir()
    rows = [
        {"qid": i, "image_name": f"{i}.png", "question": "Is there a cyst?", "answer": "no",
         "answer_type": "CLOSED ", "image_organ": "HEAD"}
        for i in range(3)
    ]  # fmt: skip
    (data / "testset.json").write_text(json.dumps(rows))
    output = tmp_path / "answers.jsonl"
    words = [*COMMAND, "--format", "vqa_rad", "--questions", data, "--image_folder", scans]
    words += ["--output", output, "--max_new_tokens", 8, "--split"]
    program(*words, "test")
    answers = read_rows(output)
    assert [row["question_id"] for row in answers] == [0, 1, 2]
    assert answers[0]["prompt"] == "<image>\nIs there a cyst?"
    assert "VQA-RAD has" in program(*words, "val", status=2).stderr


# --- chunks and devices -------------------------------------------------------------------------


def test_devices_answer_one_chunk_each(scans: Path, tmp_path: Path, program: Run) -> None:
    questions, output = write_questions(tmp_path), tmp_path / "answers.jsonl"
    words = [*COMMAND, "--questions", questions, "--text_greedy", "--devices", "0-1"]
    program(*words, "--output", output, "--image_folder", scans)
    assert [row["question_id"] for row in read_rows(output)] == ["q0", 1, "q2", 3, "q4"]
    (tmp_path / "missing").mkdir()
    words += ["--output", tmp_path / "failed.jsonl", "--image_folder", tmp_path / "missing"]
    assert "The processes on devices 0, 1 failed" in program(*words, status=3).stderr


def test_chunks_give_the_same_answers_as_one_run(tmp_path: Path, program: Run) -> None:
    rows = [{"question_id": i, "text": "Describe."} for i in range(4)]
    path = write_rows(tmp_path / "q.jsonl", rows)
    words = [*COMMAND, "--questions", path, "--max_new_tokens", 6, "--text_temperature", 3]
    words += ["--output"]
    program(*words, tmp_path / "once.jsonl")
    config = tmp_path / "c.yaml"
    config.write_text('devices: "0-1"\n')
    program(*words, tmp_path / "devices.jsonl", "--config", config)
    program(*words, tmp_path / "chunks.jsonl", "--num_chunks", 2, "--chunk_idx", 1)
    program(*words, tmp_path / "chunks.jsonl", "--num_chunks", 2, "--chunk_idx", 0)
    texts = [
        [row["text"] for row in read_rows(tmp_path / f"{name}.jsonl")]
        for name in ("once", "devices", "chunks")
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 1
    assert not list(tmp_path.glob("devices.part-*"))


def test_merging_shards_keeps_each_answer_once(tmp_path: Path) -> None:
    """Also if two questions are equal and in different shards."""
    document = Document((Turn("user", ("?",)),))
    questions = [Question(1, text, document) for text in ("a", "b", "a", "c")]
    output = tmp_path / "answers.jsonl"
    rows = [format_answer(question, f"{n}", "m") for n, question in enumerate(questions)]
    for index in range(2):
        write_rows(shard_path(output, 2, index), rows[2 * index : 2 * index + 2])
    for _ in range(2):
        merged = merge_shards(output, questions)
        assert [row["text"] for row in merged.values()] == ["0", "1", "2", "3"]
        assert [row["text"] for row in read_rows(output)] == ["0", "1", "2", "3"]
        write_rows(shard_path(output, 3, 1), rows[2:3])  # of a run on three devices
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("case", LLAVA_UTILS["chunking"], ids=lambda c: c["id"])
def test_shards_equal_llavas_chunks(
    case: dict[str, Any], exceptions: dict[str, dict[str, str]]
) -> None:
    items, count = list(range(case["input"]["n_items"])), case["input"]["num_chunks"]
    shards = [shard(items, count, i) for i in range(count)]
    assert [item for own in shards for item in own] == items
    for own, recorded in zip(shards, case["expected"]["get_chunk"], strict=True):
        if isinstance(recorded, dict):  # LLaVA raises an error
            assert own == []
            assert case["id"] in exceptions["llava_utils"]
        else:
            assert own == recorded


@pytest.mark.parametrize("case", LLAVA_UTILS["get_model_name_from_path"], ids=lambda c: c["id"])
def test_model_names_equal_llavas(case: dict[str, Any]) -> None:
    assert model_name(case["input"]) == case["expected"]


def test_device_lists_are_parsed() -> None:
    assert parse_devices("0-2,5") == [0, 1, 2, 5]
    for invalid in ("cuda:0", "7-0", "1,1", "0-2,1"):
        with pytest.raises(UserError, match="--devices"):
            parse_devices(invalid)


def test_question_keys_are_unique() -> None:
    pairs = [(1, "a"), ("1", "a"), (1, "b"), (1, "a")]
    assert len(set(question_keys(pairs))) == 4
