"""Helpers of the dataset tests: read records, and describe documents as plain values."""

from __future__ import annotations

from medley.data.document import Document
from medley.data.vocabulary import IMAGE
from medley.datasets.base import ConversionConfig, Sample
from medley.datasets.registry import FORMATS, FormatName


def read_all(name: FormatName, config: ConversionConfig) -> list[Sample]:
    spec = FORMATS[name]
    return [spec.read(record, config) for _, _, record in spec.records(config)]


def role_texts(document: Document) -> list[tuple[str, str]]:
    """(role, text) of each turn, with a placeholder for each image."""
    return [
        (turn.role, "".join(p if isinstance(p, str) else IMAGE for p in turn.parts))
        for turn in document.turns
    ]
