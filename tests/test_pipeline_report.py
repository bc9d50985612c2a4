"""The prompts and the HTML report of `make demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversion import draw_phantoms
from training import pipeline_report
from training.demo.questions import EXAMPLES, read_questions, sample_evenly

from medley.phantoms import MODALITIES, NEW_MODALITY, Finding, Phantom, facts_in
from medley.utils.jsonl import json_lines


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in json_lines(path)]


def response(folder: Path, number: int, *parts: str | Phantom) -> dict[str, Any]:
    """A row of responses.jsonl; scans are rendered to files next to it."""
    row_parts: list[dict[str, str]] = []
    for index, part in enumerate(parts):
        if isinstance(part, str):
            row_parts.append({"type": "text", "text": part})
        else:
            part.image(64).save(folder / f"{number}_{index}.png")
            row_parts.append({"type": "image", "file": f"{number}_{index}.png"})
    return {"index": number, "parts": row_parts}


def write_responses(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    words = [f"--output={tmp_path / 'data'}", "--known_fraction=0.5", "--train=6", "--test=4"]
    assert draw_phantoms.main(words) == 0
    return tmp_path / "data"


def test_report_marks_correct_and_wrong_responses(data: Path, tmp_path: Path) -> None:
    assert pipeline_report.main(["prompts", f"--data={data}", f"--output={tmp_path}"]) == 0
    prompts = {
        mode: rows_of(tmp_path / f"prompts-{mode}.jsonl") for mode in ("image", "text", "any")
    }
    requested = [facts_in(row["text"]) for row in prompts["image"]]
    assert sum(f"modality {NEW_MODALITY}" in own for own in requested) == 2
    assert all(len(own) == 2 + 3 for own in requested)
    assert len(prompts["text"]) == EXAMPLES
    for mode in prompts:
        (tmp_path / f"answers-{mode}").mkdir()

    large = Finding("nodule", "large", "left", "upper")
    scan = Phantom(NEW_MODALITY, "head", (large,), 5)
    folder = tmp_path / "answers-image"
    write_responses(folder, [response(folder, number, scan) for number in range(len(requested))])
    folder = tmp_path / "answers-any"
    write_responses(
        folder, [response(folder, 0, "Seen:", scan), response(folder, 1, "Seen: <nothing>")]
    )
    golds = [q.gold for q in sample_evenly(list(read_questions(data)), EXAMPLES)]
    answers = [*golds[:-2], golds[-2].upper(), "something <else>"]
    folder = tmp_path / "answers-text"
    write_responses(folder, [response(folder, number, text) for number, text in enumerate(answers)])

    (tmp_path / "commands.txt").write_text("make <demo>\n")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "text_loss": 2.0}, {"step": 2, "text_loss": 1.0}]})
    )
    words = [f"--data={data}", f"--output={tmp_path}", "--before=tiny", "--after=tiny"]
    assert pipeline_report.main(["report", *words]) == 0

    page = (tmp_path / "index.html").read_text()
    assert page.count("✓") == 1 + 1 + (len(golds) - 1)  # case-insensitive
    measured = "an MR-CT scan of the head with a large marked nodule in the upper left"
    assert page.count(f"✗ measured: {measured}") == 3
    assert "<p>something &lt;else&gt;</p>" in page
    assert f"✗ correct answer: {golds[-1]}" in page
    assert "make &lt;demo&gt;" in page
    assert f"In {NEW_MODALITY}, each kind of finding looks like another kind" in page

    wrong = page.partition("Wrong answers after training")[2].partition("<h2>")[0]
    assert wrong.count("<img ") == wrong.count("✗ correct answer: ") == EXAMPLES

    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["before"] == scores["after"]
    test_rows = rows_of(data / "test.jsonl")
    assert sum(own["n"] for own in scores["after"].values()) == len(test_rows)
    known = sum(row["modality"] in MODALITIES for row in test_rows)
    own = [scores["after"][f"{kind}, known modalities"] for kind in ("closed", "open")]
    assert sum(group["n"] for group in own) == known > 0
    assert sum(group["correct"] for group in own) > 0.9 * known  # tiny was trained on them


def test_folder_without_questions_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.jsonl").write_text("")
    words = [f"--data={tmp_path}", f"--output={tmp_path}", "--before=tiny", "--after=tiny"]
    assert pipeline_report.main(["report", *words]) == 2
    assert "contains no questions" in capsys.readouterr().err
    assert pipeline_report.main(["page"]) == 2
