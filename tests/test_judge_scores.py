"""Scores in a judge's replies, parsed and summarized as published and our own way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import golden

from medley import cli
from medley.errors import UserError
from medley.evaluation.judge_scores import (
    Summary,
    llava_table,
    parse_pair,
    parse_pair_as_llava,
    parse_pair_as_llava_med,
    summarize_groups,
)

CASES = golden("gpt_review_parse.json")


@pytest.mark.parametrize("case", CASES["parse_score"], ids=lambda c: c["id"])
def test_llava_parser_matches_recorded_cases(case: dict[str, Any]) -> None:
    expected = [float(str(value).replace("Infinity", "inf")) for value in case["expected"]]
    assert parse_pair_as_llava(case["input"]) == expected


@pytest.mark.parametrize("case", CASES["llava_summarize"], ids=lambda c: c["id"])
def test_llava_table_matches_recorded_cases(case: dict[str, Any]) -> None:
    names = {f: f.removesuffix(".jsonl").removeprefix("gpt4_text_") for f in case["input"]["files"]}
    printed = case["expected"]["stdout"].split("=================================\n")
    tables = {text.splitlines()[0]: text.splitlines()[1:] for text in printed if text}
    checked = 0
    for file, rows in case["input"]["files"].items():
        if names[file] not in tables:
            continue
        checked += 1
        if tables[names[file]]:
            assert llava_table(rows) == tables[names[file]]
        else:
            assert case["expected"]["error"]
            with pytest.raises(UserError, match="mean score is 0"):
                llava_table(rows)
    assert checked == len(tables)


@pytest.mark.parametrize("version", ["v1.5_summarize_gpt_review", "v1.0_ChatEvaluation.eval"])
@pytest.mark.parametrize("case", CASES["llavamed_summarize"], ids=lambda c: c["id"])
def test_llava_med_summary_matches_recorded_cases(case: dict[str, Any], version: str) -> None:
    expected = case["expected"][version]["groups_in_order"]
    rows = case["input"]["rows"]

    def summarize() -> list[Any]:
        pairs = [(row, parse_pair_as_llava_med(row["gpt_eval"])) for row in rows]
        groups = summarize_groups(pairs, "overall" if version.startswith("v1.5") else "all")
        return [
            [name, {"gpt4_score": s.reference, "pred_score": s.model,
                    "pred_relative_score": s.relative, "data_size": s.n}]
            for name, s in groups.items()
        ]  # fmt: skip

    if expected is not None:
        ours = summarize()
        assert [name for name, _ in ours] == [name for name, _ in expected]
        for (_, one), (_, other) in zip(ours, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-9)
    elif case["id"] == "zero_reference":  # The published code divides by zero.
        assert math.isnan(summarize()[0][1]["pred_relative_score"])
    elif case["id"] == "missing_domain_key":
        assert summarize()
    else:
        with pytest.raises(UserError, match="must begin with two scores"):
            summarize()


@pytest.mark.parametrize(
    ("reply", "pair"),
    [
        ("8 9\nBoth.", (8, 9)), ("8, 9", (8, 9)), ("\n 8  9.5 ", (8, 9.5)), ("(8, 9)", (8, 9)),
        ("8/10 9/10", (8, 9)), ("**8 9**", (8, 9)), ("Assistant 1: 8, Assistant 2: 9", (8, 9)),
        ("Assistant 1: 8/10\n\nAssistant 2: 9/10\nOk", (8, 9)), ("8 9.", (8, 9)), ("-1 8", None),
        ("Here are the scores:\n8 9", (8, 9)), ("```\n8 9\n```", (8, 9)),
        ("Scores: 8 and 9", (8, 9)),
        ("Assistant 1: 8/10", None), ("Answer 1 deserves 9", None), ("8 of 2 points", None),
        ("8", None), ("8 9 10", None), ("8 nine", None), ("80 90", None), ("", None),
    ],
)  # fmt: skip
def test_two_scores_are_parsed_from_a_reply(reply: str, pair: Any) -> None:
    assert parse_pair(reply) == pair


def test_summary_needs_scores_and_skips_zero_references() -> None:
    with pytest.raises(UserError, match="has no scores"):
        Summary.from_pairs([])
    summary = Summary.from_pairs([(0.0, 5.0), (8.0, 4.0)])
    assert summary.relative == 50


def test_summarize_counts_unparsed_replies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "reviews.jsonl", tmp_path / "out.json"
    rows = [{"type": "conversation", "domain": {"mri": True}, "gpt_eval": reply}
            for reply in ("8 4\nx", "I will not judge.", "10, 5")]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "summarize", "--input", str(path), "--output", str(output)]
    assert cli.main(command) == 0
    assert "1 replies do not contain two scores" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["groups"]["overall"]["data_size"] == 2
    assert result["groups"]["mri"]["pred_relative_score"] == 50
    assert cli.main([*command, "--compat", "llava_med"]) == 2
    path.write_text('{"category": "conv", "tuple": [8.0, 9.0]}\n')
    assert cli.main([*command, "--compat", "llava"]) == 0
    assert "all 112.5 80.0 90.0" in capsys.readouterr().out


def test_summarize_reads_scores_of_llava_reviews(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaVA's own review files have the reply in `text`, and its scores in `score` or `tuple`."""
    path, output = tmp_path / "reviews.jsonl", tmp_path / "out.json"
    command = ["evaluate", "summarize", "--input", str(path), "--output", str(output)]
    rows = [
        {"question_id": 1, "category": "conv", "text": "8 4\nGood.", "score": [8.0, 4.0]},
        {"question_id": 2, "category": "detail", "text": "10, 5", "tuple": [10, 5]},
        {"question_id": 3, "category": "conv", "text": "I will not judge.", "score": [-1, -1]},
        {"question_id": 4, "category": "conv", "text": "", "score": None},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(command) == 0
    assert "2 replies do not contain two scores" in capsys.readouterr().out
    groups = json.loads(output.read_text())["groups"]
    assert groups["overall"] == {"gpt4_score": 9.0, "pred_score": 4.5,
                                 "pred_relative_score": 50.0, "data_size": 2}  # fmt: skip
    assert (groups["conv"]["data_size"], groups["detail"]["data_size"]) == (1, 1)
    assert cli.main([*command, "--compat", "llava_med"]) == 2
    capsys.readouterr()
    for score in ([8], [8, "9"], [8, 90], [True, 1], "8 9", [float("nan"), 1]):
        path.write_text(json.dumps({"text": "8 9", "score": score}) + "\n")
        assert cli.main(command) == 2
        assert "expected two numbers from 0 to 10" in capsys.readouterr().err
    path.write_text('{"text": "8 9"}\n')
    assert cli.main(command) == 2
    assert "content, or scores in tuple or score" in capsys.readouterr().err
