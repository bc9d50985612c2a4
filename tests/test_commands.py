"""`medley generate`, `chat` and `answer` as a user runs them, and pictures at addresses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, golden
from PIL import Image

from medley import cli
from medley.commands.answer import devices_of, merge_parts, part_file
from medley.commands.chat import parts_of
from medley.data.document import Document, ImagePart, Turn
from medley.datasets.registry import ConversionConfig
from medley.errors import UserError
from medley.evaluation.answer_files import format_answer, model_name, question_keys, shard
from medley.evaluation.questions import Question, read_questions
from medley.phantoms import Phantom

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, organ in enumerate(("head", "chest", "abdomen", "head")):
        Phantom("CT", organ).image(64).save(folder / f"{number}.png")
    return folder


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- generate -------------------------------------------------------------------------------


def test_a_file_of_prompts_goes_on_where_it_stopped(
    pictures: Path, tmp_path: Path, program: Run
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"text": f"<image>Is there a cyst? {i}", "image_path": str(pictures / f"{i}.png")}
            for i in range(4)]  # fmt: skip
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["medley.cli", "generate", "--ckpt", "tiny", "--input", prompts, "--mode", "text"]
    words += ["--max_new_tokens", "20", "--output", tmp_path / "out"]
    said = program(*words).stdout
    assert "memory: the decoder's weights" in said
    file = tmp_path / "out" / "responses.jsonl"
    whole = file.read_text()
    kept = whole.splitlines(keepends=True)
    file.write_text(kept[0] + kept[2] + kept[3][:9])  # as a kill leaves it
    said = program(*words).stdout
    assert "2 answers are there already" in said
    assert file.read_text() == whole
    said = program(*words, "--seed", 5, status=2).stderr
    assert "holds answers of other options (seed)" in said
    assert file.read_text() == whole


def test_a_prompt_that_cannot_be_read_costs_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    rows = [{"text": "A \ud800"}, {"text": "Is there a cyst?"},
            {"text": "<image>x", "image_path": "http://127.0.0.1:9/x.png"}]  # fmt: skip
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", "--ckpt", "tiny", "--input", prompts, "--mode", "text", "--output", output]
    assert cli.main([*map(str, words), "--max_new_tokens", "4"]) == 3
    found = lines(output / "responses.jsonl")
    assert "half of a character" in str(found[0]["error"])
    assert "parts" in found[1]
    assert "an address; --allow_network fetches it" in str(found[2]["error"])
    said = capsys.readouterr().err
    assert "2 of 3 prompts failed" in said
    assert cli.main(["generate", "--ckpt", "tiny", "--prompt", "x", "--output", str(output)]) == 2
    assert "holds answers to a file" in capsys.readouterr().err


def test_weights_that_have_no_room_are_refused_before_they_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medley.commands.model_options.memory_free", lambda device: 1 << 20)
    words = ["generate", "--ckpt", "tiny", "--prompt", "x", "--output", str(tmp_path)]
    assert cli.main(words) == 2
    assert "0.0 GB free; --quantize 4bit" in capsys.readouterr().err


def test_a_folder_of_slices_says_how_many_fit(pictures: Path, tmp_path: Path, program: Run) -> None:
    words = ["medley.cli", "generate", "--ckpt", "tiny", "--prompt", "Which organ is shown?"]
    words += ["--image_folder", pictures, "--output", tmp_path, "--mode", "text"]
    said = program(*words, "--image_limit", 2).stdout
    assert "2 pictures of 66 tokens; the context has room for 60" in said
    for number in range(61):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:03}.png")
    words[words.index(pictures)] = tmp_path
    said = program(*words, status=2).stderr
    assert "61 pictures" in said
    assert "--image_limit 60 takes that many" in said


def test_an_address_is_fetched_only_where_the_network_is_allowed(
    tmp_path: Path, program: Run
) -> None:
    words = ["medley.cli", "generate", "--ckpt", "tiny", "--prompt", "x", "--output", tmp_path]
    said = program(*words, "--image", "http://127.0.0.1:9/x.png", status=2).stderr
    assert "an address; --allow_network fetches it" in said
    said = program(*words, "--image", "http://127.0.0.1:9/x.png", "--allow_network", status=2)
    assert "cannot be fetched" in said.stderr


def test_words_that_end_an_answer_are_single_pieces(tmp_path: Path, program: Run) -> None:
    words = ["medley.cli", "generate", "--ckpt", "tiny", "--prompt", "x", "--output", tmp_path]
    said = program(*words, "--mode", "text", "--stop", "a cyst and more", status=2).stderr
    assert "not one text piece but" in said


# --- pictures at addresses --------------------------------------------------------------------


# --- chat -------------------------------------------------------------------------------------


def test_a_typed_line_names_pictures() -> None:
    assert parts_of('what is @a.png and @"b c.png" ?') == [
        "what is", ImagePart(path="a.png"), "and", ImagePart(path="b c.png"), "?",
    ]  # fmt: skip
    assert parts_of("me@home.org") == ["me@home.org"]


def test_a_talk_in_the_terminal(pictures: Path, tmp_path: Path) -> None:
    typed = f"@{pictures}/0.png What modality is this?\n@no.png hm\n/reset\nShow me.\n/quit\n"
    words = ["chat", "--ckpt", "tiny", "--output", tmp_path / "drawn", "--min_images", 1]
    done = subprocess.run(
        [sys.executable, "-m", "medley.cli", *map(str, words), "--max_images", "1"],
        input=typed, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(no.png: no such picture)" in done.stdout
    assert "(a new talk)" in done.stdout
    saved = sorted((tmp_path / "drawn").glob("*.png"))
    assert len(saved) == 2
    assert f"[picture saved as {saved[1]}]" in done.stdout


# --- answer -----------------------------------------------------------------------------------


def write_questions(folder: Path) -> Path:
    path = folder / "questions.jsonl"
    rows = [{"question_id": i if i % 2 else f"q{i}", "image": f"{i % 4}.png",
             "text": f"Is there a cyst? {i}\n<image>"} for i in range(5)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_become_llavas_answers(pictures: Path, tmp_path: Path, program: Run) -> None:
    questions, output = write_questions(tmp_path), tmp_path / "answers.jsonl"
    words = ["medley.cli", "answer", "--ckpt", "tiny", "--questions", questions, "--mode", "text"]
    words += ["--image_folder", pictures, "--output", output, "--text_greedy"]
    program(*words)
    rows = lines(output)
    assert [row["question_id"] for row in rows] == ["q0", 1, "q2", 3, "q4"]
    assert list(rows[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert rows[0]["prompt"] == "Is there a cyst? 0\n<image>"
    assert len(str(rows[0]["answer_id"])) == 22
    assert len({row["answer_id"] for row in rows}) == 5
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[2:]) + '{"question')
    assert "3 answers are there already" in program(*words).stdout
    assert [r["question_id"] for r in lines(output)] == ["q0", 1, "q2", 3, "q4"]
    joined = program(*words[:-2], tmp_path / "two.jsonl", "--answer_prompter", "--text_greedy")
    assert joined.returncode == 0
    assert "\n The answer is " in str(lines(tmp_path / "two.jsonl")[0]["text"])


def test_parts_on_several_devices_are_gathered(
    pictures: Path, tmp_path: Path, program: Run
) -> None:
    questions, output = write_questions(tmp_path), tmp_path / "answers.jsonl"
    words = ["medley.cli", "answer", "--ckpt", "tiny", "--questions", questions, "--mode", "text"]
    words += ["--image_folder", pictures, "--output", output, "--text_greedy", "--devices", "0-1"]
    program(*words)
    assert [row["question_id"] for row in lines(output)] == ["q0", 1, "q2", 3, "q4"]
    (tmp_path / "missing").mkdir()
    words[words.index(pictures)] = tmp_path / "missing"
    words[words.index(output)] = tmp_path / "none.jsonl"
    said = program(*words, status=3).stderr
    assert "the parts of devices 0, 1 failed" in said


UTILS = golden("llava_utils.json")


@pytest.mark.parametrize("case", UTILS["chunking"], ids=lambda c: c["id"])
def test_chunks_are_the_recorded_and_the_whole(
    case: dict[str, Any], exceptions: dict[str, dict[str, str]]
) -> None:
    items, count = list(range(case["input"]["n_items"])), case["input"]["num_chunks"]
    parts = [shard(items, count, i) for i in range(count)]
    assert [item for part in parts for item in part] == items
    for part, recorded in zip(parts, case["expected"]["get_chunk"], strict=True):
        if isinstance(recorded, dict):  # it raises
            assert part == []
            assert case["id"] in exceptions["llava_utils"]
        else:
            assert part == recorded


@pytest.mark.parametrize("case", UTILS["get_model_name_from_path"], ids=lambda c: c["id"])
def test_models_are_called_as_recorded(case: dict[str, Any]) -> None:
    assert model_name(case["input"]) == case["expected"]


def test_devices_are_numbers() -> None:
    assert devices_of("0-2,5") == [0, 1, 2, 5]
    for wrong in ("cuda:0", "7-0", "1,1", "0-2,1"):
        with pytest.raises(UserError, match="--devices"):
            devices_of(wrong)


def test_equal_ids_and_equal_questions_are_told_apart() -> None:
    pairs = [(1, "a"), ("1", "a"), (1, "b"), (1, "a")]
    assert len(set(question_keys(pairs))) == 4


def test_two_questions_with_one_id_have_two_answers(tmp_path: Path, program: Run) -> None:
    path, output = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    texts = ["Is it red?", "Is there a cyst?", "Is it red?"]
    path.write_text("".join(json.dumps({"question_id": 1, "text": t}) + "\n" for t in texts))
    words = ["medley.cli", "answer", "--ckpt", "tiny", "--questions", path, "--output", output]
    words += ["--max_new_tokens", 4]
    program(*words)
    assert [row["prompt"] for row in lines(output)] == texts
    whole = output.read_bytes()
    output.write_bytes(whole.splitlines(keepends=True)[0] + '{"text": "caf\u00e9'.encode()[:-1])
    assert "1 answers are there already" in program(*words).stdout
    assert [(row["prompt"], row["text"]) for row in lines(output)] == [
        (row["prompt"], row["text"]) for row in map(json.loads, whole.splitlines())
    ]
    kept = output.read_bytes()
    said = program(*words, "--seed", 7, status=2).stderr
    assert "holds answers of other options (seed)" in said
    assert output.read_bytes() == kept
    output.write_text('{"index": 0}\n')
    assert "no 'question_id'" in program(*words, status=2).stderr


def test_parts_draw_what_the_whole_draws(tmp_path: Path, program: Run) -> None:
    path = tmp_path / "q.jsonl"
    rows = [{"question_id": i, "text": "Describe."} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["medley.cli", "answer", "--ckpt", "tiny", "--questions", path]
    words += ["--max_new_tokens", 6, "--text_temperature", 3, "--output"]
    program(*words, tmp_path / "whole.jsonl")
    config = tmp_path / "c.yaml"
    config.write_text('devices: "0-1"\n')
    program(*words, tmp_path / "parts.jsonl", "--config", config)
    program(*words, tmp_path / "one.jsonl", "--num_chunks", 2, "--chunk_idx", 1)
    program(*words, tmp_path / "one.jsonl", "--num_chunks", 2, "--chunk_idx", 0)
    texts = [
        [row["text"] for row in lines(tmp_path / f"{name}.jsonl")]
        for name in ("whole", "parts", "one")
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 1
    assert not list(tmp_path.glob("parts.part-*"))


def test_what_is_gathered_stands_once(tmp_path: Path) -> None:
    """Also where two questions are equal, and fall into two parts."""
    words = ["a", "b", "a", "c"]
    document = Document((Turn("user", ("?",)),))
    asked = [Question(1, word, document) for word in words]
    output = tmp_path / "answers.jsonl"
    rows = [format_answer(question, f"{n}", "m") for n, question in enumerate(asked)]
    for index in range(2):
        part = part_file(output, 2, index)
        part.write_text("".join(row + "\n" for row in rows[2 * index : 2 * index + 2]))
    for _ in range(2):
        found = merge_parts(output, asked)
        assert [row["text"] for row in found.values()] == ["0", "1", "2", "3"]
        assert [row["text"] for row in lines(output)] == ["0", "1", "2", "3"]
        part_file(output, 3, 1).write_text(rows[2] + "\n")  # of another number of devices
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question_id": 1, "text": "a", "image": ["p.png"]},
            "expected a path",
        ),
        ({"question_id": 1, "text": "a", "image": "../p.png"}, "outside of the folder"),
        ({"question_id": 1.5, "text": "a"}, "question_id is 1.5, expected text"),
        (
            {"id": 1, "conversations": [{"from": "human", "value": "a"}] * 2},
            "turn 1 is from 'human'",
        ),
        ("", "no questions in it"),
    ],
)
def test_questions_that_cannot_be_are_refused_at_once(
    row: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row) if row else "")
    words = ["answer", "--ckpt", "tiny", "--questions", path, "--output", tmp_path / "out.jsonl"]
    assert cli.main([*map(str, words), "--image_folder", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_bad_questions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 1, "text": "a"}\n{"question_id": 2}\n')
    with pytest.raises(UserError, match=r"q\.jsonl:2: expected question_id and text"):
        read_questions(path, "llava", ConversionConfig(path))
    lists = tmp_path / "q.json"
    row = {"id": 3, "image": "a.png", "conversations": [{"from": "human", "value": "b\n<image>"}]}
    lists.write_text(json.dumps([row]))
    found = read_questions(lists, "llava", ConversionConfig(lists))
    assert [(q.identifier, q.text, q.image) for q in found] == [(3, "b", "a.png")]


def test_questions_come_from_any_format(pictures: Path, tmp_path: Path, program: Run) -> None:
    data = tmp_path / "VQA_RAD"
    data.mkdir()
    rows = [
        {"qid": i, "image_name": f"{i}.png", "question": "Is there a cyst?", "answer": "no",
         "answer_type": "CLOSED ", "image_organ": "HEAD"}
        for i in range(3)
    ]  # fmt: skip
    (data / "testset.json").write_text(json.dumps(rows))
    output = tmp_path / "answers.jsonl"
    words = ["medley.cli", "answer", "--ckpt", "tiny", "--format", "vqa_rad", "--questions", data]
    words += ["--image_folder", pictures, "--output", output, "--max_new_tokens", 8]
    program(*words, "--split", "test")
    found = lines(output)
    assert [row["question_id"] for row in found] == [0, 1, 2]
    assert found[0]["prompt"] == "<image>\nIs there a cyst?"
    said = program(*words, "--split", "val", status=2).stderr
    assert "VQA-RAD has train, test" in said


def test_questions_that_hold_several_turns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    turns = [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(UserError, match=r"docs\.jsonl:1: 4 turns, the first of the user"):
        read_questions(path, "documents", ConversionConfig(path))
    path.write_text(json.dumps({"messages": turns[:2]}) + "\n")
    (question,) = read_questions(path, "documents", ConversionConfig(path))
    assert (question.identifier, question.gold, question.kind) == (0, "a", None)
