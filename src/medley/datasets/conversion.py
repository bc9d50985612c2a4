"""Records of one format to records of another: in their order, checked, and counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from medley.datasets.base import ConversionConfig, FormatSpec, RecordError, RestrictedRecord, Sample
from medley.datasets.statistics import Duplicates
from medley.errors import UserError

Check = Literal["none", "exists", "header", "whole"]
_REMEMBERED = 1 << 16  # pictures that need not be looked at again at once


@dataclass
class ConversionStats:
    """What became of the records. `bad` are given to `keep` as they come."""

    counts: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    duplicates: Duplicates = field(default_factory=Duplicates)


def iter_samples(
    form: FormatSpec,
    choices: ConversionConfig,
    check: Check,
    tally: ConversionStats,
    keep: Callable[[str, str, Any], None],
) -> Iterator[tuple[str, str, Any, Sample]]:
    """(place, split, record, sample) of every good record; a bad one goes to `keep`, with why.

    Raises UserError where there is not a single record.
    """
    looked_at = ImageValidator(check)
    for place, split, record in form.records(choices):
        tally.counts["records"] += 1
        try:
            if isinstance(record, RecordError):
                raise record
            sample = read_record(form, record, choices)
            for picture in sample.document.pictures:
                if picture.path is not None:
                    looked_at(str(picture.path))
        except RecordError as error:
            tally.counts["withheld" if isinstance(error, RestrictedRecord) else "bad"] += 1
            tally.counts["files not read to their end"] += error.torn
            keep(place, str(error), error.content if isinstance(record, RecordError) else record)
            continue
        tally.remarks.update(sample.remarks)
        tally.duplicates.add(sample.fields.get("id"))
        yield place, split, record, sample
    if not tally.counts["records"]:
        raise UserError(f"{choices.path}: no records in it")


def read_record(form: FormatSpec, record: Any, choices: ConversionConfig) -> Sample:
    """A record as a sample. Raises RecordError, also for values of kinds that nobody thought of."""
    try:
        return form.read(record, choices)
    except UserError:
        raise
    except (TypeError, KeyError, AttributeError, IndexError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecordError(
            f"not as this format has it ({type(error).__name__}: {reason})"
        ) from error


class ImageValidator:
    """Looks at pictures: that the file is there, that its header is a picture's, or all of it.

    Raises RecordError for one that is not.
    """

    def __init__(self, check: Check) -> None:
        self.check = check
        self._reason = lru_cache(_REMEMBERED)(self._look)

    def __call__(self, path: str) -> None:
        reason = None if self.check == "none" else self._reason(path)
        if reason is not None:
            raise RecordError(reason)

    def _look(self, path: str) -> str | None:
        try:
            there = Path(path).is_file() or Path(path.partition("#")[0]).is_file()
        except (OSError, ValueError) as error:
            return f"{path[:100]}: no name of a file ({error})"
        if not there:
            return f"no such picture, {path}"
        if self.check == "exists":
            return None
        if self.check == "header" and not is_medical(path):
            try:
                with Image.open(path):
                    return None
            except (OSError, Image.DecompressionBombError) as error:
                return f"{path}: not a picture that can be read ({error})"
        from medley.images.preprocess import (  # brings torch, which takes a second
            ImageError,
            open_image,
        )

        try:
            open_image(path, None if self.check == "whole" or "#" in path else "first")
        except ImageError as error:
            return f"{path}: not a picture that can be read ({error})"
        return None


def is_medical(path: str) -> bool:
    """DICOM and NIfTI files, which Pillow does not know: they are looked at as a whole or not."""
    name = path.partition("#")[0].lower()
    return name.endswith((".dcm", ".dicom", ".nii", ".nii.gz")) or "." not in Path(name).name


def rejected_record(place: str, reason: str, record: Any) -> str:
    """A line of the file of bad records."""
    row = {"place": place, "error": reason, "record": record}
    try:
        return json.dumps(row, default=_unwritten, skipkeys=True)
    except (RecursionError, ValueError):
        return json.dumps({**row, "record": None})


def _unwritten(value: Any) -> str:
    return f"({len(value)} bytes)" if isinstance(value, bytes) else repr(value)
