"""The columns of a CSV file of labels: which one holds what, and what their values mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medley.datasets.base import ConversionConfig, RecordError, Remark
from medley.datasets.classification import NEGATIVE, POSITIVE, UNCERTAIN
from medley.errors import UserError

Kind = Literal["classes", "list", "findings"]
NO_FINDING = "No Finding"  # an empty list of findings, in both published layouts
SEPARATOR = "|"
_CHEXPERT = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
# Names of columns, without case, spaces and punctuation.
_IMAGE_NAMES = ("image", "path", "imageindex", "imagepath", "imgpath", "filename", "filepath",
                "file", "img", "imageid")  # fmt: skip
_LABEL_NAMES = ("findinglabels", "label", "labels", "class", "diagnosis", "target", "category")
_PATIENT_NAMES = ("patientid", "patient", "subjectid", "subject")
_SPLIT_NAMES = ("split", "subset", "partition")
_VALUES = {
    "1": POSITIVE, "1.0": POSITIVE, "true": POSITIVE, "yes": POSITIVE, "positive": POSITIVE,
    "0": NEGATIVE, "0.0": NEGATIVE, "false": NEGATIVE, "no": NEGATIVE, "negative": NEGATIVE,
    "-1": UNCERTAIN, "-1.0": UNCERTAIN, "uncertain": UNCERTAIN,
}  # fmt: skip
_BLANK_CLASSES = ("", "nan")  # a class may be named `none` or `NA`
_BLANKS = (*_BLANK_CLASSES, "na", "n/a", "null", "none")
_FINDING_VALUES = ("1", "1.0", "0", "0.0", "-1", "-1.0")
_PATIENT_FOLDER = re.compile(r"(?:^|/)(patient\d+)(?=/)", re.IGNORECASE)


@dataclass(frozen=True)
class Columns:
    """The columns of a file; None for those that it lacks."""

    image: str
    labels: tuple[str, ...]
    patient: str | None
    split: str | None

    def others(self, row: dict[str, Any]) -> dict[str, Any]:
        used = {self.image, *self.labels, self.patient, self.split}
        return {name: value for name, value in row.items() if name not in used}

    def patient_of(self, row: dict[str, Any]) -> str | None:
        """The patient of a row: its column, else a folder like patient00001 (CheXpert)."""
        if self.patient is not None:
            return str(row[self.patient]).strip() or None
        match = _PATIENT_FOLDER.search(str(row[self.image]).replace("\\", "/"))
        return match[1] if match else None


def find_columns(where: Path, names: Sequence[str], config: ConversionConfig) -> Columns:
    """The columns by the options, else by their usual names. Raises UserError if one is missing."""
    image = config.image_key if config.image_key in names else _find(names, _IMAGE_NAMES)
    if image is None:
        raise _missing(where, "the image paths", "--image_key", names)
    if config.label_columns is not None:
        labels = tuple(config.label_columns)
        if unknown := [name for name in labels if name not in names]:
            raise _missing(where, f"the labels ({unknown[0]})", "--label_columns", names)
    elif NO_FINDING in names:
        labels = tuple(name for name in names if name in _CHEXPERT)
    else:
        found = _find([name for name in names if name != image], _LABEL_NAMES)
        labels = () if found is None else (found,)
    if not labels:
        raise _missing(where, "the labels", "--label_columns", names)
    if config.patient_key is not None and config.patient_key not in names:
        raise _missing(where, "the patients", "--patient_key", names)
    patient = config.patient_key or _find(names, _PATIENT_NAMES)
    split = _find(names, _SPLIT_NAMES)
    return Columns(image, labels, patient, split if split not in labels else None)


def _find(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The column with the first of the wanted names."""
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in reversed(names)}
    return next((plain[name] for name in wanted if name in plain), None)


def _missing(where: Path, content: str, flag: str, names: Sequence[str]) -> UserError:
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return UserError(
        f"{where}: No column with {content} (got {listed or 'an empty file'}). Name it with {flag}."
    )


# --- values -------------------------------------------------------------------------------


def detect_kind(columns: Columns, values: Iterable[str]) -> Kind:
    """What the label columns hold, by their values that are not blank.

    One class for each image, a list of classes, or findings: 1, 0, -1 or blank in each column.
    """
    if len(columns.labels) > 1:
        return "findings"
    values = set(values)
    if any(SEPARATOR in value for value in values) or _find(columns.labels, _LABEL_NAMES[:1]):
        return "list"
    return "findings" if values and values <= set(_FINDING_VALUES) else "classes"


def text_of(row: dict[str, Any], column: str) -> str:
    return "" if row[column] is None else str(row[column]).strip()


def is_blank(text: str, kind: Kind = "findings") -> bool:
    return text.lower() in (_BLANK_CLASSES if kind == "classes" else _BLANKS)


def is_positive(text: str) -> bool:
    return _VALUES.get(text.lower()) == POSITIVE


def split_list(text: str) -> list[str]:
    """`Edema|Mass` -> its classes; none for `No Finding`."""
    found = [one.strip() for one in text.split(SEPARATOR) if one.strip()]
    return list(dict.fromkeys(one for one in found if one != NO_FINDING))


def read_finding(
    text: str, column: str, config: ConversionConfig
) -> tuple[str | None, Remark | None]:
    """positive, negative or uncertain, or None to leave it out; and a note on the policy.

    Raises RecordError for another value.
    """
    if is_blank(text):
        if config.blank == "negative":
            return NEGATIVE, Remark("blank labels read as negative (--blank negative)")
        return None, Remark("blank labels left out (--blank ignore)")
    value = _VALUES.get(text.lower())
    if value is None:
        raise RecordError(
            f"The label in {column!r} is invalid (got {text!r}, expected 1, 0, -1 or blank)."
        )
    if value != UNCERTAIN:
        return value, None
    if config.uncertain == "ignore":
        return None, Remark("uncertain labels left out (--uncertain ignore)")
    if config.uncertain == "class":
        return UNCERTAIN, Remark("uncertain labels kept as an answer (--uncertain class)")
    note = f"uncertain labels read as {config.uncertain} (--uncertain {config.uncertain})"
    return config.uncertain, Remark(note)
