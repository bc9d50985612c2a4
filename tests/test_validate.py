from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import GOLDEN
from PIL import Image

from medley.data.document import Document, ImagePart
from medley.data.preview import image_loader, preview_text
from medley.data.token_dataset import write_token_parquet
from medley.data.vocabulary import TextTokenizer
from medley.phantoms import Phantom

PROGRAM = "tokenizer.validate"
TOKENIZER = GOLDEN / "tiny_chameleon_tokenizer" / "text_tokenizer_modified.json"


def test_preview_marks_trained_tokens(tokenizer: TextTokenizer) -> None:
    row = {"text": "<image>Why?<reserved08706>So.<reserved08706>Sure?<reserved08706><image>Yes.",
           "image_tokens": [[1, 2], [3, 4]]}  # fmt: skip
    ids = Document.from_json(row).to_ids(tokenizer)
    image = "[image of 2 codes]"
    assert preview_text(ids, tokenizer) == (
        f"<s>{image}Why?<reserved08706>⟦So.<reserved08706>⟧Sure?<reserved08706>⟦{image}Yes.</s>⟧"
    )
    one_turn = Document.from_json({"text": "All of it."}).to_ids(tokenizer)
    assert preview_text(one_turn, tokenizer) == "<s>⟦All of it.</s>⟧"


def test_documents_are_counted_and_rendered(tmp_path: Path, program: Callable[..., Any]) -> None:
    Phantom.random(np.random.default_rng(0)).image(64).save(tmp_path / "a.png")
    rows = [
        {"text": "<image>Is <b> there?<reserved08706>No.", "image_path": str(tmp_path / "a.png"),
         "image_tokens": [5] * 64, "task": "VQA"},
        {"text": "<image>Gone?<reserved08706>Yes.", "image_path": "gone.png",
         "image_tokens": [5] * 64, "task": "VQA"},
    ]  # fmt: skip
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--input_file", source, "--tokenizer_file", TOKENIZER, "--html_report"]
    flags += [tmp_path / "p.html"]
    done = program(PROGRAM, *flags)
    assert "⟦No.</s>⟧" in done.stdout
    assert "documents: 2" in done.stdout
    assert "image tokens: 132" in done.stdout
    report = (tmp_path / "p.html").read_text()
    assert report.count("data:image/jpeg;base64,") == 1
    assert "Is &lt;b&gt; there?" in report
    assert "gone.png: Image not found." in report
    program(PROGRAM, *flags, "--ckpt", "tiny")  # decoded from their codes
    assert (tmp_path / "p.html").read_text().count("data:image/jpeg;base64,") == 2

    with open(source, "a") as file:
        file.write('{"text": 1}\n{"text": "<image>", "image_tokens": [1, 2]}\n')
    done = program(PROGRAM, *flags, status=3)
    assert f"{source}:3: 'text' is int" in done.stderr
    assert "1 errors" in done.stderr
    assert "images by number of codes: {64: 2, 2: 1}" in done.stdout


def test_token_files_are_checked(
    tmp_path: Path, program: Callable[..., Any], tokenizer: TextTokenizer
) -> None:
    ids = Document.from_json({"text": "Why?<reserved08706>So."}).to_ids(tokenizer)
    incomplete = [0, tokenizer.vocabulary.begin_image, 10, 2]
    for name in ("t.jsonl", "t.parquet"):
        path = tmp_path / name
        rows = [{"tokens": ids}, {"tokens": incomplete}]
        if name.endswith("parquet"):
            write_token_parquet(path, iter(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = program(PROGRAM, "--input_file", path, "--tokenizer_file", TOKENIZER, status=3)
        assert "An image has a begin token but no end token" in done.stderr
        assert "documents: 1" in done.stdout
        assert "⟦So.</s>⟧" in done.stdout


def test_image_without_file_is_decoded_or_explained() -> None:
    image = ImagePart(codes=(1, 2))
    decoded = Image.new("RGB", (4, 4))
    assert image_loader(lambda codes: [decoded])(image) is decoded
    assert image_loader(None)(image) == "An image of 2 codes. Pass --ckpt to decode it."
    assert image_loader(None)(ImagePart(path="none.png")) == "none.png: Image not found."
