"""Our scores: by words, with intervals; the programs, reports and comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from medley import cli
from medley.datasets.registry import ConversionConfig
from medley.errors import UserError
from medley.evaluation.cases import Example, ScoredExample, read_scored, sample_examples
from medley.evaluation.comparison import compare_runs
from medley.evaluation.confidence import mean_interval, paired_difference, share_interval
from medley.evaluation.predictions import paired
from medley.evaluation.questions import Question, read_questions
from medley.evaluation.reference_scorers import is_known
from medley.evaluation.science_qa import parsed_letter
from medley.evaluation.vqa import (
    choice_of,
    confusion,
    is_right,
    majority_baseline,
    own_scores,
    random_baseline,
    score,
    yes_or_no,
)
from medley.evaluation.vqa_normalize import normalise

# --- ours -------------------------------------------------------------------------------------


def closed(gold: str, answer: str) -> bool:
    return is_right(Example(0, "", gold, answer, "CLOSED"))


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("no", "normal", False), ("no", "cannot tell", False), ("no", "monochrome", False),
        ("yes", "eyes", False), ("yes", "Yes, there is.", True), ("no", "No.", True),
        ("no", "yes and no", False), ("no", "", False), ("", "no", False), ("yes", "是", True),
        ("no", "不是", True), ("no", "没有", True), ("yes", "否", False),
        ("yes", "是的，有结节", True),
        ("no", "不清楚", False), ("yes", "对称", False), ("yes", "所有", False), ("no", "无", True),
        ("肺部有结节", "有", False), ("不健康", "没有", False), ("对称", "是", False),
        ("有", "有", True),
        ("no", "No,there is none, at all", True), ("yes", "Yes.There is a mass", True),
        ("left", "The left lung.", True), ("left", "leftover", False),
        ("left", "left: upper", True),
        ("left", "*left*", True), ("CT", "“CT:”", True), ("左肺", "左肺。", True),
        ("x-ray", "It is an X ray.", True), ("x-ray", "X-ray - chest", True), ("2", "two", True),
        ("2.5 cm", "It measures 2.5 cm.", True), ("2.5 cm", "2 5 cm", False),
    ],
)  # fmt: skip
def test_closed_answers_are_compared_by_words(gold: str, answer: str, right: bool) -> None:
    assert closed(gold, answer) == right


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("A", "", False), ("the", "", False), ("?", "", False), ("", "", False), ("?", "?", True),
        ("left lung", "The left lung.", True), ("left lung", "lung left", False),
        ("two", "2", True), ("T2-weighted", "t2 weighted", True), ("左肺", "左肺。", True),
    ],
)  # fmt: skip
def test_open_answers_are_the_same_words(gold: str, answer: str, right: bool) -> None:
    assert is_right(Example(0, "", gold, answer, "OPEN")) == right
    found = score(Example(0, "", "左肺结节", "右肺结节", "OPEN")).scores["open recall"]
    assert found == 0.75


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
        Example(i, "q", "yes" if i < 7 else "no", "yes", "CLOSED", None,
             {"organ": "head" if i % 2 else "chest", "id": i})
        for i in range(10)
    ]  # fmt: skip
    cases += [Example(10, "q", "left lung", "the left lung", "OPEN", None, {"organ": "chest"})]
    scores = own_scores([score(case) for case in cases])
    whole = scores["all"]
    assert whole["closed accuracy"]["percent"] == pytest.approx(70)
    blind = own_scores([score(case) for case in majority_baseline(cases)])["all"]
    assert blind["closed accuracy"]["percent"] == pytest.approx(70)
    assert blind["open exact match"]["percent"] == 100
    assert confusion(cases) == {"no": {"no": 0, "yes": 3}, "yes": {"no": 0, "yes": 7}}
    many = [Example(i, "q", "yes" if i % 4 else "no", "", "CLOSED") for i in range(400)]
    chance = sum(is_right(case) for case in random_baseline(many, 0)) / 400
    assert 0.55 < chance < 0.7  # 0.75 squared, and 0.25 squared
    assert random_baseline(many, 1) == random_baseline(many, 1) != random_baseline(many, 2)
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
        ("B", "B"), ("(b)", "B"), ("a", "A"), ("(B)", "B"), ("C. oxygen", "C"),
        ("The answer is D", "D"),
        ("the answer is (A).", "A"), ("The answer is A. No, the answer is B.", "FAILED"),
        ("A toy", "FAILED"), ("A, a toy", "A"), ("I will not say", "FAILED"),
        ("Apple", "FAILED"), ("", "FAILED"), ("The answer is a tumor", "FAILED"),
        ("**B**", "B"), ("Answer: B", "B"), ("The correct answer is **B**.", "B"),
        ("Option C", "C"), ("A!", "A"), ("B：肺", "B"), ("The answer is b.", "B"),
    ):  # fmt: skip
        assert parsed_letter(text) == letter, text


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


def test_questions_that_share_an_id_are_told_apart(tmp_path: Path) -> None:
    gold, answers = tmp_path / "gold.json", tmp_path / "answers.jsonl"
    rows = [
        {"id": 5, "answer_type": "CLOSED",
         "conversations": [{"from": "human", "value": f"{word}?\n<image>"},
                           {"from": "gpt", "value": right}]}
        for word, right in (("a", "yes"), ("b", "no"))
    ]  # fmt: skip
    gold.write_text(json.dumps(rows))

    def texts(*given: dict[str, str]) -> list[str]:
        lines = [json.dumps({"question_id": 5, **row}) + "\n" for row in given]
        answers.write_text("".join(lines))
        return [case.answer for case in paired(asked(gold), answers)[0]]

    a, b = {"prompt": "<image>\na?", "text": "yes"}, {"prompt": "b?", "text": "no"}
    assert texts(a, b) == texts(b, a) == ["yes", "no"]
    assert texts(b) == ["", "no"]
    assert texts({"text": "yes"}, {"text": "no"}) == ["yes", "no"]
    with pytest.raises(UserError, match="whose prompts do not say to which they belong"):
        texts({"text": "no"})
    with pytest.raises(UserError, match="half of a character"):
        texts({"text": "yes \ud83d"})


def test_kinds_by_other_names_and_none(tmp_path: Path) -> None:
    gold = tmp_path / "gold.json"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "是"}]
    rows = [{"id": i, "conversations": turns} | ({"answer_type": kind} if kind else {})
            for i, kind in enumerate(("yes/no", "number", "other", None))]  # fmt: skip
    gold.write_text(json.dumps(rows))
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps({"question_id": i, "text": "是"}) + "\n" for i in range(4))
    )
    cases, _ = paired(asked(gold), answers)
    assert [case.kind for case in cases] == ["CLOSED", "OPEN", "OPEN", "CLOSED"]
    assert [is_known(case) for case in cases] == [False, False, False, True]


def asked(path: Path) -> list[Question]:
    return read_questions(path, "llava", ConversionConfig(path))


def test_answers_that_are_missing_too_many_or_no_answers_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold, answers = write_pair(tmp_path, 6)
    rows = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(rows[:4]))
    cases, missing = paired(asked(gold), answers)
    assert (len(cases), missing) == (6, 2)
    assert paired(asked(gold), answers, True)[1] == 2
    assert len(paired(asked(gold), answers, True)[0]) == 4
    answers.write_text("".join([*rows, rows[0]]))
    with pytest.raises(UserError, match="1 ids have more answers"):
        paired(asked(gold), answers)
    answers.write_text('{"question_id": 1}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl:1: expected question_id and text"):
        paired(asked(gold), answers)
    answers.write_text("")
    with pytest.raises(UserError, match="no question has an answer"):
        paired(asked(gold), answers, True)
    gold.write_text("[]")
    with pytest.raises(UserError, match="no questions in it"):
        asked(gold)
    gold.write_text(
        '[{"id": 1, "answer_type": "MAYBE", "conversations": [{"value": "a"}, {"value": "b"}]}]'
    )
    with pytest.raises(UserError, match="answer_type is 'MAYBE'"):
        asked(gold)
    assert cli.main(["evaluate", "nothing"]) == 2
    assert "no command 'evaluate nothing'" in capsys.readouterr().err


def test_letters_are_compared_as_letters() -> None:
    for gold, answer, right in (
        ("A", "A", True), ("A", "A: a liver", True), ("B", "The answer is B.", True),
        ("A", "a spleen", False), ("B", "C", False), ("B", "", False),
    ):  # fmt: skip
        assert is_right(Example(0, "", gold, answer, "CLOSED")) == right
    assert choice_of(Example(0, "", "A", "liver", "CLOSED")) == ("A", "neither")
    assert choice_of(Example(0, "", "left", "left", "CLOSED")) is None


# --- reports ----------------------------------------------------------------------------------


def test_a_report_shows_tables_pictures_and_nothing_of_the_web(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold, answers = write_pair(tmp_path, 6)
    for number in range(5):  # the sixth picture is missing
        Image.new("RGB", (40, 30), (number, 99, 0)).save(tmp_path / f"{number}.png")
    rows = json.loads(gold.read_text())
    rows[0]["conversations"][0]["value"] = "<script>alert(1)</script>"
    gold.write_text(json.dumps(rows))
    output = tmp_path / "out" / "scores.json"
    words = ["evaluate", "vqa", "--gt", gold, "--pred", answers, "--output", output]
    assert cli.main([*map(str, words), "--image_folder", str(tmp_path)]) == 0
    page = (tmp_path / "out" / "scores.json.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 5
    assert "cannot be shown" in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "always the commonest" in page
    assert "Closed questions: right and given answers" in page
    found = json.loads(output.read_text())
    assert found["confusion"] == {"yes": {"yes": 3}}
    assert set(found["baselines"]) == {"always the commonest", "drawn at random"}
    cases = read_scored(tmp_path / "out" / "scores.json.cases.jsonl")
    assert [one.is_right for one in cases] == [False, True] * 3
    for wrong in (answers, gold, tmp_path):
        assert cli.main([str(word) for word in [*words[:-1], wrong]]) == 2
        said = capsys.readouterr().err
        assert "would replace what is read" in said or "a folder, expected" in said
    assert json.loads(gold.read_text()) == rows


def test_a_gallery_is_half_wrong_where_it_can_be() -> None:
    cases = [
        ScoredExample(Example(i, "", "", "", ""), {"right": float(i >= 10)}) for i in range(100)
    ]
    found = sample_examples(cases, 20)
    assert sum(one.is_right is False for one in found) == 10
    assert [one.case.identifier for one in found] == sorted(o.case.identifier for o in found)
    assert len(sample_examples(cases[:8], 20)) == 8
    assert sum(one.is_right is False for one in sample_examples(cases[:15], 10)) == 5


# --- two runs ---------------------------------------------------------------------------------


def run_of(right: list[float], images: bool = False) -> list[ScoredExample]:
    return [
        ScoredExample(Example(i, "q", "", "", "CLOSED", f"{i // 2}.png" if images else None),
               {"right": value, "closed accuracy": value})
        for i, value in enumerate(right)
    ]  # fmt: skip


def test_differences_are_paired() -> None:
    a = [0.0, 1.0] * 100
    b = [1.0, 1.0] * 90 + [0.0, 1.0] * 10
    found = compare_runs(run_of(a), run_of(b))["closed accuracy"]
    assert found["difference"]["percent"] == pytest.approx(45)
    assert found["p"] < 0.001
    few = compare_runs(run_of([0.0] * 3), run_of([1.0] * 3))["closed accuracy"]
    assert few["p"] == pytest.approx(0.25)
    assert compare_runs(run_of([0.0]), run_of([1.0]))["closed accuracy"]["p"] == 1
    same = compare_runs(run_of(a), run_of(a))["closed accuracy"]
    assert same["difference"]["percent"] == 0
    assert same["p"] == 1
    assert compare_runs(run_of(a), run_of(a[:50]))["closed accuracy"]["left out"] == 150
    with pytest.raises(UserError, match="no question in common"):
        compare_runs(run_of(a), [])
    other = [ScoredExample(one.case, {"open f1": 1.0}) for one in run_of(a)]
    with pytest.raises(UserError, match="no measure in common"):
        compare_runs(run_of(a), other)


def test_questions_about_one_picture_count_as_one_draw() -> None:
    a, b = [0.0] * 400, [1.0, 1.0, 0.0, 0.0] * 100
    clustered = paired_difference(a, b, [i // 2 for i in range(400)]).interval
    alone = paired_difference(a, b, list(range(400))).interval
    assert clustered.value == alone.value == 0.5
    ratio = (clustered.high - clustered.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(math.sqrt(2), rel=0.15)


def test_the_program_compares_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold, answers = write_pair(tmp_path, 8)
    other = tmp_path / "other.jsonl"
    rows = [{"question_id": i, "text": "no" if i == 1 else str(i)} for i in range(8)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, file in (("a", answers), ("b", other)):
        words = ["evaluate", "vqa", "--gt", gold, "--pred", file, "--output", tmp_path / name]
        assert cli.main([str(word) for word in words]) == 0
    words = ["evaluate", "report", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c.json"]
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "open exact match" in said
    found = json.loads((tmp_path / "c.json").read_text())["differences"]
    assert found["closed accuracy"]["difference"]["percent"] == pytest.approx(-100)
    assert found["open exact match"]["difference"]["percent"] == pytest.approx(100)
    page = (tmp_path / "c.json.html").read_text(encoding="utf-8")
    assert "A answered: yes" in page
    assert cli.main([str(word) for word in [*words[:3], *words[4:]]]) == 2
    assert "1 runs, expected two" in capsys.readouterr().err
    (tmp_path / "b.cases.jsonl").write_text("{}\n")
    assert cli.main([str(word) for word in words]) == 2
    assert "not a case of an evaluation" in capsys.readouterr().err
