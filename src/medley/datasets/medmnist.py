"""MedMNIST (Yang et al. 2023): the .npz file of any 2D set, of any size.

The arrays are `{train,val,test}_{images,labels}`. Images are gray (N, H, W) or RGB (N, H, W, 3),
labels (N, 1), or (N, classes) of 0 and 1 for several labels. The class names are those of the
`medmnist` package where it is installed, else the published ones; the name of the file selects the
set. Other files have the classes `class 0`, `class 1`, ...
"""

from __future__ import annotations

import ast
import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from medley.datasets.base import SPLITS, ConversionConfig, FormatSpec, RawRecord, Remark
from medley.datasets.classification import (
    NEGATIVE,
    POSITIVE,
    LabeledImage,
    LabelSet,
    check_classes,
    read,
)
from medley.datasets.npz_arrays import NpzArray, read_headers
from medley.datasets.question_templates import Kind
from medley.errors import UserError

_KINDS: dict[str, Kind] = {  # by the task in the package
    "multi-class": "one_label", "binary-class": "one_label", "ordinal-regression": "ordinal",
    "multi-label, binary-class": "each_label",
}  # fmt: skip


@dataclass(frozen=True)
class PublishedSet:
    kind: Kind
    classes: tuple[str, ...]


@cache
def published_sets() -> dict[str, PublishedSet]:
    """The 2D sets by name: the package's own table, or that of the `medmnist` package."""
    source = resources.files("medley") / "datasets" / "questions" / "medmnist.yaml"
    table = yaml.safe_load(source.read_text(encoding="utf-8"))
    sets = {name: PublishedSet(one["kind"], tuple(one["classes"])) for name, one in table.items()}
    return {**sets, **_installed_sets()}


def _installed_sets() -> dict[str, PublishedSet]:
    """The table of the `medmnist` package, parsed but not run: its import needs torchvision.

    Sets with a task that is unknown here are left out.
    """
    spec = importlib.util.find_spec("medmnist")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders if (file := Path(folder) / "info.py").is_file()]
    if not files:
        return {}
    sets = {}
    for statement in ast.parse(files[0].read_text(encoding="utf-8")).body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Dict):
            continue
        for name, own in _string_items(statement.value):
            values = dict(_string_items(own)) if isinstance(own, ast.Dict) else {}
            if {"task", "label"} <= values.keys() and not name.endswith("3d"):
                kind = _KINDS.get(ast.literal_eval(values["task"]))
                if kind is None:
                    continue
                labels = ast.literal_eval(values["label"])
                classes = tuple(labels[str(index)] for index in range(len(labels)))
                sets[name] = PublishedSet(kind, classes)
    return sets


def _string_items(table: ast.Dict) -> Iterator[tuple[str, ast.expr]]:
    for key, value in zip(table.keys, table.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value, value


def set_name(path: Path) -> str:
    """The name of the published set that a file's name begins with, else the file's name."""
    stem = path.stem.lower()
    found = [n for n in published_sets() if stem == n or stem.startswith((f"{n}_", f"{n}-"))]
    return found[0] if found else path.stem


# --- records ------------------------------------------------------------------------------


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    arrays = read_headers(config.path)
    selected = SPLITS if config.split == "all" else (config.split,)
    splits = {split: _split_arrays(config, arrays, split) for split in selected}
    labels = {split: _read_labels(array) for split, (_, array) in splits.items()}
    others = [f"{split}_labels" for split in SPLITS if split not in splits]  # for their classes
    all_labels = [_read_labels(arrays[name]) for name in others if name in arrays]
    label_set = _label_set(config.path, [*labels.values(), *all_labels], labels)
    yield from _check_examples(config.path, label_set, labels)
    for split, (images, _) in splits.items():
        for number, image in enumerate(images.rows()):
            own = labels[split][number]
            where = f"{config.path}: record {split} {number}"
            identifier = f"{label_set.dataset}-{split}-{number}"
            asked = LabeledImage(identifier, {"bytes": _to_png(image)}, _labels(label_set, own))
            for record in asked.to_records(label_set):
                yield where, split, record


def _labels(label_set: LabelSet, row: NDArray[np.int64]) -> dict[str, str]:
    if label_set.kind != "each_label":
        return {label_set.classes[row[0]]: POSITIVE}
    values = (POSITIVE if value else NEGATIVE for value in row)
    return dict(zip(label_set.classes, values, strict=True))


def _split_arrays(
    config: ConversionConfig, arrays: Mapping[str, NpzArray], split: str
) -> tuple[NpzArray, NpzArray]:
    """The images and labels of a split. Raises UserError if they are missing or do not match."""
    path = config.path
    if split not in SPLITS:
        raise UserError(f"--split {split}: MedMNIST has no such split (expected {_list(SPLITS)}).")
    names = [f"{split}_{kind}" for kind in ("images", "labels")]
    if missing := [name for name in names if name not in arrays]:
        raise UserError(
            f"{path}: The array {missing[0]!r} is missing (got {_list(arrays) or 'no arrays'}; "
            "MedMNIST has images and labels of train, val and test)."
        )
    images, labels = (arrays[name] for name in names)
    dtype = images.dtype.newbyteorder("=")
    is_gray = len(images.shape) == 3 or (len(images.shape) == 4 and images.shape[3] == 1)
    is_rgb = len(images.shape) == 4 and images.shape[3] == 3 and dtype == np.uint8
    if not (is_rgb or (is_gray and dtype in (np.uint8, np.uint16))) or 0 in images.shape[1:]:
        raise UserError(
            f"{path}: Unsupported images in {images.name!r} (got {images.dtype} of shape "
            f"{images.shape}, expected uint8 or uint16 (N, H, W), or uint8 (N, H, W, 3)). The 3D "
            "sets are unsupported."
        )
    if not images.shape[0]:
        raise UserError(f"{path}: The array {images.name!r} has no images.")
    if len(labels.shape) not in (1, 2) or labels.shape[0] != images.shape[0]:
        raise UserError(
            f"{path}: {labels.name!r} does not fit {images.name!r} (got the shapes {labels.shape} "
            f"and {images.shape}, expected one row of labels for each image)."
        )
    return images, labels


def _list(names: Any) -> str:
    return ", ".join(names)


def _read_labels(array: NpzArray) -> NDArray[np.int64]:
    """Labels (N, 1) or (N, classes). Raises UserError for values that are not whole numbers."""
    values = array.load().reshape(array.shape[0], -1)
    if values.dtype.kind not in "iubf" or not np.all(np.isfinite(values)):
        raise UserError(
            f"{array.path}: {array.name!r} has invalid labels (got {array.dtype}, expected whole "
            "numbers)."
        )
    whole = values.astype(np.int64)
    if not values.shape[1] or np.any(whole != values):
        raise UserError(f"{array.path}: {array.name!r} has labels that are not whole numbers.")
    return whole


def _label_set(
    path: Path, everything: Sequence[NDArray[np.int64]], labels: Mapping[str, NDArray[np.int64]]
) -> LabelSet:
    """The classes of the file, by all of its labels. Raises UserError for labels out of range."""
    name, widths = set_name(path), {array.shape[1] for array in everything}
    if len(widths) > 1:
        raise UserError(f"{path}: The splits have different numbers of labels (got {widths}).")
    width = widths.pop()
    published = published_sets().get(name)
    has_several = width > 1
    if published is not None:
        expected = len(published.classes) if published.kind == "each_label" else 1
        if width != expected:
            raise UserError(
                f"{path}: The labels are not those of {name} (got {width} columns, expected "
                f"{expected}). Rename the file if it is another dataset."
            )
        kind, classes = published.kind, published.classes
    else:
        count = (
            width if has_several else 1 + max(int(array.max(initial=-1)) for array in everything)
        )
        kind = "each_label" if has_several else "one_label"
        classes = tuple(f"class {index}" for index in range(max(count, 0)))
    limit = 2 if kind == "each_label" else len(classes)
    for split, array in labels.items():
        outside = (array < 0) | (array >= limit)
        if outside.any():
            row, column = np.argwhere(outside)[0]
            raise UserError(
                f"{path}: A label in '{split}_labels' is out of range (got "
                f"{array[row, column]} in row {row}, expected 0 to {limit - 1})."
            )
    if kind != "each_label":
        check_classes(str(path), classes)
    return LabelSet(name, "medmnist", kind, classes)


def _check_examples(
    path: Path, label_set: LabelSet, labels: Mapping[str, NDArray[np.int64]]
) -> Iterator[RawRecord]:
    """Raises UserError for a class without an example in train; in val or test it is a remark."""
    for split, array in labels.items():
        absent = _absent(label_set, array)
        if absent and split == "train":
            raise UserError(
                f"{path}: A class has no example in train (got none of {_list(absent)}). Add "
                "examples, or remove the class."
            )
        if absent:
            yield f"{path}", split, Remark(f"{split} has no example of {_list(absent)}")


def _absent(label_set: LabelSet, labels: NDArray[np.int64]) -> list[str]:
    if label_set.kind == "each_label":
        counts = labels.sum(0)
    else:
        counts = np.bincount(labels[:, 0], minlength=len(label_set.classes))
    return [name for name, count in zip(label_set.classes, counts, strict=True) if not count]


def _to_png(image: NDArray[Any]) -> bytes:
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    data = io.BytesIO()
    native = np.ascontiguousarray(image.astype(image.dtype.newbyteorder("=")))
    Image.fromarray(native).save(data, "PNG")
    return data.getvalue()


FORMAT = FormatSpec(records, read, has_splits=True)
