"""The two ends of `make demo`: its prompts, and its page with what is right and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversion import draw_phantoms
from training import pipeline_report

from medley.phantoms import MODALITIES, NEW_MODALITY, Finding, Phantom, facts_in
from medley.utils.jsonl import json_lines


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in json_lines(path)]


def answer(folder: Path, number: int, *parts: str | Phantom) -> dict[str, Any]:
    """A line of responses.jsonl; scans are drawn to files beside it."""
    told: list[dict[str, str]] = []
    for place, part in enumerate(parts):
        if isinstance(part, str):
            told.append({"type": "text", "text": part})
        else:
            part.image(64).save(folder / f"{number}_{place}.png")
            told.append({"type": "image", "file": f"{number}_{place}.png"})
    return {"index": number, "parts": told}


def write_answers(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    words = [f"--output={tmp_path / 'data'}", "--known_share=0.5", "--train=6", "--test=4"]
    assert draw_phantoms.main(words) == 0
    return tmp_path / "data"


def test_the_page_says_what_is_right_and_what_is_not(data: Path, tmp_path: Path) -> None:
    assert pipeline_report.main(["prompts", f"--data={data}", f"--output={tmp_path}"]) == 0
    prompts = {
        mode: rows_of(tmp_path / f"prompts-{mode}.jsonl") for mode in ("image", "text", "any")
    }
    asked = [facts_in(row["text"]) for row in prompts["image"]]
    assert sum(f"modality {NEW_MODALITY}" in own for own in asked) == 2
    assert all(len(own) == 2 + 3 for own in asked)
    assert len(prompts["text"]) == pipeline_report.SHOWN
    for mode in prompts:
        (tmp_path / f"answers-{mode}").mkdir()

    large = Finding("nodule", "large", "left", "upper")
    drawn = Phantom(NEW_MODALITY, "head", (large,), 5)
    folder = tmp_path / "answers-image"
    write_answers(folder, [answer(folder, number, drawn) for number in range(len(asked))])
    folder = tmp_path / "answers-any"
    write_answers(folder, [answer(folder, 0, "Seen:", drawn), answer(folder, 1, "Seen: <nothing>")])
    golds = [one.gold for one in pipeline_report.picked(
        list(pipeline_report.questions(data)), pipeline_report.SHOWN)]  # fmt: skip
    said = [*golds[:-2], golds[-2].upper(), "something <else>"]
    folder = tmp_path / "answers-text"
    write_answers(folder, [answer(folder, number, text) for number, text in enumerate(said)])

    (tmp_path / "commands.txt").write_text("make <demo>\n")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "text_loss": 2.0}, {"step": 2, "text_loss": 1.0}]})
    )
    words = [f"--data={data}", f"--output={tmp_path}", "--before=tiny", "--after=tiny"]
    assert pipeline_report.main(["page", *words]) == 0

    page = (tmp_path / "index.html").read_text()
    assert page.count("&#10003;") == 1 + 1 + (len(golds) - 1)  # case does not count
    shown = "an MR-CT scan of the head with a large marked nodule in the upper left"
    assert page.count(f"&#10007; (measured: {shown})") == 3
    assert f"<b>something &lt;else&gt;</b> &#10007; (right: {golds[-1]})" in page
    assert "make &lt;demo&gt;" in page
    assert f"scans of this modality ({NEW_MODALITY}) each kind of finding looks as another" in page

    wrong = page.partition("Wrong answers among them")[2].partition("<h2>")[0]
    assert wrong.count("<figure><img ") == wrong.count("&#10007; (right: ") == pipeline_report.SHOWN

    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["before"] == scores["after"]
    tested = rows_of(data / "test.jsonl")
    assert sum(own["n"] for own in scores["after"].values()) == len(tested)
    known = sum(row["modality"] in MODALITIES for row in tested)
    own = [scores["after"][f"{kind}, modalities known before"] for kind in ("closed", "open")]
    assert sum(one["n"] for one in own) == known > 0
    assert sum(one["right"] for one in own) > 0.9 * known  # tiny knows them


def test_a_folder_without_questions_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.jsonl").write_text("")
    words = [f"--data={tmp_path}", f"--output={tmp_path}", "--before=tiny", "--after=tiny"]
    assert pipeline_report.main(["page", *words]) == 2
    assert "no questions in it" in capsys.readouterr().err
    assert pipeline_report.main(["pages"]) == 2
