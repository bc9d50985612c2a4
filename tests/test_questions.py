"""Question files: LLaVA's formats, documents, and what is rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_inputs import write_rows

from medley import cli
from medley.datasets.base import ConversionConfig
from medley.errors import UserError
from medley.evaluation.questions import read_questions


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1, "text": "a", "image": [3]}, "An image path is invalid (got int 3)"),
        ({"question_id": 1, "text": "a", "image": "../p.png"}, "outside"),
        ({"question_id": 1.5, "text": "a"}, "question_id must be a string or a number (got 1.5)"),
        (
            {"id": 1, "conversations": [{"from": "human", "value": "a"}] * 2},
            "Turn 1 must be from gpt (got 'human')",
        ),
        ("", "contains no questions"),
    ],
)
def test_invalid_questions_are_rejected_before_the_model_is_loaded(
    row: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "q.jsonl", [row] if row else [])
    words = ["answer", "--ckpt", "tiny", "--questions", path, "--output", tmp_path / "out.jsonl"]
    assert cli.main([*map(str, words), "--image_folder", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "memory:" not in captured.out


def test_invalid_question_is_reported_with_its_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"question_id": 1, "text": "a"}, {"question_id": 2}])
    with pytest.raises(UserError, match=r"q\.jsonl:2: Expected question_id and text"):
        read_questions(path, "llava", ConversionConfig(path))


def test_llava_lists_are_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    row = {"id": 3, "image": "a.png", "conversations": [{"from": "human", "value": "b\n<image>"}]}
    path.write_text(json.dumps([row]))
    (question,) = read_questions(path, "llava", ConversionConfig(path))
    assert (question.identifier, question.text, question.image) == (3, "b", "a.png")


def test_documents_with_one_question_are_questions(tmp_path: Path) -> None:
    turns = [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]
    path = write_rows(tmp_path / "docs.jsonl", [{"messages": turns}])
    with pytest.raises(UserError, match=r"docs\.jsonl:1: .*got 4 turns"):
        read_questions(path, "documents", ConversionConfig(path))
    write_rows(path, [{"messages": turns[:2]}])
    (question,) = read_questions(path, "documents", ConversionConfig(path))
    assert (question.identifier, question.gold, question.kind) == (0, "a", None)
