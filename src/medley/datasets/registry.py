"""Data sets of the field <-> documents: one module a format, reading and writing side by side."""

from typing import Literal

from medley.datasets import (
    captions,
    documents,
    llava,
    medmax,
    medtrinity,
    pathvqa,
    pmc_vqa,
    science_qa,
    sharegpt,
    slake,
    text_qa,
    vqa_rad,
)
from medley.datasets.base import ConversionConfig, FormatSpec, RecordError, Sample

Name = Literal[
    "documents", "llava", "sharegpt", "medmax", "medtrinity", "vqa_rad", "slake", "pathvqa",
    "pmc_vqa", "science_qa", "text_qa", "text_qa_csv", "captions",
]  # fmt: skip
FORMATS: dict[Name, FormatSpec] = {
    "documents": documents.FORMAT,
    "llava": llava.FORMAT,
    "sharegpt": sharegpt.FORMAT,
    "medmax": medmax.FORMAT,
    "medtrinity": medtrinity.FORMAT,
    "vqa_rad": vqa_rad.FORMAT,
    "slake": slake.FORMAT,
    "pathvqa": pathvqa.FORMAT,
    "pmc_vqa": pmc_vqa.FORMAT,
    "science_qa": science_qa.FORMAT,
    "text_qa": text_qa.FORMAT,
    "text_qa_csv": text_qa.CSV,
    "captions": captions.FORMAT,
}

__all__ = ["FORMATS", "ConversionConfig", "FormatSpec", "Name", "RecordError", "Sample"]
