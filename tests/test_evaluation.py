"""Our own VQA scores with intervals, and the commands `evaluate vqa` and `evaluate report`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from medley import cli
from medley.datasets.base import ConversionConfig
from medley.errors import UserError
from medley.evaluation.comparison import compare_runs
from medley.evaluation.confidence import mean_interval, paired_difference, proportion_interval
from medley.evaluation.examples import Example, ScoredExample, read_scored, sample_examples
from medley.evaluation.predictions import match_predictions
from medley.evaluation.questions import Question, read_questions
from medley.evaluation.reference_scorers import has_published_kind
from medley.evaluation.report import find_examples
from medley.evaluation.science_qa import parse_letter
from medley.evaluation.vqa import (
    confusion_matrix,
    is_correct,
    majority_baseline,
    parse_choice,
    random_baseline,
    score_example,
    score_groups,
)
from medley.evaluation.vqa_normalize import normalize_text
from medley.evaluation.yes_no import find_yes_no

# --- scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("no", "normal", False), ("no", "cannot tell", False), ("no", "monochrome", False),
        ("yes", "eyes", False), ("yes", "Yes, there is.", True), ("no", "No.", True),
        ("no", "yes and no", False), ("no", "", False), ("", "no", False), ("yes", "是", True),
        ("no", "不是", True), ("no", "没有", True), ("yes", "否", False),
        ("yes", "是的，有结节", True),
        ("no", "不清楚", False), ("yes", "对称", False), ("yes", "所有", False), ("no", "无", True),
        ("肺部有结节", "有", False), ("不健康", "没有", False), ("对称", "是", False),
        ("有", "有", True),
        ("no", "No,there is none, at all", True),  # an answer  # alias
        ("yes", "Yes.There is a mass", True),
        ("left", "The left lung.", True), ("left", "leftover", False),
        ("left", "left: upper", True),
        ("left", "*left*", True), ("CT", "“CT:”", True), ("左肺", "左肺。", True),
        ("x-ray", "It is an X ray.", True), ("x-ray", "X-ray - chest", True), ("2", "two", True),
        ("2.5 cm", "It measures 2.5 cm.", True), ("2.5 cm", "2 5 cm", False),
    ],
)  # fmt: skip
def test_closed_answers_are_compared_word_by_word(gold: str, answer: str, correct: bool) -> None:
    assert is_correct(Example(0, "", gold, answer, "CLOSED")) == correct


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("A", "", False), ("the", "", False), ("?", "", False), ("", "", False), ("?", "?", True),
        ("left lung", "The left lung.", True), ("left lung", "lung left", False),
        ("two", "2", True), ("T2-weighted", "t2 weighted", True), ("左肺", "左肺。", True),
    ],
)  # fmt: skip
def test_open_answers_need_the_same_words(gold: str, answer: str, correct: bool) -> None:
    assert is_correct(Example(0, "", gold, answer, "OPEN")) == correct
    result = score_example(Example(0, "", "左肺结节", "右肺结节", "OPEN")).scores["open recall"]
    assert result == 0.75


def test_yes_no_is_found_in_english_and_chinese() -> None:
    assert find_yes_no("不是") == "no"
    assert find_yes_no("It has no eyes") == "no"
    assert find_yes_no("maybe") is None


def test_published_normalization_removes_only_32_periods() -> None:
    text = "a." * 40
    assert normalize_text(text).count(".") == 0
    assert normalize_text(text, True).count(".") == 8


def test_scores_have_groups_baselines_and_sample_sizes() -> None:
    examples = [
        Example(i, "q", "yes" if i < 7 else "no", "yes", "CLOSED", None,
             {"organ": "head" if i % 2 else "chest", "id": i})
        for i in range(10)
    ]  # fmt: skip
    examples += [Example(10, "q", "left lung", "the left lung", "OPEN", None, {"organ": "chest"})]
    scores = score_groups([score_example(example) for example in examples])
    total = scores["all"]
    assert total["closed accuracy"]["percent"] == pytest.approx(70)
    majority = [score_example(example) for example in majority_baseline(examples)]
    baseline = score_groups(majority)["all"]
    assert baseline["closed accuracy"]["percent"] == pytest.approx(70)
    assert baseline["open exact match"]["percent"] == 100
    assert confusion_matrix(examples) == {"no": {"no": 0, "yes": 3}, "yes": {"no": 0, "yes": 7}}
    many = [Example(i, "q", "yes" if i % 4 else "no", "", "CLOSED") for i in range(400)]
    chance = sum(is_correct(example) for example in random_baseline(many, 0)) / 400
    assert 0.55 < chance < 0.7  # 0.75 squared, and 0.25 squared
    assert random_baseline(many, 1) == random_baseline(many, 1) != random_baseline(many, 2)
    assert total["open exact match"]["percent"] == 100
    assert total["n"] == 11
    assert scores["organ: chest"]["n"] == 6
    assert set(scores) == {"all", "organ: chest", "organ: head"}


def test_confidence_intervals() -> None:
    result = proportion_interval(8, 10)
    assert (result.low, result.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    assert proportion_interval(0, 5).low == 0
    mean = mean_interval([0.0, 1.0] * 200)
    assert mean.value == 0.5
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.1)


def test_letter_is_parsed_from_free_text() -> None:
    for text, letter in (
        ("B", "B"), ("(b)", "B"), ("a", "A"), ("(B)", "B"), ("C. oxygen", "C"),
        ("The answer is D", "D"),
        ("the answer is (A).", "A"), ("The answer is A. No, the answer is B.", "FAILED"),
        ("A toy", "FAILED"), ("A, a toy", "A"), ("I will not say", "FAILED"),
        ("Apple", "FAILED"), ("", "FAILED"), ("The answer is a tumor", "FAILED"),
        ("**B**", "B"), ("Answer: B", "B"), ("The correct answer is **B**.", "B"),
        ("Option C", "C"), ("A!", "A"), ("B：肺", "B"), ("The answer is b.", "B"),
    ):  # fmt: skip
        assert parse_letter(text) == letter, text


# --- commands ---------------------------------------------------------------------------------


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


def test_score_does_not_depend_on_answer_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold, answers = write_pair(tmp_path, 6)
    output = tmp_path / "scores.json"
    command = ["evaluate", "vqa", "--gt", gold, "--pred", answers, "--output", output]
    assert cli.main([*map(str, command)]) == 0
    printed = capsys.readouterr().out
    assert "closed accuracy" in printed
    scores = json.loads(output.read_text())["scores"]["all"]
    assert scores["closed accuracy"]["percent"] == 100
    assert scores["open exact match"]["percent"] == 0
    listed = output.with_name("scores.json.wrong.jsonl").read_text(encoding="utf-8")
    wrong = [json.loads(line) for line in listed.splitlines()]
    assert [row["gold"] for row in wrong] == ["0", "2", "4"]
    candidates = tmp_path / "candidates.json"
    candidates.write_text('{"0": ["0", 2, "yes"]}')
    more = ["--compat", "run_eval", "--candidate", candidates]
    assert cli.main([*map(str, [*command, *more])]) == 0
    assert json.loads(output.read_text())["run_eval"]["yes/no accuracy"] == 100
    assert cli.main([*map(str, [*command, "--compat", "run_eval"])]) == 2
    assert "needs --candidate" in capsys.readouterr().err


def test_questions_with_the_same_id_are_matched_by_prompt(tmp_path: Path) -> None:
    gold, answers = tmp_path / "gold.json", tmp_path / "answers.jsonl"
    rows = [
        {"id": 5, "image": "5.png", "answer_type": "CLOSED",
         "conversations": [{"from": "human", "value": f"{word}?\n<image>"},
                           {"from": "gpt", "value": right}]}
        for word, right in (("a", "yes"), ("b", "no"))
    ]  # fmt: skip
    gold.write_text(json.dumps(rows))

    def texts(*given: dict[str, str]) -> list[str]:
        lines = [json.dumps({"question_id": 5, **row}) + "\n" for row in given]
        answers.write_text("".join(lines))
        return [example.answer for example in match_predictions(read_gold(gold), answers)[0]]

    a, b = {"prompt": "<image>\na?", "text": "yes"}, {"prompt": "b?", "text": "no"}
    assert texts(a, b) == texts(b, a) == ["yes", "no"]
    assert texts(b) == ["", "no"]
    assert texts({"text": "yes"}, {"text": "no"}) == ["yes", "no"]
    with pytest.raises(UserError, match="do not determine which questions"):
        texts({"text": "no"})
    with pytest.raises(UserError, match="unpaired surrogate"):
        texts({"text": "yes \ud83d"})


def test_answer_types_of_other_datasets_are_open_or_closed(tmp_path: Path) -> None:
    gold = tmp_path / "gold.json"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "是"}]
    rows = [{"id": i, "conversations": turns} | ({"answer_type": kind} if kind else {})
            for i, kind in enumerate(("yes/no", "number", "other", None))]  # fmt: skip
    gold.write_text(json.dumps(rows))
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps({"question_id": i, "text": "是"}) + "\n" for i in range(4))
    )
    examples, _ = match_predictions(read_gold(gold), answers)
    assert [example.kind for example in examples] == ["CLOSED", "OPEN", "OPEN", "CLOSED"]
    assert [has_published_kind(example) for example in examples] == [False, False, False, True]


def read_gold(path: Path) -> list[Question]:
    return read_questions(path, "llava", ConversionConfig(path))


def test_missing_surplus_and_invalid_answers_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold, answers = write_pair(tmp_path, 6)
    rows = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(rows[:4]))
    examples, missing = match_predictions(read_gold(gold), answers)
    assert (len(examples), missing) == (6, 2)
    assert match_predictions(read_gold(gold), answers, True)[1] == 2
    assert len(match_predictions(read_gold(gold), answers, True)[0]) == 4
    answers.write_text("".join([*rows, rows[0]]))
    with pytest.raises(UserError, match="1 ids have more answers than questions"):
        match_predictions(read_gold(gold), answers)
    answers.write_text('{"question_id": 1}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl:1: Expected question_id and text"):
        match_predictions(read_gold(gold), answers)
    answers.write_text("")
    with pytest.raises(UserError, match="answers none of the questions"):
        match_predictions(read_gold(gold), answers, True)
    gold.write_text("[]")
    with pytest.raises(UserError, match="contains no questions"):
        read_gold(gold)
    gold.write_text(
        '[{"id": 1, "answer_type": "MAYBE", "conversations": [{"value": "a"}, {"value": "b"}]}]'
    )
    with pytest.raises(UserError, match=r"answer_type is invalid \(got 'MAYBE'"):
        read_gold(gold)


def test_gold_letter_is_compared_with_parsed_letter() -> None:
    for gold, answer, correct in (
        ("A", "A", True), ("A", "A: a liver", True), ("B", "The answer is B.", True),
        ("A", "a spleen", False), ("B", "C", False), ("B", "", False),
    ):  # fmt: skip
        assert is_correct(Example(0, "", gold, answer, "CLOSED")) == correct
    assert parse_choice(Example(0, "", "A", "liver", "CLOSED")) == ("A", "neither")
    assert parse_choice(Example(0, "", "left", "left", "CLOSED")) is None


# --- reports ----------------------------------------------------------------------------------


def test_html_report_is_self_contained_and_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold, answers = write_pair(tmp_path, 6)
    for number in range(5):  # the sixth image is missing
        Image.new("RGB", (40, 30), (number, 99, 0)).save(tmp_path / f"{number}.png")
    rows = json.loads(gold.read_text())
    rows[0]["conversations"][0]["value"] = "<script>alert(1)</script>"
    gold.write_text(json.dumps(rows))
    output = tmp_path / "out" / "scores.json"
    command = ["evaluate", "vqa", "--gt", gold, "--pred", answers, "--output", output]
    assert cli.main([*map(str, command), "--image_folder", str(tmp_path)]) == 0
    html = (tmp_path / "out" / "scores.json.html").read_text(encoding="utf-8")
    assert html.count("data:image/jpeg;base64,") == 5
    assert "cannot be shown" in html
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "http://" not in html
    assert "https://" not in html
    assert "majority baseline" in html
    assert "Confusion matrix of closed questions" in html
    result = json.loads(output.read_text())
    assert result["confusion"] == {"yes": {"yes": 3}}
    assert set(result["baselines"]) == {"majority baseline", "random baseline"}
    examples = read_scored(tmp_path / "out" / "scores.json.examples.jsonl")
    assert [one.is_correct for one in examples] == [False, True] * 3
    for wrong in (answers, gold, tmp_path):
        assert cli.main([*map(str, [*command[:-1], wrong])]) == 2
        assert f"--output {wrong}: " in capsys.readouterr().err
    assert json.loads(gold.read_text()) == rows


def test_half_of_the_sampled_examples_are_wrong() -> None:
    examples = [
        ScoredExample(Example(i, "", "", "", ""), {"correct": float(i >= 10)}) for i in range(100)
    ]
    result = sample_examples(examples, 20)
    assert sum(one.is_correct is False for one in result) == 10
    identifiers = [one.example.identifier for one in result]
    assert identifiers == sorted(identifiers)
    assert len(sample_examples(examples[:8], 20)) == 8
    assert sum(one.is_correct is False for one in sample_examples(examples[:15], 10)) == 5


def test_examples_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    row = {"id": 1, "kind": "CLOSED", "image": None, "question": "q", "gold": "yes",
           "answer": "yes", "drawn": "a.png", "note": "",
           "scores": {"right": 1, "similarity of pictures (clip)": 0.5}}  # fmt: skip  # alias
    (tmp_path / "a.cases.jsonl").write_text(json.dumps(row) + "\n")
    (result,) = read_scored(find_examples(tmp_path / "a"))
    assert result.generated_image == "a.png"
    assert result.scores == {"correct": 1, "image similarity (clip)": 0.5}
    assert result.is_correct


# --- two runs ---------------------------------------------------------------------------------


def run_of(right: list[float], images: bool = False) -> list[ScoredExample]:
    return [
        ScoredExample(Example(i, "q", "", "", "CLOSED", f"{i // 2}.png" if images else None),
               {"correct": value, "closed accuracy": value})
        for i, value in enumerate(right)
    ]  # fmt: skip


def test_compare_runs_pairs_questions() -> None:
    a = [0.0, 1.0] * 100
    b = [1.0, 1.0] * 90 + [0.0, 1.0] * 10
    result = compare_runs(run_of(a), run_of(b))["closed accuracy"]
    assert result["difference"]["percent"] == pytest.approx(45)
    assert result["p"] < 0.001
    few = compare_runs(run_of([0.0] * 3), run_of([1.0] * 3))["closed accuracy"]
    assert few["p"] == pytest.approx(0.25)
    assert compare_runs(run_of([0.0]), run_of([1.0]))["closed accuracy"]["p"] == 1
    same = compare_runs(run_of(a), run_of(a))["closed accuracy"]
    assert same["difference"]["percent"] == 0
    assert same["p"] == 1
    assert compare_runs(run_of(a), run_of(a[:50]))["closed accuracy"]["left out"] == 150
    with pytest.raises(UserError, match="share no question"):
        compare_runs(run_of(a), [])
    other = [ScoredExample(one.example, {"open f1": 1.0}) for one in run_of(a)]
    with pytest.raises(UserError, match="share no metric"):
        compare_runs(run_of(a), other)


def test_bootstrap_resamples_images_not_questions() -> None:
    a, b = [0.0] * 400, [1.0, 1.0, 0.0, 0.0] * 100
    clustered = paired_difference(a, b, [i // 2 for i in range(400)]).interval
    alone = paired_difference(a, b, list(range(400))).interval
    assert clustered.value == alone.value == 0.5
    ratio = (clustered.high - clustered.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(math.sqrt(2), rel=0.15)


def test_report_command_compares_two_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold, answers = write_pair(tmp_path, 8)
    other = tmp_path / "other.jsonl"
    rows = [{"question_id": i, "text": "no" if i == 1 else str(i)} for i in range(8)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, file in (("a", answers), ("b", other)):
        command = ["evaluate", "vqa", "--gt", gold, "--pred", file, "--output", tmp_path / name]
        assert cli.main([*map(str, command)]) == 0
    command = ["evaluate", "report", tmp_path / "a", tmp_path / "b"]
    command += ["--output", tmp_path / "c.json"]
    capsys.readouterr()
    assert cli.main([*map(str, command)]) == 0
    printed = capsys.readouterr().out
    assert "open exact match" in printed
    result = json.loads((tmp_path / "c.json").read_text())["differences"]
    assert result["closed accuracy"]["difference"]["percent"] == pytest.approx(-100)
    assert result["open exact match"]["difference"]["percent"] == pytest.approx(100)
    html = (tmp_path / "c.json.html").read_text(encoding="utf-8")
    assert "A&#39;s answer: yes" in html
    assert cli.main([*map(str, [*command[:3], *command[4:]])]) == 2
    assert "Wrong number of runs (got 1, expected 2)" in capsys.readouterr().err
    (tmp_path / "b.examples.jsonl").write_text("{}\n")
    assert cli.main([*map(str, command)]) == 2
    assert "Not an example of an evaluation" in capsys.readouterr().err
