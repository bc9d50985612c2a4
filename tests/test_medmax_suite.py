"""MedMax's suite: recorded prompts and scores, and a whole run with a judge."""

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
from medley.evaluation.medmax_scores import Prediction, Scores, accuracy, merged, verdict
from medley.evaluation.medmax_suite import (
    CAPTIONING,
    MIXED,
    QUESTIONS,
    Row,
    chat_reference,
    prompt_for,
    row_of,
)
from medley.phantoms import Phantom
from medley.utils.files import nan_to_null

CASES = golden("medmax_eval.json")
PROCESSORS: Any = ("sft", "chameleon", "default")


def recorded(value: Any) -> Any:
    """Recorded nan and what our JSON has in its place."""
    if isinstance(value, dict):
        return {name: recorded(own) for name, own in value.items()}
    return None if value == "NaN" else value


def asked(processor: Any, row: Row, image: str | None) -> list[Any]:
    """Our prompt in the recorded way: content, and what each part is."""
    parts = prompt_for(processor, row, ImagePart(path=image) if image else None)
    content = [str(p.path) if isinstance(p, ImagePart) else p for p in parts]
    kinds = ["image" if isinstance(p, ImagePart) else "text" for p in parts]
    if processor == "sft":
        return [[*content, "<END-OF-TURN>"], [*kinds, "sentinel"]]
    return [content, kinds]


@pytest.mark.parametrize("case", CASES["prompt_processors"], ids=lambda c: c["id"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_prompts_equal_the_recorded(
    case: dict[str, Any], processor: Any, exceptions: dict[str, dict[str, str]]
) -> None:
    given, expected = case["input"], case["expected"][processor]
    kind = given["task_type"]
    if kind == "visual_chat":  # theirs only says whether the turn ends, see below
        assert expected in (True, False) or "default" in processor
        return
    task = kind if kind in (CAPTIONING, "image_generation", MIXED) else "vqa_rad"
    row = Row(0, task, kind, given["question"] or "", "", given["image_path"])
    found = asked(processor, row, given["image_path"])
    if processor == "default" and None in expected[0]:
        assert f"{case['id']}_default" in exceptions["medmax_eval"]
        kept = [(part, k) for part, k in zip(*expected, strict=True) if part is not None]
        expected = [[part for part, _ in kept], [k for _, k in kept]]
        if kind == CAPTIONING:
            expected = [[*expected[0], ""], ["image", "text"]]
    assert found == expected


@pytest.mark.parametrize("case", CASES["accuracy_and_stderr"], ids=lambda c: c["id"])
def test_means_equal_the_recorded(case: dict[str, Any]) -> None:
    found = nan_to_null(accuracy([float(value) for value in case["input"]]))
    expected = recorded(case["expected"])
    for name, value in found.items():
        assert (
            value is None
            if expected[name] is None
            else math.isclose(value, expected[name], abs_tol=1e-9)
        )


def test_tasks_stand_in_the_recorded_order() -> None:
    assert [list(pair) for pair in QUESTIONS] == CASES["task_order"]["all"]
    for kind in ("open", "closed", "mcq"):
        own = [list(pair) for pair in QUESTIONS if pair[1] == kind]
        assert own == CASES["task_order"][kind]


def test_result_files_are_merged_as_recorded() -> None:
    expected = CASES["json_merge"]["results_after_two_writes"]
    assert merged(merged({}, {"a": 1, "b": 2}), {"a": 3}) == expected


@pytest.mark.parametrize("case", CASES["vqa_tasks"], ids=lambda c: c["id"])
def test_questions_are_scored_as_recorded(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    if expected["exception"]:
        with pytest.raises(UserError, match="question_type is 'essay'"):
            row_of(0, {"task_name": given["task_name"], "question_type": given["question_type"]})
        return
    rows = [
        Row(n, given["task_name"], given["question_type"], r["prompt"], r["answer"], "i.png")
        for n, r in enumerate(given["rows"])
    ]
    calls = [call["content"] for call in expected["generation_calls"]]
    processor = given["prompt_processor"]
    assert [asked(processor, row, "evd/i.png")[0] for row in rows] == calls
    texts = {n: Prediction(r["generated_text"]) for n, r in enumerate(given["rows"])}
    scores = Scores(rows, texts, as_published=True)
    for number, reply in enumerate(given["judge_replies"] or []):
        scores.take_reply(number, reply)
    (name, result) = next(iter(recorded(expected["results_json"]).items()))
    if not rows:  # theirs writes means of nothing, ours leaves the task out
        assert result == {"accuracy": None, "std_err": None}
        assert scores.results() == {}
        return
    found = nan_to_null(scores.results())[name]
    assert found == pytest.approx(result, abs=1e-9)
    right = [bool(log["is_correct"]) for log in expected["logs_json"][name]]
    ours = [log["is_correct"] for log in scores.logs()[name]]
    assert [value for value in ours if value is not None] == right
    unread = [note for note in scores.notes.values() if "cannot be read" in note]
    assert len(unread) == len(rows) - len(right)  # theirs drops them, ours says so


@pytest.mark.parametrize("case", CASES["visual_chat"], ids=lambda c: c["id"])
def test_chats_are_scored_as_recorded(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    rows = [row_of(n, record) for n, record in enumerate(given["rows"])]
    for row, call in zip(rows, expected["generation_calls"], strict=True):
        content = asked("default", row, f"evd/{row.image}")
        assert content == [call["content"], call["modality"]]
        assert call["sft"] == (given["prompt_processor"] == "sft")
    texts = {n: Prediction(text.strip()) for n, text in enumerate(given["generated"])}
    scores = Scores(rows, texts, as_published=True)
    for number, reply in enumerate(given["judge_replies"]):
        scores.take_reply(number, reply.strip())
    if expected["exception"]:  # theirs stops there, after every call was paid for
        assert "cannot be read: 8, 7" in scores.notes[0]
        assert scores.results() == {}
        again = Scores(rows, texts)
        assert again.take_reply(0, "8, 7")
        return
    found = scores.results()["visual_chat"]
    wanted = expected["results_json"]["visual_chat"]
    assert found.keys() == wanted.keys()
    for name, own in wanted.items():
        assert found[name] == pytest.approx(own, abs=1e-9)
    prompts = [record["prompt"] for record in expected["answers_jsonl"]]
    assert [row.prompt.replace("<image>", "").strip() for row in rows] == prompts


@pytest.mark.parametrize("case", CASES["mm_out"], ids=lambda c: c["id"])
def test_mixed_answers_are_scored_as_recorded(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    rows = [row_of(n, record) for n, record in enumerate(given["rows"])]
    texts = {
        n: Prediction(
            " ".join(part for part in parts if not part.startswith("/o/")),
            tuple(part for part in parts if part.startswith("/o/")),
        )
        for n, parts in enumerate(given["generated"])
    }
    scores = Scores(rows, texts, as_published=True)
    for number, reply in enumerate(given["judge_replies"]):
        scores.take_reply(number, reply)
    compared = scores.with_pictures()
    for row, value in zip(compared, given["similarities"], strict=True):
        scores.by_row[row.number]["similarity of pictures (toy)"] = value
    if not rows:  # theirs raises
        assert scores.results() == {}
        return
    assert scores.results()["mm_out"] == pytest.approx(expected["results_json"]["mm_out"])
    for row, record in zip(rows, expected["answers_jsonl"], strict=True):
        assert texts[row.number].text == record["text"]
        assert (texts[row.number].drawn or "") == record["image"]
    missing = [n for n, text in texts.items() if text.drawn is None]
    assert all(scores.notes[n] == "no picture was drawn" for n in missing)


@pytest.mark.parametrize("case", CASES["captioning_generation"], ids=lambda c: c["id"])
def test_captions_are_scored_as_recorded(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    rows = [row_of(n, record) for n, record in enumerate(given["rows"])]
    scores = Scores(rows, {n: Prediction(text) for n, text in enumerate(given["generated"])}, True)
    for row, value in zip(scores.with_pictures(), given["similarities"], strict=True):
        scores.by_row[row.number]["similarity of pictures (toy)"] = value
    found = nan_to_null(scores.results())
    wanted = recorded(expected["files"]["results/toy.json"])["image_captioning"]
    for source, own in wanted.items():
        if own["captioning_similarity"] is None:  # nothing of this source: ours leaves it out
            assert source not in found["image_captioning"]
        else:
            assert found["image_captioning"][source] == pytest.approx(own, abs=1e-9)
    assert len(scores.logs()["image_captioning"]) == len(rows)  # theirs keeps the last source's


def test_a_judges_verdict_may_end_with_a_period() -> None:
    for reply, value in (("Correctness: 1.", 1), ("correctness: 1.0", 1), ("**Correctness:** 0", 0),
                         ("Correctness: 10", None), ("Correctness: 1.5", None),
                         ("Correctness: 0 or Correctness: 1", None)):  # fmt: skip
        assert verdict(reply, False) == value


def test_literals_are_read_and_never_run(tmp_path: Path) -> None:
    known = {"gpt4_answer": "a", "fig_label": "F", "fig_caption": "c", "in_text_mention": None}
    assert chat_reference(str(known)) == known
    assert chat_reference(json.dumps(known)) == known
    mark = tmp_path / "mark"
    for text in (f"open({str(mark)!r}, 'w')", "(" * 5000, "{'gpt4_answer': 1}", 5, "[1, 2"):
        with pytest.raises(UserError, match="the answer of visual_chat has no"):
            chat_reference(text)
    assert not mark.exists()


# --- the program ------------------------------------------------------------------------------


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


def test_the_whole_suite_runs_and_goes_on(
    data: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = {"Correctness": "Correctness: 1", "[Assistant 2]": "8 4\nok"}
    server.reply = lambda said: next(text for mark, text in replies.items() if mark in said)
    output = tmp_path / "out"
    words = ["evaluate", "medmax", "--ckpt", "tiny", "--eval_data", data / "data.jsonl"]
    words += ["--output", output, "--max_new_tokens", 100, "--seed", 3]
    words += ["--similarity_model", clip_folder(tmp_path / "clip")]
    words += ["--sentence_model", sentence_folder(tmp_path / "sentences")]
    words += ["--endpoint", server.address, "--judge", "m"]
    assert cli.main([str(word) for word in words]) == 0
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
    page = (output / "tiny.json.html").read_text(encoding="utf-8")
    assert "the picture that was drawn" in page
    asked_before = sum(server.asked.values())
    assert asked_before == 3

    file = output / "answers.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:-1]) + whole[-1][:9])  # as a kill leaves it
    (output / "results" / "tiny.json").write_text('{"other": 1}')
    assert cli.main([str(word) for word in words]) == 0
    assert "6 answers are there already" in capsys.readouterr().out
    again = json.loads((output / "results" / "tiny.json").read_text())
    assert again.pop("other") == 1
    assert again == results
    assert sum(server.asked.values()) == asked_before
    assert cli.main([str(word) for word in [*words, "--prompt_processor", "default"]]) == 2
    assert "holds answers of other options (prompt_processor)" in capsys.readouterr().err


def test_tasks_without_a_judge_say_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "medmax", "--ckpt", "tiny", "--eval_data", data / "data.jsonl"]
    words += ["--output", tmp_path, "--max_new_tokens", 8, "--tasks", "vqa", "image_captioning"]
    words += ["--compat", "medmax", "--prompt_processor", "chameleon"]
    assert cli.main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "1 open, mixed and chat answers have no score" in said
    assert "1 captions and pictures have no score" in said
    results = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert set(results) == {"vqa_rad_closed", "pmc_vqa_mcq"}
    words[words.index("vqa") :] = ["mcq", "--limit", "0"]
    assert cli.main([str(word) for word in words]) == 2
    assert "--limit is 0" in capsys.readouterr().err
    for name in ("manifest", "../x"):
        words[words.index("--limit") :] = ["--limit", 1, "--save_name", name]
        assert cli.main([str(word) for word in words]) == 2
        assert "expected a plain name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question_type": "essay"}, "question_type is 'essay' of 'vqa_rad'"),
        ({"image_path": None}, "vqa_rad without a picture"),
        ({"answer": "maybe"}, "its answer is 'maybe', expected yes or no"),
        ({"answer": 1}, "its answer is 1, expected text"),
        ({"image_path": "../../x.png"}, "outside of the folder"),
        ({"task_name": "visual_chat"}, "the answer of visual_chat has no"),
        ({"question_type": "mcq", "answer": "AB"}, "its answer is 'AB', expected a letter"),
        ({"prompt": "\ud83d"}, "half of a character"),
        ({"task_name": "image_captioning"}, "question_type is 'closed' of image_captioning"),
    ],
)
def test_bad_rows_are_named_with_their_place(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"task_name": "vqa_rad", "question_type": "closed", "prompt": "q", "answer": "no",
           "image_path": "x.png"}  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row | change) + "\n")
    words = ["evaluate", "medmax", "--ckpt", "tiny", "--eval_data", path]
    assert cli.main([str(w) for w in [*words, "--output", tmp_path / "o"]]) == 2
    assert said in capsys.readouterr().err


def test_published_answers_have_one_token_and_a_penalty() -> None:
    common: Any = {"ckpt": "tiny", "eval_data": Path("x"), "output": Path("y")}
    row = Row(0, "vqa_rad", "closed", "q", "no", "x.png")
    published = MedmaxOptions(**common, compat="medmax").generation_of(row, None)
    assert (published.max_new_tokens, published.repetition_penalty) == (1, 1.2)
    ours = MedmaxOptions(**common).generation_of(row, None)
    assert (ours.max_new_tokens, ours.repetition_penalty, ours.text_greedy) == (16, 1.0, True)
