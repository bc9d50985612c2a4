"""MedMax's suite: recorded prompts and scores, and a complete run with a judge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import golden
from model_server import Server
from tiny_models import clip_folder, sentence_folder

from medley import cli
from medley.commands.evaluate.medmax_options import MedmaxOptions
from medley.data.document import ImagePart
from medley.errors import UserError
from medley.evaluation.medmax_answers import read_answers
from medley.evaluation.medmax_scores import (
    GeneratedAnswer,
    MedmaxScores,
    mean_and_stderr,
    merge_results,
    parse_verdict,
)
from medley.evaluation.medmax_suite import (
    CAPTIONING,
    MIXED,
    QUESTIONS,
    MedmaxRecord,
    chat_reference,
    parse_record,
    prompt_for,
)
from medley.phantoms import Phantom
from medley.utils.files import nan_to_null

CASES = golden("medmax_eval.json")
PROCESSORS: Any = ("sft", "chameleon", "default")


def recorded(value: Any) -> Any:
    """A recorded value with null in place of NaN, as in our JSON."""
    if isinstance(value, dict):
        return {name: recorded(own) for name, own in value.items()}
    return None if value == "NaN" else value


def flat_prompt(processor: Any, record: MedmaxRecord, image: str | None) -> list[Any]:
    """Our prompt in the recorded format: content, and the kind of each part."""
    parts = prompt_for(processor, record, ImagePart(path=image) if image else None)
    content = [str(p.path) if isinstance(p, ImagePart) else p for p in parts]
    kinds = ["image" if isinstance(p, ImagePart) else "text" for p in parts]
    if processor == "sft":
        return [[*content, "<END-OF-TURN>"], [*kinds, "sentinel"]]
    return [content, kinds]


@pytest.mark.parametrize("case", CASES["prompt_processors"], ids=lambda c: c["id"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_prompts_match_recorded_cases(
    case: dict[str, Any], processor: Any, exceptions: dict[str, dict[str, str]]
) -> None:
    given, expected = case["input"], case["expected"][processor]
    kind = given["task_type"]
    if kind == "visual_chat":  # The record has only whether the turn ends; see below.
        assert expected in (True, False) or "default" in processor
        return
    task = kind if kind in (CAPTIONING, "image_generation", MIXED) else "vqa_rad"
    record = MedmaxRecord(0, task, kind, given["question"] or "", "", given["image_path"])
    actual = flat_prompt(processor, record, given["image_path"])
    if processor == "default" and None in expected[0]:
        assert f"{case['id']}_default" in exceptions["medmax_eval"]
        kept = [(part, k) for part, k in zip(*expected, strict=True) if part is not None]
        expected = [[part for part, _ in kept], [k for _, k in kept]]
        if kind == CAPTIONING:
            expected = [[*expected[0], ""], ["image", "text"]]
    assert actual == expected


@pytest.mark.parametrize("case", CASES["accuracy_and_stderr"], ids=lambda c: c["id"])
def test_means_match_recorded_cases(case: dict[str, Any]) -> None:
    actual = nan_to_null(mean_and_stderr([float(value) for value in case["input"]]))
    expected = recorded(case["expected"])
    for name, value in actual.items():
        assert (
            value is None
            if expected[name] is None
            else math.isclose(value, expected[name], abs_tol=1e-9)
        )


def test_tasks_have_the_recorded_order() -> None:
    assert [list(pair) for pair in QUESTIONS] == CASES["task_order"]["all"]
    for kind in ("open", "closed", "mcq"):
        own = [list(pair) for pair in QUESTIONS if pair[1] == kind]
        assert own == CASES["task_order"][kind]


def test_result_files_are_merged() -> None:
    expected = CASES["json_merge"]["results_after_two_writes"]
    assert merge_results(merge_results({}, {"a": 1, "b": 2}), {"a": 3}) == expected


@pytest.mark.parametrize("case", CASES["vqa_tasks"], ids=lambda c: c["id"])
def test_vqa_scores_match_recorded_cases(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    if expected["exception"]:
        with pytest.raises(UserError, match=r"question_type of .* is invalid \(got 'essay'"):
            parse_record(
                0, {"task_name": given["task_name"], "question_type": given["question_type"]}
            )
        return
    records = [
        MedmaxRecord(
            n, given["task_name"], given["question_type"], r["prompt"], r["answer"], "i.png"
        )
        for n, r in enumerate(given["rows"])
    ]
    calls = [call["content"] for call in expected["generation_calls"]]
    processor = given["prompt_processor"]
    assert [flat_prompt(processor, record, "evd/i.png")[0] for record in records] == calls
    answers = {n: GeneratedAnswer(r["generated_text"]) for n, r in enumerate(given["rows"])}
    scores = MedmaxScores(records, answers, as_published=True)
    for number, reply in enumerate(given["judge_replies"] or []):
        scores.add_reply(number, reply)
    (name, result) = next(iter(recorded(expected["results_json"]).items()))
    if not records:  # MedMax writes empty means; our results leave the task out.
        assert result == {"accuracy": None, "std_err": None}
        assert scores.results() == {}
        return
    actual = nan_to_null(scores.results())[name]
    assert actual == pytest.approx(result, abs=1e-9)
    correct = [bool(log["is_correct"]) for log in expected["logs_json"][name]]
    ours = [log["is_correct"] for log in scores.logs()[name]]
    assert [value for value in ours if value is not None] == correct
    unparsed = [note for note in scores.notes.values() if "cannot be parsed" in note]
    assert len(unparsed) == len(records) - len(correct)  # MedMax drops them; our notes list them.


@pytest.mark.parametrize("case", CASES["visual_chat"], ids=lambda c: c["id"])
def test_chat_scores_match_recorded_cases(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    records = [parse_record(n, raw) for n, raw in enumerate(given["rows"])]
    for record, call in zip(records, expected["generation_calls"], strict=True):
        content = flat_prompt("default", record, f"evd/{record.image}")
        assert content == [call["content"], call["modality"]]
        assert call["sft"] == (given["prompt_processor"] == "sft")
    answers = {n: GeneratedAnswer(text.strip()) for n, text in enumerate(given["generated"])}
    scores = MedmaxScores(records, answers, as_published=True)
    for number, reply in enumerate(given["judge_replies"]):
        scores.add_reply(number, reply.strip())
    if expected["exception"]:  # MedMax crashes after all requests.
        assert "cannot be parsed: 8, 7" in scores.notes[0]
        assert scores.results() == {}
        again = MedmaxScores(records, answers)
        assert again.add_reply(0, "8, 7")
        return
    actual = scores.results()["visual_chat"]
    expected_result = expected["results_json"]["visual_chat"]
    assert actual.keys() == expected_result.keys()
    for name, own in expected_result.items():
        assert actual[name] == pytest.approx(own, abs=1e-9)
    prompts = [line["prompt"] for line in expected["answers_jsonl"]]
    assert [record.prompt.replace("<image>", "").strip() for record in records] == prompts


@pytest.mark.parametrize("case", CASES["mm_out"], ids=lambda c: c["id"])
def test_mixed_scores_match_recorded_cases(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    records = [parse_record(n, raw) for n, raw in enumerate(given["rows"])]
    answers = {
        n: GeneratedAnswer(
            " ".join(part for part in parts if not part.startswith("/o/")),
            tuple(part for part in parts if part.startswith("/o/")),
        )
        for n, parts in enumerate(given["generated"])
    }
    scores = MedmaxScores(records, answers, as_published=True)
    for number, reply in enumerate(given["judge_replies"]):
        scores.add_reply(number, reply)
    compared = scores.with_images()
    for record, value in zip(compared, given["similarities"], strict=True):
        scores.by_number[record.number]["image similarity (toy)"] = value
    if not records:  # MedMax raises.
        assert scores.results() == {}
        return
    assert scores.results()["mm_out"] == pytest.approx(expected["results_json"]["mm_out"])
    for record, line in zip(records, expected["answers_jsonl"], strict=True):
        assert answers[record.number].text == line["text"]
        assert (answers[record.number].image or "") == line["image"]
    missing = [n for n, answer in answers.items() if answer.image is None]
    assert all(scores.notes[n] == "No image was generated." for n in missing)


@pytest.mark.parametrize("case", CASES["captioning_generation"], ids=lambda c: c["id"])
def test_caption_scores_match_recorded_cases(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    records = [parse_record(n, raw) for n, raw in enumerate(given["rows"])]
    scores = MedmaxScores(
        records, {n: GeneratedAnswer(text) for n, text in enumerate(given["generated"])}, True
    )
    for record, value in zip(scores.with_images(), given["similarities"], strict=True):
        scores.by_number[record.number]["image similarity (toy)"] = value
    actual = nan_to_null(scores.results())
    expected_result = recorded(expected["files"]["results/toy.json"])["image_captioning"]
    for source, own in expected_result.items():
        if own["captioning_similarity"] is None:  # Our result leaves out a source without values.
            assert source not in actual["image_captioning"]
        else:
            assert actual["image_captioning"][source] == pytest.approx(own, abs=1e-9)
    # MedMax logs only the last source.
    assert len(scores.logs()["image_captioning"]) == len(records)


def test_verdict_is_parsed_with_punctuation() -> None:
    for reply, value in (("Correctness: 1.", 1), ("correctness: 1.0", 1), ("**Correctness:** 0", 0),
                         ("Correctness: 10", None), ("Correctness: 1.5", None),
                         ("Correctness: 0 or Correctness: 1", None)):  # fmt: skip
        assert parse_verdict(reply, False) == value


def test_python_literals_are_parsed_and_never_executed(tmp_path: Path) -> None:
    known = {"gpt4_answer": "a", "fig_label": "F", "fig_caption": "c", "in_text_mention": None}
    assert chat_reference(str(known)) == known
    assert chat_reference(json.dumps(known)) == known
    canary = tmp_path / "canary"
    for text in (f"open({str(canary)!r}, 'w')", "(" * 5000, "{'gpt4_answer': 1}", 5, "[1, 2"):
        with pytest.raises(UserError, match="The answer of visual_chat lacks"):
            chat_reference(text)
    assert not canary.exists()


# --- command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("medmax")
    Phantom("CT", "head").image(64).save(folder / "x.png")
    chat = {"gpt4_answer": "A head.", "fig_label": "F", "fig_caption": "c", "in_text_mention": None,
            "domain": {"ct_scan": True}}  # fmt: skip
    rows = [
        ("vqa_rad", "closed", "Is there a cyst?", "no"), ("slake", "open", "Which organ?", "head"),
        ("pmc_vqa", "mcq", "What? A: x B: y", "A"), ("image_captioning", "quilt", None, "a head"),
        ("image_generation", "report", "Show me a CT scan of the head.", "a head"),
        ("mm_out", "mm", "Show me a CT scan of the head.", "Here."),
        ("visual_chat", "conversation", "What is it?\n<image>", str(chat)),
    ]  # fmt: skip
    lines = [
        {"task_name": task, "question_type": kind, "prompt": prompt, "answer": answer,
         "image_path": "x.png"}
        for task, kind, prompt, answer in rows
    ]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_suite_runs_and_resumes(
    data: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = {"Correctness": "Correctness: 1", "[Assistant 2]": "8 4\nok"}
    server.reply = lambda message: next(r for part, r in replies.items() if part in message)
    output = tmp_path / "out"
    command = ["evaluate", "medmax", "--ckpt", "tiny", "--eval_data", data / "data.jsonl"]
    command += ["--output", output, "--max_new_tokens", 100, "--seed", 3]
    command += ["--clip_model", clip_folder(tmp_path / "clip")]
    command += ["--sentence_model", sentence_folder(tmp_path / "sentences")]
    command += ["--endpoint", server.address, "--judge", "m"]
    assert cli.main([*map(str, command)]) == 0
    capsys.readouterr()
    results = json.loads((output / "results" / "tiny.json").read_text())
    assert set(results) >= {"vqa_rad_closed", "slake_open", "pmc_vqa_mcq", "image_captioning",
                            "image_generation", "visual_chat"}  # fmt: skip
    assert results["slake_open"] == {"accuracy": 1.0, "std_err": None}
    assert results["visual_chat"]["ct_scan"]["pred_relative_score"] == 50
    assert -1 <= results["image_generation"]["report"]["generation_similarity"] <= 1
    logs = json.loads((output / "logs" / "tiny.json").read_text())
    assert len(logs["image_generation"]) == 1
    assert Path(logs["image_generation"][0]["images"][0]).is_file()
    html = (output / "tiny.json.html").read_text(encoding="utf-8")
    assert "generated image" in html
    requests_before = sum(server.requests.values())
    assert requests_before == 3

    file = output / "answers.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(rows[:-1]) + rows[-1][:9])  # an incomplete last line
    (output / "results" / "tiny.json").write_text('{"other": 1}')
    assert cli.main([*map(str, command)]) == 0
    assert "resuming after 6 answers" in capsys.readouterr().out
    again = json.loads((output / "results" / "tiny.json").read_text())
    assert again.pop("other") == 1
    assert again == results
    assert sum(server.requests.values()) == requests_before
    assert cli.main([*map(str, [*command, "--prompt_processor", "default"])]) == 2
    assert (
        "results of a run with other options (prompt_processor was 'sft', now 'default')"
        in capsys.readouterr().err
    )


def test_answers_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    rows = [
        {"row": 3, "task": "mm_out", "text": "a", "pictures": ["000003_0.png"]},  # alias
        {"row": 4, "task": "mm_out", "text": "b", "images": ["000004_0.png"]},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_answers(tmp_path) == {
        3: GeneratedAnswer("a", (str(tmp_path / "pictures" / "000003_0.png"),)),  # alias
        4: GeneratedAnswer("b", (str(tmp_path / "images" / "000004_0.png"),)),
    }


def test_missing_judge_and_models_are_reported(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "medmax", "--ckpt", "tiny", "--eval_data", data / "data.jsonl"]
    command += ["--output", tmp_path, "--max_new_tokens", 8, "--tasks", "vqa", "image_captioning"]
    command += ["--compat", "medmax", "--prompt_processor", "chameleon"]
    assert cli.main([*map(str, command)]) == 0
    printed = capsys.readouterr().out
    assert "1 open, mixed and chat answers have no score" in printed
    assert "1 captions and images have no score" in printed
    results = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert set(results) == {"vqa_rad_closed", "pmc_vqa_mcq"}
    command[command.index("vqa") :] = ["mcq", "--limit", "0"]
    assert cli.main([*map(str, command)]) == 2
    assert "--limit 0" in capsys.readouterr().err
    for name in ("manifest", "../x"):
        command[command.index("--limit") :] = ["--limit", 1, "--save_name", name]
        assert cli.main([*map(str, command)]) == 2
        assert "Expected a file name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"question_type": "essay"}, "question_type of 'vqa_rad' is invalid (got 'essay'"),
        ({"image_path": None}, "record of vqa_rad needs an image"),
        ({"answer": "maybe"}, "answer must be yes or no (got 'maybe')"),
        ({"answer": 1}, "answer must be a string (got 1)"),
        ({"image_path": "../../x.png"}, "outside of the folder"),
        ({"task_name": "visual_chat"}, "The answer of visual_chat lacks"),
        ({"question_type": "mcq", "answer": "AB"}, "answer must be a letter (got 'AB')"),
        ({"prompt": "\ud83d"}, "unpaired surrogate"),
        (
            {"task_name": "image_captioning"},
            "question_type of image_captioning is invalid (got 'closed'",
        ),
    ],
)
def test_invalid_records_are_reported_with_their_location(
    change: dict[str, Any], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"task_name": "vqa_rad", "question_type": "closed", "prompt": "q", "answer": "no",
           "image_path": "x.png"}  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row | change) + "\n")
    command = ["evaluate", "medmax", "--ckpt", "tiny", "--eval_data", path]
    assert cli.main([*map(str, [*command, "--output", tmp_path / "o"])]) == 2
    assert error in capsys.readouterr().err


def test_published_options_are_one_token_and_a_penalty() -> None:
    common: Any = {"ckpt": "tiny", "eval_data": Path("x"), "output": Path("y")}
    record = MedmaxRecord(0, "vqa_rad", "closed", "q", "no", "x.png")
    published = MedmaxOptions(**common, compat="medmax").generation_of(record, None)
    assert (published.max_new_tokens, published.repetition_penalty) == (1, 1.2)
    ours = MedmaxOptions(**common).generation_of(record, None)
    assert (ours.max_new_tokens, ours.repetition_penalty, ours.text_greedy) == (16, 1.0, True)
