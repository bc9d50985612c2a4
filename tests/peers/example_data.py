"""The example data of Anole, Chameleon, LLaVA and LLaMA-Factory. Not collected by `make test`.

Each file is converted as its users would, and what is written and what is refused is counted.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from sources import parts_folder

from medley.checkpoints.checkpoint import open_checkpoint
from medley.cli import main
from medley.data.document import Document, Turn
from medley.evaluation.science_qa import parse_letter

DATA = Path(os.environ["MEDLEY_PEERS"])
FACTORY = parts_folder("LLaMA-Factory", DATA) / "data"
TABLES = parts_folder("LLaVA", DATA) / "llava" / "eval" / "table"
LETTERS = "ABCDE"


def convert(
    source: str, path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[list[Document], list[str]]:
    """The documents that `convert` writes, and its message for each bad record."""
    words = ["convert", "--from", source, "--input", path, "--output", output]
    words += ["--on_error", "skip", "--validate_images", "none", "--max_errors", 100_000]
    status = main([str(word) for word in words])
    printed = re.split(r"[\r\n]+", capsys.readouterr().err)
    bad = [line for line in printed if re.match(rf"{re.escape(str(path))}:( record )?\d+: ", line)]
    assert status == (0 if output.is_file() else 2)
    rows = read_rows(output) if output.is_file() else []
    return [Document.from_json(row) for row in rows], bad


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


# File -> number of documents, of their images, of bad records, and the reason for all of these.
LLAMA_FACTORY: dict[str, tuple[int, int, int, str]] = {
    "identity.json": (91, 0, 0, ""),
    "alpaca_en_demo.json": (999, 0, 0, ""),
    "alpaca_zh_demo.json": (1000, 0, 0, ""),
    "mllm_demo.json": (6, 8, 0, ""),
    "c4_demo.jsonl": (300, 0, 0, ""),
    "wiki_demo.txt": (0, 0, 30, "Invalid JSON"),
    "kto_en_demo.json": (150, 0, 150, "undesired"),
    "dpo_en_demo.json": (0, 0, 0, "ranks answers"),
    "dpo_zh_demo.json": (0, 0, 0, "ranks answers"),
    "glaive_toolcall_en_demo.json": (109, 0, 191, "tools"),
    "glaive_toolcall_zh_demo.json": (100, 0, 200, "tools"),
    "reason_tool_use_demo_50.jsonl": (0, 0, 50, r"tools|'content' is not a string"),
    "mllm_video_demo.json": (0, 0, 3, "video"),
    "mllm_audio_demo.json": (0, 0, 3, "audio"),
    "mllm_video_audio_demo.json": (0, 0, 3, "video"),
    "v1_dpo_demo.jsonl": (0, 0, 10, "chosen_messages, rejected_messages"),
}


@pytest.mark.parametrize("name", LLAMA_FACTORY)
def test_llama_factory(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count, images, refused, reason = LLAMA_FACTORY[name]
    path = FACTORY / name
    if reason == "ranks answers":  # refused as a whole
        words = ["convert", "--from", "sharegpt", "--input", path, "--output", tmp_path / "x.jsonl"]
        assert main([str(word) for word in words]) == 2
        assert reason in capsys.readouterr().err
        return
    documents, bad = convert("sharegpt", path, tmp_path / "x.jsonl", capsys)
    assert (len(documents), len(bad)) == (count, refused)
    assert sum(len(document.images) for document in documents) == images
    assert all(re.search(reason, line) for line in bad)
    assert all(turn.parts for document in documents for turn in document.turns)


def test_llama_factory_keeps_every_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = FACTORY / "mllm_demo.json"
    documents, _ = convert("sharegpt", path, tmp_path / "x.jsonl", capsys)
    for record, document in zip(json.loads(path.read_text()), documents, strict=True):
        texts = [message["content"].replace("<image>", "") for message in record["messages"]]
        assert [text_of(turn) for turn in document.turns] == [text.strip() for text in texts]
        assert [Path(str(i.path)).name for i in document.images] == [
            Path(image).name for image in record["images"]
        ]


@pytest.mark.parametrize("name", ["v1_sft_demo.jsonl", "v1_multimodal_demo.jsonl"])
def test_llama_factory_content_parts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents, bad = convert("documents", FACTORY / name, tmp_path / "x.jsonl", capsys)
    assert not bad
    rows = read_rows(FACTORY / name)
    for row, document in zip(rows, documents, strict=True):
        parts = [part for message in row["messages"] for part in message["content"]]
        words = [part["value"] for part in parts if part["type"] == "text"]
        assert "".join("".join(map(text_of, document.turns)).split()) == "".join(
            "".join(words).split()
        )
        assert [i.path for i in document.images] == [
            part["value"] for part in parts if part["type"] == "image_url"
        ]


def text_of(turn: Turn) -> str:
    return "".join(part for part in turn.parts if isinstance(part, str)).strip()


def test_anole_lines_keep_their_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = parts_folder("anole", DATA) / "facilitating_image_generation" / "dataset_raw.jsonl"
    documents, bad = convert("documents", path, tmp_path / "x.jsonl", capsys)
    assert not bad
    rows = read_rows(path)
    for row, document in zip(rows, documents, strict=True):
        assert "".join(map(text_of, document.turns)) == row["text"].strip()
        assert [image.path for image in document.images] == [row["image"]]


def test_chameleon_prompts_keep_words_and_places_of_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = parts_folder("chameleon", DATA) / "data" / "prompts_for_human_evaluations.jsonl"
    documents, bad = convert("documents", path, tmp_path / "x.jsonl", capsys)
    assert not bad
    tokenizer = open_checkpoint("tiny").text_tokenizer()
    rows = read_rows(path)
    for row, document in zip(rows, documents, strict=True):
        parts = document.turns[0].parts
        words = [part if isinstance(part, str) else "<img>" for part in parts]
        assert "".join(words).split() == row["prompt"].split()
        assert [image.path for image in document.images] == row["image_urls"]
        texts = Document((Turn("user", tuple(p for p in parts if isinstance(p, str))),))
        decoded = Document.from_ids(texts.to_ids(tokenizer), tokenizer)
        assert "".join(map(text_of, decoded.turns)) == "".join(map(text_of, texts.turns))


@pytest.mark.parametrize("compat", ["none", "llava", "llava_med"])
@pytest.mark.parametrize("path", sorted(TABLES.glob("results/*.json")), ids=lambda p: p.stem)
def test_llava_choices(path: Path, compat: Any) -> None:
    """The letters that LLaVA's program read in these outputs of its models."""
    published = json.loads(path.read_text())
    found = {key: parse_letter(text, compat) for key, text in published["outputs"].items()}
    differing = [
        key
        for key, index in published["results"].items()
        if index >= 0 and found[key] != LETTERS[index]
    ]
    # One output names a letter beyond its choices.
    assert len(differing) <= 1


@pytest.mark.parametrize("path", sorted(TABLES.glob("review/*.jsonl")), ids=lambda p: p.stem)
def test_llava_reviews_are_summarized(path: Path, tmp_path: Path) -> None:
    output = tmp_path / "summary.json"
    assert main(["evaluate", "summarize", "--input", str(path), "--output", str(output)]) == 0
    summary = json.loads(output.read_text())
    rows = read_rows(path)
    assert not summary["replies without two scores"]
    overall = summary["groups"]["overall"]
    assert overall["data_size"] == len(rows)
    for name, index in (("gpt4_score", 0), ("pred_score", 1)):
        mean = sum(float(row["score"][index]) for row in rows) / len(rows)
        assert overall[name] == pytest.approx(mean)
