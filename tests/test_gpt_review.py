"""Reviews by a judge: recorded requests and files, failed and unparsed replies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import golden
from model_server import Server

from medley import cli
from medley.commands.evaluate.gpt_review import ReviewOptions
from medley.errors import UserError
from medley.evaluation.judge import fill_template, read_templates
from medley.evaluation.judge_prompts import JudgePrompts, build_items, format_review
from medley.evaluation.judge_scores import parse_pair_as_llava
from medley.utils.cli_options import parse

CASES = golden("gpt_review_parse.json")
LAYOUTS = {
    "eval_gpt_review": "llava",
    "eval_gpt_review_visual": "llava_visual",
    "eval_gpt_review_bench": "llava_bench",
}


def with_locations(rows: list[dict[str, Any]] | None) -> Any:
    return None if rows is None else [(f"row {i}", row) for i, row in enumerate(rows)]


@pytest.mark.parametrize("case", CASES["review_scripts"], ids=lambda c: c["id"])
def test_requests_and_review_rows_match_recorded_cases(
    case: dict[str, Any], tmp_path: Path
) -> None:
    given, expected, layout = case["input"], case["expected"], LAYOUTS[case["script"]]
    rule = tmp_path / "rule.json"
    rule.write_text(json.dumps(given["rule"]))
    answers: Any = [(Path(k), with_locations(given[k])) for k in ("answers_1", "answers_2")]
    context = with_locations(given["context"]) if layout != "llava" else None
    items = build_items(layout, with_locations(given["questions"]), answers, context, False)  # type: ignore[arg-type]
    prompts = JudgePrompts.read(rule)
    if expected["exception"]:  # The published code crashes and loses the paid replies.
        name = expected["exception"]["message"].split()[-1].rstrip(".")
        with pytest.raises(UserError, match=f"lack the category '{name}'"):
            for item in items:
                prompts.messages(item, layout == "llava")
        return
    for item, request in zip(items, expected["requests"], strict=True):
        messages = prompts.messages(item, layout == "llava")
        assert [message["role"] for message in messages] == ["system", "user"]
        assert messages[1] == request["messages"][1]
    replies = given["model_replies_in_order"]
    rows = [
        format_review(layout, n, item, reply, parse_pair_as_llava(reply))  # type: ignore[arg-type]
        for n, (item, reply) in enumerate(zip(items, replies, strict=False), 1)
    ]
    assert rows == expected["output_jsonl"]


@pytest.mark.parametrize("case", CASES["llavamed_prompts"], ids=lambda c: c["id"])
def test_llava_med_layout_matches_recorded_cases(case: dict[str, Any], tmp_path: Path) -> None:
    given = case["input"]
    row = {
        "question_id": 0, "type": "conversation", "text": given["question"],
        "gpt4_answer": given["ans1"],
        **{k: given[k] for k in ("fig_label", "fig_caption", "in_text_mention")},
    }  # fmt: skip
    rule = tmp_path / "rule.yaml"
    rule.write_text("system: S\ndefault: {role: Assistant, prompt: '{INSTRUCT_PROMPT}'}\n")
    answers: Any = [(Path("a"), with_locations([{"question_id": 0, "text": given["ans2"]}]))]
    for version in ("v1.5", "v1.0"):
        (item,) = build_items("llava_med", with_locations([row]), answers, None, True)
        messages = JudgePrompts.read(rule).messages(item)
        expected = case["expected"][version]
        assert [message["role"] for message in messages] == expected["roles"]
        assert messages[1]["content"] == expected["user_content_with_placeholder"]
    (ours,) = build_items("llava_med", with_locations([row]), answers, None, False)
    assert "<image>" not in ours.question
    assert "None" not in str(ours.context)
    assert "[{" not in str(ours.context)


def test_published_prompts_are_not_shipped() -> None:
    expected = CASES["llavamed_prompts"][0]["expected"]["v1.5"]
    _, prompt = JudgePrompts.read(None).for_category("default", False)
    assert hashlib.sha256(prompt.encode()).hexdigest() != expected["instruct_prompt_sha256"]
    assert prompt


# --- command ----------------------------------------------------------------------------------


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


def judge_flags(server: Server) -> list[str]:
    return ["--endpoint", server.address, "--judge", "m", "--max_retries", "1"]


def question_number(message: str) -> int:
    return int(message.split("What is ")[1][:2])


def test_failed_and_unparsed_replies_are_counted_and_repeated(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*write_questions(tmp_path, 6), *judge_flags(server)]
    replies = {1: "I'm sorry, I cannot judge that.", 2: ""}
    server.reply = lambda message: replies.get(question_number(message), "8 4\nBecause.")
    assert cli.main(command) == 3
    printed = capsys.readouterr()
    assert (
        "4 of 6 replies of the judge were parsed; 1 could not be parsed, 1 requests failed"
        in printed.out
    )
    assert "First failure: The reply is empty." in printed.err
    scores = json.loads((tmp_path / "out.json").read_text())
    assert scores["judge"] == {
        "model": "m", "requests": 6, "parsed": 4, "unparsed": 1, "failed": 1,
    }  # fmt: skip
    assert scores["groups"]["overall"] == {
        "gpt4_score": 8, "pred_score": 4, "pred_relative_score": 50, "data_size": 4,
    }  # fmt: skip
    assert scores["groups"]["mri"]["data_size"] == 4
    text = (tmp_path / "out.json.reviews.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["question_id"] for row in rows] == list(range(6))
    assert rows[1]["gpt_eval"].startswith("I'm sorry")
    assert rows[2]["gpt_eval"] is None
    assert (rows[0]["ans1"], rows[0]["ans2"]) == ("A lung.", "A heart.")
    html = (tmp_path / "out.json.html").read_text(encoding="utf-8")
    assert "cannot be parsed: I&#39;m sorry" in html
    assert "The judge gave no reply: The reply is empty." in html

    replies.clear()
    before = sum(server.requests.values())
    assert cli.main(command) == 0  # only the failed request is repeated
    assert sum(server.requests.values()) - before == 1
    assert cli.main([*command, "--ask_again"]) == 0
    assert sum(server.requests.values()) - before == 2
    scores = json.loads((tmp_path / "out.json").read_text())
    assert scores["judge"]["parsed"] == 6
    # `summarize` reads the file of reviews.
    summary = ["evaluate", "summarize", "--input", str(tmp_path / "out.json.reviews.jsonl")]
    assert cli.main([*summary, "--output", str(tmp_path / "sum.json")]) == 0
    groups = json.loads((tmp_path / "sum.json").read_text())["groups"]
    assert groups["overall"]["data_size"] == 6


def test_cost_is_estimated_and_limited(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*write_questions(tmp_path, 3), *judge_flags(server)]
    assert cli.main([*command, "--dry_run"]) == 0
    assert "3 requests with about" in capsys.readouterr().out
    prices = ["--input_price", "10", "--output_price", "1000"]
    assert cli.main([*command, *prices, "--max_cost", "1"]) == 2
    assert (
        "--max_cost 1.0: The estimated cost is higher (up to about 3.08" in capsys.readouterr().err
    )
    assert cli.main([*command, "--max_cost", "1"]) == 2
    assert "--max_cost needs --input_price" in capsys.readouterr().err
    for flags in (["--judge_max_tokens", "-5"], ["--input_price", "-1", "--output_price", "1"]):
        assert cli.main([*command, *flags]) == 2
    assert not server.requests
    assert not (tmp_path / "out.json").exists()


def test_judge_or_sentence_model_is_required(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = write_questions(tmp_path, 2)
    for more, error in (
        ([], "Set a judge"),
        (["--judge", "m"], "needs both --endpoint and --judge"),
        (["--sentence_model", "nowhere"], "Model folder not found"),
    ):
        assert cli.main([*command, *more]) == 2
        assert error in capsys.readouterr().err


def test_deprecated_flags_are_converted() -> None:
    command = ["--questions", "q", "--answers", "a", "--output", "o", "--rule", "r"]
    command += ["--endpoint", "http://x/v1", "--judge", "m", "--price_in", "1", "--tries", "2"]
    options = parse(ReviewOptions, "test", command)
    assert options.judge_prompts == Path("r")
    assert options.input_price == 1
    assert options.max_retries == 1


QUESTION = {"question_id": 0, "text": "a", "fig_label": "F", "fig_caption": "c"}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"answers": '{"question_id": 0, "text": "a"}\n'}, "Question 1 ("),
        ({"answers": '{"question_id": 0, "text": 5}\n'}, "text must be a string (got 5)"),
        ({"answers": '{"question_id": 0, "text": "a"}\n' * 2}, "Duplicate answer to question 0"),
        ({"questions": '{"question_id": 0, "text": "a"}\n'}, "'fig_label' is missing"),
        ({"questions": ""}, "contains no questions"),
        (
            {"answers": "".join(f'{{"question_id": {i}, "text": "a"}}\n' for i in range(3))},
            "1 answers belong to no question; the first is to 2",
        ),
        ({"answers": '{"question_id": 0, "text": "\\ud83d"}\n'}, "unpaired surrogate"),
        (
            {"questions": json.dumps(QUESTION | {"fig_caption": None})},
            "fig_caption must be a string (got None)",
        ),
        (
            {"questions": json.dumps(QUESTION | {"in_text_mention": "x"})},
            "in_text_mention must be a list of strings (got 'x')",
        ),
    ],
)
def test_inconsistent_files_are_rejected_before_any_request(
    change: dict[str, str], error: str, server: Server, tmp_path: Path, capsys: Any
) -> None:
    command = [*write_questions(tmp_path, 2), *judge_flags(server)]
    for name, text in change.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert cli.main(command) == 2
    assert error in capsys.readouterr().err
    assert not server.requests


# --- ScienceQA's judge ------------------------------------------------------------------------


def test_judge_decides_where_two_answer_files_differ(
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
    replies = {
        "3": "The first says the answer is B. No.\nThe answer is C.",
        "4": "The answer is B.",
        "5": "I will not say.",
    }
    server.reply = lambda message: replies[message.split("?")[0][-1]]
    command = ["evaluate", "science-qa-judge", "--base_dir", tmp_path]
    command += ["--pred", tmp_path / "a.jsonl"]
    command += [
        "--other",
        tmp_path / "b.json",
        "--output",
        tmp_path / "o.json",
        *judge_flags(server),
    ]
    command += ["--output_result", tmp_path / "r.json"]
    assert cli.main([*map(str, command)]) == 0
    printed = capsys.readouterr().out
    assert "answers to 3 of 6 problems differ. 2 of 3 replies of the judge were parsed" in printed
    assert "Accuracy before: 100.00 and 50.00 percent." in printed
    result = json.loads((tmp_path / "r.json").read_text())
    # The judge was wrong once. Where its reply has no letter, the first answer counts.
    assert result["correct"] == 5
    assert result["results"]["3"] == 2
    request = next(text for text in server.requests if "Q3?" in text)
    assert "Options: (A) x (B) y (C) z" in request
    assert "Second student: The answer is C." in request
    (tmp_path / "a.jsonl").write_text(json.dumps(first[0]) + "\n")
    assert cli.main([*map(str, command)]) == 2
    assert "5 problems have no answer; the first is 1" in capsys.readouterr().err


def test_truncated_reply_is_cached(server: Server, tmp_path: Path) -> None:
    command = [*write_questions(tmp_path, 1), *judge_flags(server)]
    server.reply = lambda message: "8 4\nand so on"
    server.default_fault = "length"
    assert cli.main(command) == 0
    assert cli.main(command) == 0
    assert sum(server.requests.values()) == 1


def test_reviews_without_scores_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "r.jsonl", tmp_path / "o.json"
    rows = [{"gpt_eval": None, "type": "overall"}, {"gpt_eval": "8 4", "type": "overall"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "summarize", "--input", str(path), "--output", str(output)]
    assert cli.main(command) == 0
    scores = json.loads(output.read_text())
    assert scores["groups"]["overall"]["data_size"] == 1
    assert "no reply" in scores["replies without two scores"][0]
    lines = [{"category": "c", "content": "8 4", "tuple": [8, 4]},
             {"category": "c", "content": "?", "tuple": None}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert cli.main(command) == 0
    assert json.loads(output.read_text())["groups"]["c"]["data_size"] == 1
    assert cli.main([*command, "--compat", "llava"]) == 0
    assert json.loads(output.read_text())["without scores"] == 1
    for text, error in (
        ("", "contains no reviews"),
        ('{"tuple": ["8", 9]}\n', "has no pair of scores"),
    ):
        path.write_text(text)
        assert cli.main([*command, "--compat", "llava"]) == 2
        assert error in capsys.readouterr().err
    path.write_text('{"gpt_eval": "0 4"}\n')
    assert cli.main(command) == 0
    assert json.loads(output.read_text())["groups"]["overall"]["pred_relative_score"] is None


def test_templates_must_have_their_placeholders(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    for text, error in (("system: a\nopen: b", "open lacks the placeholders {question}, {answer}"),
                       ("system: a\nopen: null", "open must be a string"),
                       ("system: a", "Expected the keys system, open")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=error):
            read_templates(path, system=(), open=("question", "answer"))
    assert fill_template("{a} {b} {c}", {"a": "{b}", "b": "x"}) == "{b} x {c}"
