"""Reads the records of a dataset as validated samples, and counts what was read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RecordError,
    Remark,
    RestrictedRecord,
    Sample,
    extra_fields,
    image_name_hint,
)
from medley.datasets.embedded_images import has_bytes
from medley.datasets.placement import media_remarks, refuse_other_media, unread_keys
from medley.datasets.statistics import DuplicateCounter
from medley.errors import UserError
from medley.images.formats import ImageError, open_pillow
from medley.utils.unicode_names import existing_name

ImageCheck = Literal["none", "exists", "header", "full"]
_CACHED_IMAGES = 1 << 16  # images whose validation result is cached


class ReadSample(NamedTuple):
    """A sample with its location, its split and the raw record."""

    where: str
    split: str
    record: Any
    sample: Sample


# Called with the location, the error and the raw value of each rejected record.
RejectRecord = Callable[[str, RecordError, Any], None]


@dataclass
class ConversionStats:
    """Statistics of a conversion.

    Attributes:
        counts: number of records, of written, bad and restricted ones, and of truncated files
        remarks: how often each note occurs, such as "numbers read as text"
        unread_keys: keys with text that are not part of the documents, and their numbers of records
        duplicates: ids that occur more than once
    """

    counts: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    unread_keys: Counter[str] = field(default_factory=Counter)
    duplicates: DuplicateCounter = field(default_factory=DuplicateCounter)


def iter_samples(
    spec: FormatSpec,
    config: ConversionConfig,
    check: ImageCheck,
    stats: ConversionStats,
    reject: RejectRecord,
) -> Iterator[ReadSample]:
    """The samples of all valid records; invalid records are passed to `reject`.

    Raises UserError for an input without records.
    """
    validate = ImageValidator(check)
    for where, split, record in spec.records(config):
        if isinstance(record, Remark):
            stats.remarks[record] += 1
            continue
        stats.counts["records"] += 1
        try:
            if isinstance(record, RecordError):
                raise record
            sample = read_record(spec, record, config)
            for image_part in sample.document.images:
                if image_part.path is not None:
                    validate(str(image_part.path))
        except RecordError as error:
            stats.counts["restricted" if isinstance(error, RestrictedRecord) else "bad"] += 1
            stats.counts["truncated files"] += error.truncated
            reject(where, error, error.content if isinstance(record, RecordError) else record)
            continue
        stats.remarks.update(sample.remarks)
        stats.unread_keys.update(unread_keys(sample.fields, record))
        stats.duplicates.add(sample.fields.get("id"))
        yield ReadSample(where, split, record, sample)
    if not stats.counts["records"]:
        raise UserError(f"{config.path}: The input contains no records.")


def read_record(spec: FormatSpec, record: Any, config: ConversionConfig) -> Sample:
    """Converts a raw record. Raises RecordError, also for values of unexpected types."""
    try:
        refuse_other_media(record)
        sample = spec.read(record, config)
        parts = (part for turn in sample.document.turns for part in turn.parts)
        remarks = media_remarks(parts)
        binary = [key for key, value in sample.fields.items() if has_bytes(value)]
        remarks += [f"field {key!r} holds bytes and is left out" for key in binary]
        if not remarks:
            return sample
        fields = extra_fields(sample.fields, *binary)
        return replace(sample, fields=fields, remarks=(*sample.remarks, *remarks))
    except UserError:
        raise
    except (TypeError, KeyError, AttributeError, IndexError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecordError(
            f"The record does not match the format ({type(error).__name__}: {reason})."
        ) from error


class ImageValidator:
    """Checks image files: whether they exist, have a valid header, or can be decoded.

    Raises RecordError for an invalid image.
    """

    def __init__(self, check: ImageCheck) -> None:
        self.check = check
        self._cached_problem = lru_cache(_CACHED_IMAGES)(self._find_problem)

    def __call__(self, path: str) -> None:
        problem = None if self.check == "none" else self._cached_problem(path)
        if problem is not None:
            raise RecordError(problem)

    def _find_problem(self, path: str) -> str | None:
        try:
            names = [existing_name(name) for name in (path, path.partition("#")[0])]
            name = next((name for name in names if Path(name).is_file()), None)
        except (OSError, ValueError) as error:
            return f"{path[:100]}: Invalid file name ({error})."
        if name is None:
            return f"{path}: No such image.{image_name_hint(path)}"
        if self.check == "exists":
            return None
        try:
            if self.check == "header" and not is_medical(path):
                with open_pillow(name, path):
                    return None
            from medley.images.preprocess import open_image  # imports torch: one second

            open_image(path, None if self.check == "full" or "#" in path else "first")
        except ImageError as error:
            return f"{path}: The image cannot be read ({str(error).removeprefix(f'{path}: ')})."
        except (OSError, ValueError, SyntaxError) as error:
            return f"{path}: The image cannot be read ({' '.join(str(error).split())})."
        return None


def is_medical(path: str) -> bool:
    """Whether the name is that of a DICOM or NIfTI file, whose header Pillow cannot read."""
    name = path.partition("#")[0].lower()
    return name.endswith((".dcm", ".dicom", ".nii", ".nii.gz")) or "." not in Path(name).name


def format_rejected(where: str, error: RecordError, record: Any) -> str:
    """A line of the JSON Lines file of rejected records."""
    row = {"where": where, "error": str(error), "record": record}
    try:
        return json.dumps(row, default=_describe_value, skipkeys=True) + "\n"
    except (RecursionError, ValueError):
        return json.dumps({**row, "record": None}) + "\n"


def _describe_value(value: Any) -> str:
    return f"({len(value)} bytes)" if isinstance(value, bytes) else repr(value)
