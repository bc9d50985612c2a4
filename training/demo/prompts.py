"""The prompts that the demo generates from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medley.data.document import ImagePart
from medley.phantoms import (
    MODALITIES,
    Finding,
    Phantom,
    illustrated_report,
    organs_of,
    prompt_for,
)
from medley.utils.jsonl import write_jsonl
from training.demo.questions import EXAMPLES, phantom_modality, read_questions, sample_evenly


@dataclass(frozen=True)
class PromptOptions:
    """Writes the prompts of the demo.

    Args:
        data: folder with test.jsonl
        output: folder for prompts-MODE.jsonl
    """

    data: Path
    output: Path


def demo_scans(data: Path) -> list[Phantom]:
    """The scans to generate: two of the data's modality, two of the embedded model's own."""
    new = phantom_modality(data) or MODALITIES[0]
    scans = [
        (new, 0, "nodule", "large", "left", "upper"),
        (new, 1, "cyst", "large", "right", "lower"),
        ("CT", 2, "abscess", "large", "left", "lower"),
        ("histology", 0, "cyst", "small", "right", "upper"),
    ]
    return [
        Phantom(modality, organs_of(modality)[organ], (Finding(kind, size, side, level),))
        for modality, organ, kind, size, side, level in scans
    ]


def write_prompts(options: PromptOptions) -> None:
    """Writes prompts for images, for interleaved reports, and questions about held-out images."""
    scans, placeholder = demo_scans(options.data), ImagePart(codes=(0,))
    reports = [illustrated_report(scan, placeholder) for scan in scans[::2]]
    rows: dict[str, list[dict[str, Any]]] = {
        "image": [{"text": prompt_for(scan)} for scan in scans],
        "any": [{"text": report.turns[0].parts[0]} for report in reports],
        "text": [],
    }
    for question in sample_evenly(list(read_questions(options.data)), EXAMPLES):
        image, text = question.document.turns[0].parts
        assert isinstance(image, ImagePart)
        rows["text"].append({"text": f"<image>{text}", "image_path": str(image.path)})
    for mode, mode_rows in rows.items():
        write_jsonl(options.output / f"prompts-{mode}.jsonl", mode_rows)
