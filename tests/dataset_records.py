"""Helpers of the dataset tests: read records, and describe documents as plain values."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from medley import cli
from medley.data.document import Document
from medley.data.vocabulary import IMAGE
from medley.datasets.base import ConversionConfig, Sample
from medley.datasets.registry import FORMATS, FormatName

TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A scan."},
]
PLAIN = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A scan."}]
MESSAGES = [
    {"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A scan."},
]  # fmt: skip


def read_all(name: FormatName, config: ConversionConfig) -> list[Sample]:
    spec = FORMATS[name]
    return [spec.read(record, config) for _, _, record in spec.records(config)]


def role_texts(document: Document) -> list[tuple[str, str]]:
    """(role, text) of each turn, with a placeholder for each image."""
    return [
        (turn.role, "".join(p if isinstance(p, str) else IMAGE for p in turn.parts))
        for turn in document.turns
    ]


def png(color: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(data, "PNG")
    return data.getvalue()


def convert(folder: Path, source: str, path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status of `medley convert`, and the written rows."""
    out = folder / "o.jsonl"
    status = cli.main([
        "convert", "--from", source, "--input", str(path), "--output", str(out),
        "--image_folder", str(folder), *words,
    ])  # fmt: skip
    rows = out.read_text(encoding="utf-8").splitlines() if status == 0 else []
    return status, [json.loads(row) for row in rows]


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def names_of(document: Document) -> list[str]:
    return [Path(str(image.path)).name for image in document.images]
