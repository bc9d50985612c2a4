"""A judge's reviews: recorded requests and files, and replies that fail or cannot be read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import golden
from model_server import Server

from medley import cli
from medley.errors import UserError
from medley.evaluation.judge import filled, read_prompts
from medley.evaluation.judge_prompts import JudgePrompts, review_row, reviews_of
from medley.evaluation.judge_scores import parse_pair_as_llava

CASES = golden("gpt_review_parse.json")
LAYOUTS = {
    "eval_gpt_review": "llava",
    "eval_gpt_review_visual": "llava_visual",
    "eval_gpt_review_bench": "llava_bench",
}


def placed(rows: list[dict[str, Any]] | None) -> Any:
    return None if rows is None else [(f"row {i}", row) for i, row in enumerate(rows)]


@pytest.mark.parametrize("case", CASES["review_scripts"], ids=lambda c: c["id"])
def test_requests_and_rows_equal_the_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    given, expected, layout = case["input"], case["expected"], LAYOUTS[case["script"]]
    rule = tmp_path / "rule.json"
    rule.write_text(json.dumps(given["rule"]))
    answers: Any = [(Path(k), placed(given[k])) for k in ("answers_1", "answers_2")]
    context = placed(given["context"]) if layout != "llava" else None
    reviews = reviews_of(layout, placed(given["questions"]), answers, context, False)  # type: ignore[arg-type]
    rules = JudgePrompts.read(rule)
    if expected["exception"]:  # theirs stops there, what was paid for before is lost
        name = expected["exception"]["message"].split()[-1].rstrip(".")
        with pytest.raises(UserError, match=f"no category '{name}'"):
            for review in reviews:
                rules.messages(review, layout == "llava")
        return
    for review, request in zip(reviews, expected["requests"], strict=True):
        told = rules.messages(review, layout == "llava")
        assert [message["role"] for message in told] == ["system", "user"]
        assert told[1] == request["messages"][1]
    replies = given["model_replies_in_order"]
    rows = [
        review_row(layout, n, review, reply, parse_pair_as_llava(reply))  # type: ignore[arg-type]
        for n, (review, reply) in enumerate(zip(reviews, replies, strict=False), 1)
    ]
    assert rows == expected["output_jsonl"]


@pytest.mark.parametrize("case", CASES["llavamed_prompts"], ids=lambda c: c["id"])
def test_llava_meds_layout_equals_the_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    given = case["input"]
    row = {
        "question_id": 0, "type": "conversation", "text": given["question"],
        "gpt4_answer": given["ans1"],
        **{k: given[k] for k in ("fig_label", "fig_caption", "in_text_mention")},
    }  # fmt: skip
    rule = tmp_path / "rule.yaml"
    rule.write_text("system: S\ndefault: {role: Assistant, prompt: '{INSTRUCT_PROMPT}'}\n")
    answers: Any = [(Path("a"), placed([{"question_id": 0, "text": given["ans2"]}]))]
    for version in ("v1.5", "v1.0"):
        (review,) = reviews_of("llava_med", placed([row]), answers, None, True)
        told = JudgePrompts.read(rule).messages(review)
        expected = case["expected"][version]
        assert [message["role"] for message in told] == expected["roles"]
        assert told[1]["content"] == expected["user_content_with_placeholder"]
    (ours,) = reviews_of("llava_med", placed([row]), answers, None, False)
    assert "<image>" not in ours.question
    assert "None" not in str(ours.context)
    assert "[{" not in str(ours.context)


def test_the_published_instructions_are_not_shipped() -> None:
    expected = CASES["llavamed_prompts"][0]["expected"]["v1.5"]
    _, prompt = JudgePrompts.read(None).of("default", False)
    assert hashlib.sha256(prompt.encode()).hexdigest() != expected["instruct_prompt_sha256"]
    assert prompt


# --- the program ------------------------------------------------------------------------------


def write_questions(folder: Path, count: int) -> list[str]:
    rows = [
        {"question_id": i, "text": f"What is {i:02}?\n<image>", "type": "conversation",
         "image": f"{i}.png", "gpt4_answer": "A lung.", "fig_label": "F", "fig_caption": f"c{i:02}",
         "in_text_mention": None, "domain": {"mri": True}}
        for i in range(count)
    ]  # fmt: skip
    answers = [{"question_id": i, "text": "A heart."} for i in reversed(range(count))]
    for name, lines in (("questions", rows), ("answers", answers)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return ["evaluate", "gpt-review", "--questions", str(folder / "questions.jsonl"),
            "--answers", str(folder / "answers.jsonl"),
            "--output", str(folder / "out.json")]  # fmt: skip


def judged_by(server: Server) -> list[str]:
    return ["--endpoint", server.address, "--judge", "m", "--tries", "2"]


def number_of(said: str) -> int:
    return int(said.split("What is ")[1][:2])


def test_replies_that_fail_or_cannot_be_read_are_counted_and_asked_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*write_questions(tmp_path, 6), *judged_by(server)]
    replies = {1: "I'm sorry, I cannot judge that.", 2: ""}
    server.reply = lambda said: replies.get(number_of(said), "8 4\nBecause.")
    assert cli.main(words) == 3
    printed = capsys.readouterr()
    assert "4 of 6 replies were read; 1 cannot be read, 1 questions got none" in printed.out
    assert "an empty reply; the same command asks them again" in printed.err
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["judge"] == {"model": "m", "asked": 6, "read": 4, "unread": 1, "failed": 1}
    assert found["groups"]["overall"] == {
        "gpt4_score": 8, "pred_score": 4, "pred_relative_score": 50, "data_size": 4,
    }  # fmt: skip
    assert found["groups"]["mri"]["data_size"] == 4
    text = (tmp_path / "out.json.reviews.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["question_id"] for row in rows] == list(range(6))
    assert rows[1]["gpt_eval"].startswith("I'm sorry")
    assert rows[2]["gpt_eval"] is None
    assert (rows[0]["ans1"], rows[0]["ans2"]) == ("A lung.", "A heart.")
    page = (tmp_path / "out.json.html").read_text(encoding="utf-8")
    assert "cannot be read: I&#39;m sorry" in page
    assert "the judge gave no reply: an empty reply" in page

    replies.clear()
    before = sum(server.asked.values())
    assert cli.main(words) == 0  # asks for the missing one alone
    assert sum(server.asked.values()) - before == 1
    assert cli.main([*words, "--ask_again"]) == 0
    assert sum(server.asked.values()) - before == 2
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["judge"]["read"] == 6
    # What the judge said is a file that the summary reads.
    summary = ["evaluate", "summarize", "--input", str(tmp_path / "out.json.reviews.jsonl")]
    assert cli.main([*summary, "--output", str(tmp_path / "sum.json")]) == 0
    groups = json.loads((tmp_path / "sum.json").read_text())["groups"]
    assert groups["overall"]["data_size"] == 6


def test_what_it_costs_is_said_before(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*write_questions(tmp_path, 3), *judged_by(server)]
    assert cli.main([*words, "--dry_run"]) == 0
    assert "3 to ask, about" in capsys.readouterr().out
    prices = ["--price_in", "10", "--price_out", "1000"]
    assert cli.main([*words, *prices, "--max_cost", "1"]) == 2
    assert "up to about 3.08, --max_cost is 1" in capsys.readouterr().err
    assert cli.main([*words, "--max_cost", "1"]) == 2
    assert "--max_cost needs --price_in" in capsys.readouterr().err
    for flags in (["--judge_max_tokens", "-5"], ["--price_in", "-1", "--price_out", "1"]):
        assert cli.main([*words, *flags]) == 2
    assert not server.asked
    assert not (tmp_path / "out.json").exists()


def test_a_judge_or_a_model_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = write_questions(tmp_path, 2)
    for more, said in (
        ([], "name a judge"),
        (["--judge", "m"], "needs both --endpoint and --judge"),
        (["--similarity_model", "nowhere"], "no such folder of a model"),
    ):
        assert cli.main([*words, *more]) == 2
        assert said in capsys.readouterr().err


QUESTION = {"question_id": 0, "text": "a", "fig_label": "F", "fig_caption": "c"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": '{"question_id": 0, "text": "a"}\n'}, "no answer to question 1"),
        ({"answers": '{"question_id": 0, "text": 5}\n'}, "its text is 5, expected text"),
        ({"answers": '{"question_id": 0, "text": "a"}\n' * 2}, "a second answer to question 0"),
        ({"questions": '{"question_id": 0, "text": "a"}\n'}, "'fig_label' is missing"),
        ({"questions": ""}, "no questions to review"),
        (
            {"answers": "".join(f'{{"question_id": {i}, "text": "a"}}\n' for i in range(3))},
            "1 answers to no question, the first is 2",
        ),
        ({"answers": '{"question_id": 0, "text": "\\ud83d"}\n'}, "half of a character"),
        (
            {"questions": json.dumps(QUESTION | {"fig_caption": None})},
            "fig_caption is None, expected",
        ),
        ({"questions": json.dumps(QUESTION | {"in_text_mention": "x"})}, "in_text_mention is 'x'"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_a_judge_is_asked(
    change: dict[str, str], said: str, server: Server, tmp_path: Path, capsys: Any
) -> None:
    words = [*write_questions(tmp_path, 2), *judged_by(server)]
    for name, text in change.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err
    assert not server.asked


# --- ScienceQA's judge ------------------------------------------------------------------------


def test_a_judge_settles_what_two_files_answer_differently(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(i) for i in range(6)]
    problems = {
        name: {"question": f"Q{name}?", "choices": ["x", "y", "z"], "answer": 1, "hint": "",
               "lecture": "", "solution": ""}
        for name in names
    }  # fmt: skip
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": names}))
    first = [{"question_id": n, "prompt": "", "text": "B"} for n in names]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first))
    others = {n: "The answer is C." if int(n) > 2 else "The answer is B." for n in names}
    (tmp_path / "b.json").write_text(json.dumps({"outputs": others}))
    said = {
        "3": "The first says the answer is B. No.\nThe answer is C.",
        "4": "The answer is B.",
        "5": "I will not say.",
    }
    server.reply = lambda asked: said[asked.split("?")[0][-1]]
    words = ["evaluate", "science-qa-judge", "--base_dir", tmp_path, "--pred", tmp_path / "a.jsonl"]
    words += ["--other", tmp_path / "b.json", "--output", tmp_path / "o.json", *judged_by(server)]
    words += ["--output_result", tmp_path / "r.json"]
    assert cli.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "3 of 6 problems were answered differently. 2 of 3 replies were read" in printed
    assert "Before: 100.00 and 50.00 percent." in printed
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["correct"] == 5  # the judge was wrong once; where it said nothing, the first's
    assert result["results"]["3"] == 2
    asked = next(text for text in server.asked if "Q3?" in text)
    assert "Options: (A) x (B) y (C) z" in asked
    assert "Second student: The answer is C." in asked
    (tmp_path / "a.jsonl").write_text(json.dumps(first[0]) + "\n")
    assert cli.main([str(word) for word in words]) == 2
    assert "5 problems have no answer, the first is 1" in capsys.readouterr().err


def test_a_reply_that_is_cut_is_paid_for_once(server: Server, tmp_path: Path) -> None:
    words = [*write_questions(tmp_path, 1), *judged_by(server)]
    server.reply = lambda said: "8 4\nand so on"
    server.always = "length"
    assert cli.main(words) == 0
    assert cli.main(words) == 0
    assert sum(server.asked.values()) == 1


def test_reviews_without_a_score_are_summed_up_as_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "r.jsonl", tmp_path / "o.json"
    rows = [{"gpt_eval": None, "type": "overall"}, {"gpt_eval": "8 4", "type": "overall"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "summarize", "--input", str(path), "--output", str(output)]
    assert cli.main(words) == 0
    found = json.loads(output.read_text())
    assert found["groups"]["overall"]["data_size"] == 1
    assert "no reply" in found["replies without two scores"][0]
    lines = [{"category": "c", "content": "8 4", "tuple": [8, 4]},
             {"category": "c", "content": "?", "tuple": None}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert cli.main(words) == 0
    assert json.loads(output.read_text())["groups"]["c"]["data_size"] == 1
    assert cli.main([*words, "--compat", "llava"]) == 0
    assert json.loads(output.read_text())["without scores"] == 1
    for text, said in (("", "no reviews"), ('{"tuple": ["8", 9]}\n', "without a pair of scores")):
        path.write_text(text)
        assert cli.main([*words, "--compat", "llava"]) == 2
        assert said in capsys.readouterr().err
    path.write_text('{"gpt_eval": "0 4"}\n')
    assert cli.main(words) == 0
    assert json.loads(output.read_text())["groups"]["overall"]["pred_relative_score"] is None


def test_a_judges_prompts_have_their_places(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    for text, said in (("system: a\nopen: b", "open is no text with {question}, {answer}"),
                       ("system: a\nopen: null", "open is no text"),
                       ("system: a", "expected system, open")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_prompts(path, system=(), open=("question", "answer"))
    assert filled("{a} {b} {c}", {"a": "{b}", "b": "x"}) == "{b} x {c}"
