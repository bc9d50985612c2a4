"""Scores: the published ones to nine digits, ours by words, with intervals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import golden

from medley import cli
from medley.errors import UserError
from medley.evaluation.intervals import mean_interval, share_interval
from medley.evaluation.pairs import read_cases
from medley.evaluation.science_qa import parsed_letter, score
from medley.evaluation.vqa import (
    _WEIGHTS,
    Case,
    bleu,
    exact_match,
    f1,
    is_right,
    likeliest,
    likeness,
    own_scores,
    published_scores,
    yes_or_no,
)
from medley.evaluation.words import normalise

METRICS = golden("vqa_metrics.json")["cases"]
RUNS = golden("vqa_run_eval.json")["cases"]
WORDS = golden("vqa_normalize_words.json")["cases"]
SCIENCE = golden("science_qa.json")


# --- recorded cases ---------------------------------------------------------------------------


def test_words_are_normalised_as_recorded() -> None:
    found = {case["id"]: normalise(case["input"], True) for case in WORDS}
    assert found == {case["id"]: case["expected"] for case in WORDS}


@pytest.mark.parametrize("case", METRICS, ids=lambda c: c["id"])
def test_measures_equal_the_recorded(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    answer, gold = (normalise(str(given[key]).lower(), True) for key in ("pred", "gt"))
    words = expected["normalize_word"]
    assert (answer, gold) == (words["pred"], words["gt"])
    again = normalise(answer, True), normalise(gold, True)
    assert again == (words["pred_twice"], words["gt_twice"])
    found = {"exact": exact_match(*again), "f1": f1(*again)}
    assert found["exact"] == pytest.approx(expected["calculate_exactmatch"]["value"], abs=1e-9)
    recorded = expected["calculate_f1score__f1_precision_recall"]["value"]
    assert found["f1"] == pytest.approx(recorded, abs=1e-9)
    texts = [normalise(str(candidate).lower(), True) for candidate in given["candidates"]]
    assert [likeness(again[0], text) for text in texts] == pytest.approx(
        expected["candidate_similarity"], abs=1e-9
    )
    for name, weights in _WEIGHTS.items():
        recorded = expected["sentence_bleu"][name]
        assert bleu(answer, gold, weights) == pytest.approx(recorded["value"], abs=1e-9)
    if given["answer_type"] == "OPEN":
        hit = likeliest(again[0], given["candidates"]) == again[1]
        assert float(hit) == expected["run_eval_open_hit_candidate_argmax"]
        assert float(gold in answer) == expected["run_eval_batch_open_hit_substring"]
        return
    one = Case(0, "", str(given["gt"]), str(given["pred"]), "CLOSED")
    opened = Case(1, "", "a", "a", "OPEN")  # the published code needs one
    for compat in ("run_eval", "run_eval_batch"):
        table = published_scores([one, opened], compat, given["candidates"])  # type: ignore[arg-type]
        assert table["yes/no accuracy"] == 100 * expected[f"{compat}_closed_hit"]
    recorded = 100 * expected["run_eval_batch_recall_closed"]
    assert table["recall_closed"] == pytest.approx(recorded, abs=1e-9)


@pytest.mark.parametrize("compat", ["run_eval", "run_eval_batch"])
@pytest.mark.parametrize("case", RUNS, ids=lambda c: c["id"])
def test_whole_runs_equal_the_recorded(case: dict[str, Any], compat: Any) -> None:
    cases = [
        Case(g["id"], "", str((g.get("conversations") or g["conversatons"])[1]["value"]), p["text"],
             g["answer_type"])
        for g, p in zip(case["gt"], case["pred"], strict=False)
    ]  # fmt: skip
    expected = case["evaluate_full_precision"][compat]
    candidates = case["candidate"]["0"]
    if expected.get("error") in ("ZeroDivisionError", "ValueError"):
        with pytest.raises(UserError, match=r"no question is CLOSED|candidates are empty"):
            published_scores(cases, compat, candidates)
    elif "error" in expected:  # whole numbers for answers: they are text for us
        assert case["id"] == "gt_answer_is_int"
        assert published_scores(cases, compat, candidates)["yes/no accuracy"] >= 0
    else:
        assert published_scores(cases, compat, candidates) == pytest.approx(
            expected["percent"], abs=1e-9
        )


@pytest.mark.parametrize(
    "case", [*SCIENCE["cases"], *SCIENCE["llava_med_v1_scorer"]], ids=lambda c: c["id"]
)
def test_science_qa_equals_the_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    given, expected = case["input"], case["expected"]
    wanted = given["pid_splits"]["test"]
    if case["id"].startswith("v1_"):  # LLaVA-Med's leaves out what LLaVA counts as wrong
        wanted = [p["question_id"] for p in given["predictions"]]
    answers = {p["question_id"]: p for p in given["predictions"]}
    rows, result = score(given["problems"], wanted, answers, True)
    if expected["error"]:  # divides by the number of pictures
        assert not any(row["is_multimodal"] for own in rows.values() for row in own)
    else:
        assert rows == expected["output_file"]
        assert result == expected["output_result"]
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "problems.json").write_text(json.dumps(given["problems"]))
    (folder / "pid_splits.json").write_text(json.dumps({"test": wanted}))
    answers_file = tmp_path / "answers.jsonl"
    lines = [json.dumps(row) + "\n" for row in given["predictions"]]
    answers_file.write_text("".join(lines))
    words = ["evaluate", "science-qa", "--base_dir", folder, "--pred", answers_file, "--compat"]
    words += ["llava", "--output", tmp_path / "o.json", "--output_result", tmp_path / "r.json"]
    assert cli.main([str(word) for word in words]) == 0
    if not expected["error"]:
        assert json.loads((tmp_path / "r.json").read_text()) == result


# --- ours -------------------------------------------------------------------------------------


def closed(gold: str, answer: str) -> bool:
    return is_right(Case(0, "", gold, answer, "CLOSED"))


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("no", "normal", False), ("no", "cannot tell", False), ("no", "monochrome", False),
        ("yes", "eyes", False), ("yes", "Yes, there is.", True), ("no", "No.", True),
        ("no", "yes and no", False), ("no", "", False), ("", "no", False), ("yes", "是", True),
        ("no", "不是", True), ("no", "没有", True), ("yes", "否", False),
        ("left", "The left lung.", True), ("left", "leftover", False),
        ("x-ray", "It is an X ray.", True), ("2", "two", True),
    ],
)  # fmt: skip
def test_closed_answers_are_compared_by_words(gold: str, answer: str, right: bool) -> None:
    assert closed(gold, answer) == right


def test_yes_and_no_in_two_languages() -> None:
    assert yes_or_no("不是") == "no"
    assert yes_or_no("It has no eyes") == "no"
    assert yes_or_no("maybe") is None


def test_periods_are_all_deleted_but_for_the_published() -> None:
    text = "a." * 40
    assert normalise(text).count(".") == 0
    assert normalise(text, True).count(".") == 8


def test_groups_baselines_and_intervals() -> None:
    cases = [
        Case(i, "q", "yes" if i < 7 else "no", "yes", "CLOSED", None,
             {"organ": "head" if i % 2 else "chest", "id": i})
        for i in range(10)
    ]  # fmt: skip
    cases += [Case(10, "q", "left lung", "the left lung", "OPEN", None, {"organ": "chest"})]
    scores = own_scores(cases)
    whole = scores["all"]
    assert whole["closed accuracy"]["percent"] == pytest.approx(70)
    assert whole["closed: always the commonest"]["percent"] == pytest.approx(70)
    assert whole["open exact match"]["percent"] == 100
    assert whole["n"] == 11
    assert scores["organ: chest"]["n"] == 6
    assert set(scores) == {"all", "organ: chest", "organ: head"}


def test_intervals_cover_what_they_say() -> None:
    found = share_interval(8, 10)
    assert (found.low, found.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    assert share_interval(0, 5).low == 0
    mean = mean_interval([0.0, 1.0] * 200)
    assert mean.value == 0.5
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.1)


def test_letters_of_free_answers() -> None:
    for text, letter in (
        ("B", "B"), ("(b)", "FAILED"), ("(B)", "B"), ("C. oxygen", "C"), ("The answer is D", "D"),
        ("the answer is (A).", "A"), ("The answer is A. No, the answer is B.", "FAILED"),
        ("A toy", "A"), ("Apple", "FAILED"), ("", "FAILED"),
    ):  # fmt: skip
        assert parsed_letter(text, False) == letter, text


# --- the program ------------------------------------------------------------------------------


def write_pair(folder: Path, count: int) -> tuple[Path, Path]:
    gold, answers = folder / "gold.json", folder / "answers.jsonl"
    rows = [
        {"id": i, "image": f"{i}.png", "answer_type": "CLOSED" if i % 2 else "OPEN",
         "conversations": [{"from": "human", "value": f"q{i}\n<image>"},
                           {"from": "gpt", "value": "yes" if i % 2 else i}]}
        for i in range(count)
    ]  # fmt: skip
    gold.write_text(json.dumps(rows))
    lines = [{"question_id": str(i), "text": "yes"} for i in reversed(range(count))]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return gold, answers


def test_answers_are_scored_whatever_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold, answers = write_pair(tmp_path, 6)
    output = tmp_path / "scores.json"
    words = ["evaluate", "vqa", "--gt", gold, "--pred", answers, "--output", output]
    assert cli.main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "closed accuracy" in said
    scores = json.loads(output.read_text())["scores"]["all"]
    assert scores["closed accuracy"]["percent"] == 100
    assert scores["open exact match"]["percent"] == 0
    listed = output.with_name("scores.json.wrong.jsonl").read_text(encoding="utf-8")
    wrong = [json.loads(line) for line in listed.splitlines()]
    assert [row["gold"] for row in wrong] == ["0", "2", "4"]
    candidates = tmp_path / "candidates.json"
    candidates.write_text('{"0": ["0", 2, "yes"]}')
    more = ["--compat", "run_eval", "--candidate", candidates]
    assert cli.main([str(word) for word in [*words, *more]]) == 0
    assert json.loads(output.read_text())["run_eval"]["yes/no accuracy"] == 100
    assert cli.main([str(word) for word in [*words, "--compat", "run_eval"]]) == 2
    assert "needs --candidate" in capsys.readouterr().err


def test_answers_that_are_missing_too_many_or_no_answers_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold, answers = write_pair(tmp_path, 6)
    rows = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(rows[:4]))
    cases, missing = read_cases(gold, answers, False)
    assert (len(cases), missing) == (6, 2)
    assert read_cases(gold, answers, True)[1] == 2
    assert len(read_cases(gold, answers, True)[0]) == 4
    answers.write_text("".join([*rows, rows[0]]))
    with pytest.raises(UserError, match="1 ids have more answers"):
        read_cases(gold, answers, False)
    answers.write_text('{"question_id": 1}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl:1: expected question_id and text"):
        read_cases(gold, answers, False)
    answers.write_text("")
    gold.write_text("[]")
    with pytest.raises(UserError, match="no questions in it"):
        read_cases(gold, answers, False)
    gold.write_text(
        '[{"id": 1, "answer_type": "MAYBE", "conversations": [{"value": "a"}, {"value": "b"}]}]'
    )
    with pytest.raises(UserError, match="answer_type is 'MAYBE'"):
        read_cases(gold, answers, False)
    assert cli.main(["evaluate", "nothing"]) == 2
    assert "no command 'evaluate nothing'" in capsys.readouterr().err
