"""The supported dataset formats: how each is read and, for most, written."""

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from medley.datasets import (
    captions,
    documents,
    image_folder,
    labels_csv,
    llava,
    medmax,
    medmnist,
    medtrinity,
    pathvqa,
    pmc_vqa,
    science_qa,
    sharegpt,
    slake,
    text_qa,
    vqa_rad,
)
from medley.datasets.base import (
    ConversionConfig,
    ConversionOptions,
    DatasetOptions,
    FormatSpec,
)
from medley.errors import UserError

FormatName = Literal[
    "documents", "llava", "sharegpt", "medmax", "medtrinity", "vqa_rad", "slake", "pathvqa",
    "pmc_vqa", "science_qa", "text_qa", "text_qa_csv", "captions", "medmnist",
    "image_folder", "labels_csv",
]  # fmt: skip
FORMATS: dict[FormatName, FormatSpec] = {
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
    "text_qa_csv": text_qa.CSV_FORMAT,
    "captions": captions.FORMAT,
    "medmnist": medmnist.FORMAT,
    "image_folder": image_folder.FORMAT,
    "labels_csv": labels_csv.FORMAT,
}


def make_config(
    name: FormatName, path: Path, options: DatasetOptions, find_images: bool = True
) -> ConversionConfig:
    """The configuration for reading `path` in a format.

    `find_images` uses the format's published image folder if `options` has no image folder.

    Raises:
        UserError: `options` selects a split of a format without splits.
    """
    spec = FORMATS[name]
    if options.split != "all" and not spec.has_splits:
        raise UserError(f"--split {options.split}: {name} is published without splits.")
    kind = ConversionOptions if isinstance(options, ConversionOptions) else DatasetOptions
    values: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(kind)}
    if find_images and options.image_folder is None and spec.default_image_folder is not None:
        values["image_folder"] = spec.default_image_folder(path)
    return ConversionConfig(path, **values)
