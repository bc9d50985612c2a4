"""`medley answer --choices`: probabilities of choices in answer files, and who reads them."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_inputs import read_rows, write_rows, write_scans

from medley import cli
from medley.data.document import Document, Turn
from medley.errors import UserError
from medley.evaluation.question_choices import choices_of, parse_choices
from medley.evaluation.questions import Question
from medley.inference.model import Model

ORGANS = ["head", "chest", "abdomen"]


def answer(*words: object) -> int:
    return cli.main(["answer", "--ckpt", "tiny", "--device", "cpu", *map(str, words)])


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Questions of a class each, as `medley convert` writes them."""
    scans = write_scans(tmp_path)
    golds = ("head", "chest", "abdomen", "head", "chest")
    return write_rows(
        tmp_path / "questions.jsonl",
        [
            {"text": f"<image>Which region is it? {i}<reserved08706>{gold}", "id": i,
             "image_path": str(scans / f"{i % 4}.png"), "choices": ORGANS, "answer_type": "CLOSED"}
            for i, gold in enumerate(golds)
        ],
    )  # fmt: skip


def test_probabilities_are_written_resumed_and_evaluated(
    documents: Path, tmp_path: Path, tiny_model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    words = ["--questions", documents, "--format", "documents", "--output", output]
    assert answer(*words, "--choices", "record", "--text_greedy") == 0
    assert "--text_greedy without effect" in capsys.readouterr().err
    rows = read_rows(output)
    assert list(rows[0]) == [
        "question_id", "prompt", "text", "answer_id", "model_id", "metadata", "choices",
    ]  # fmt: skip
    for number, row in enumerate(rows):
        assert [choice["text"] for choice in row["choices"]] == ORGANS
        assert sum(choice["probability"] for choice in row["choices"]) == pytest.approx(1)
        best = max(row["choices"], key=lambda choice: choice["logprob"])
        assert row["text"] == best["text"]
        prompt: list[Any] = [tmp_path / f"{number % 4}.png", f"Which region is it? {number}"]
        scores = tiny_model.score(prompt, ORGANS)
        assert [choice["logprob"] for choice in row["choices"]] == pytest.approx(
            [score.logprob for score in scores], rel=1e-5, abs=1e-5
        )
    lines = output.read_text().splitlines(keepends=True)
    output.write_text(lines[0] + lines[3] + '{"question')
    assert answer(*words, "--choices", "record") == 0
    assert "2 questions are answered already" in capsys.readouterr().out
    resumed = read_rows(output)
    assert [row["question_id"] for row in resumed] == list(range(5))
    for own, row in zip(resumed, rows, strict=True):
        assert own["text"] == row["text"]
        for one, other in zip(own["choices"], row["choices"], strict=True):
            assert one["logprob"] == pytest.approx(other["logprob"], rel=1e-5, abs=1e-5)
    assert answer(*words, "--choices", "record", "--choices_per_token") == 2
    assert "choices_per_token was False, now True" in capsys.readouterr().err
    assert answer(*words) == 2
    assert "results of a run with other options (choices was" in capsys.readouterr().err
    result = tmp_path / "scores.json"
    words = ["evaluate", "classification", "--gt", documents, "--format", "documents"]
    words += ["--pred", output, "--output", result, "--resamples", 20]
    assert cli.main([str(word) for word in words]) == 0
    (task,) = json.loads(result.read_text())["tasks"]
    assert task["classes"] == ORGANS


def test_choices_of_the_command_line_with_each_option(documents: Path, tmp_path: Path) -> None:
    found = {}
    for name, flags in {
        "plain": ["--choices", "head,chest"],
        "words": ["--choices", "head", "chest"],
        "open": ["--choices", "head,chest", "--no_choices_end"],
        "prior": ["--choices", "head,chest", "--choices_prior"],
        "template": ["--choices", "head,chest", "--choices_template", "It is a {choice}."],
    }.items():
        output = tmp_path / f"{name}.jsonl"
        words = ["--questions", documents, "--format", "documents", "--output", output]
        assert answer(*words, *flags) == 0
        found[name] = [
            {choice["text"]: choice["logprob"] for choice in row["choices"]}
            for row in read_rows(output)
        ]
        assert all(set(row) == {"head", "chest"} for row in found[name])
    assert found["plain"] == found["words"]
    for number, row in enumerate(found["plain"]):
        for text, logprob in row.items():
            assert logprob < found["open"][number][text]
            assert logprob < found["prior"][number][text]
            assert logprob != found["template"][number][text]


@pytest.mark.slow
def test_chunks_and_devices_give_the_same_scores(
    documents: Path, tmp_path: Path, program: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    words = ["--questions", documents, "--format", "documents", "--choices", "record"]
    words += ["--deterministic", "--output"]
    assert answer(*words, tmp_path / "once.jsonl") == 0
    for index in (1, 0):
        chunk = ["--num_chunks", 2, "--chunk_idx", index]
        assert answer(*words, tmp_path / "chunks.jsonl", *chunk) == 0
    devices = ["--device", "cpu", "--devices", "0-1"]
    program("medley", "answer", "--ckpt", "tiny", *words, tmp_path / "devices.jsonl", *devices)
    scores = [
        [(row["question_id"], row["text"], row["choices"]) for row in read_rows(path)]
        for path in (tmp_path / f"{name}.jsonl" for name in ("once", "chunks", "devices"))
    ]
    assert len(scores[0]) == 5
    assert scores[0] == scores[1] == scores[2]


# --- published datasets -----------------------------------------------------------------------


def test_pmc_vqa_as_texts_and_as_letters(tmp_path: Path) -> None:
    scans = write_scans(tmp_path)
    path = tmp_path / "test.csv"
    rows = [
        {"Figure_path": f"{i}.png", "Question": "Which region?", "Answer": ORGANS[i],
         "Choice A": " A:head ", "Choice B": " B:chest ", "Choice C": " C:abdomen ",
         "Choice D": " D:left leg ", "Answer_label": "ABC"[i]}
        for i in range(3)
    ]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    words = ["--format", "pmc_vqa", "--questions", path, "--image_folder", scans, "--output"]
    for name, expected in (("record", [*ORGANS, "left leg"]), ("letters", list("ABCD"))):
        output = tmp_path / f"{name}.jsonl"
        assert answer(*words, output, "--choices", name) == 0
        answers = read_rows(output)
        for row in answers:
            assert [choice["text"] for choice in row["choices"]] == expected
        own = ["evaluate", "vqa", "--format", "pmc_vqa", "--gt", path, "--pred", output,
               "--image_folder", scans, "--output", tmp_path / f"{name}.json"]  # fmt: skip
        assert cli.main([str(word) for word in own]) == 0
        scored = read_rows(tmp_path / f"{name}.json.examples.jsonl")
        right = [row["text"] in (ORGANS[i], "ABC"[i]) for i, row in enumerate(answers)]
        assert [bool(row["scores"]["closed accuracy"]) for row in scored] == right


def test_science_qa_as_letters_in_a_sentence(tmp_path: Path) -> None:
    problem = {"question": "Which is red?", "choices": ["a rose", "grass"], "answer": 0, "hint": "",
               "lecture": "", "solution": "", "image": None}  # fmt: skip
    (tmp_path / "problems.json").write_text(json.dumps({"1": problem, "7": problem}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["1", "7"]}))
    output = tmp_path / "answers.jsonl"
    words = ["--format", "science_qa", "--split", "test", "--questions", tmp_path]
    words += ["--choices", "letters", "--choices_template", "The answer is {choice}."]
    assert answer(*words, "--output", output) == 0
    rows = read_rows(output)
    assert [row["question_id"] for row in rows] == ["1", "7"]
    assert all([c["text"] for c in row["choices"]] == ["A", "B"] for row in rows)
    assert all(row["text"] in "AB" for row in rows)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--choices", "yes"], "--choices: Expected two or more choices (got yes)"),
        (["--choices", "yes,,no"], "--choices: Choice 2 of 3 is empty"),
        (["--choices", "yes, Yes"], "are the same without regard to case and spaces (got 'yes'"),
        (["--choices", "record", "yes", "record"], "Two choices are the same"),
        (["--choices", "yes,no", "--mode", "any"], "--mode any generates a response, --choices"),
        (["--choices", "yes,no", "--answer_prompter"], "--answer_prompter generates a response"),
        (["--choices", "yes,no", "--choices_template", "It"], "Expected {choice} in the text"),
        (["--choices_prior"], "--choices_prior requires --choices"),
        (["--no_choices_end"], "--choices_end requires --choices"),
        (["--choices", "record"], "Question 1: The record has no 'choices'. Name the choices"),
    ],
)
def test_options_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"question_id": 1, "text": "Is it red?"}])
    assert answer("--questions", path, "--output", tmp_path / "a.jsonl", *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "a.jsonl").exists()


def test_bad_records_are_counted_and_the_others_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = [
        ["a", "b"],
        None,
        ["a", " "],
        ["a", "A"],
        ["a"],
        "a,b",
        ["a", "no" * 9000],
        ["x", "y"],
    ]
    rows = [
        {"question_id": i, "text": "Which?", **({} if own is None else {"choices": own})}
        for i, own in enumerate(choices)
    ]
    path = write_rows(tmp_path / "q.jsonl", rows)
    output = tmp_path / "a.jsonl"
    assert answer("--questions", path, "--output", output, "--choices", "record") == 3
    assert [row["question_id"] for row in read_rows(output)] == [0, 7]
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "6 of 8 questions were not answered. First error: question 1: The record has no" in error


def test_choices_of_records() -> None:
    def question(choices: Any) -> Question:
        return Question(1, "?", Document((Turn("user", ("?",)),)), fields={"choices": choices})

    many = [f"choice {number}" for number in range(27)]
    assert choices_of([question(many)], ["record"]) == [many]
    with pytest.raises(UserError, match=r"more texts than there are letters \(got 27"):
        choices_of([question(many)], ["letters"])
    # Texts that are equal have different letters.
    assert choices_of([question(["a", "a", ""])], ["letters"]) == [["A", "B", "C"]]
    assert parse_choices(["no, none", "yes"]) == ["no, none", "yes"]
    assert parse_choices(["no , yes"]) == ["no", "yes"]
