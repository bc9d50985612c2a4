"""Records of answer, review and context files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medley.datasets.base import RecordError
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.utils.files import check_unicode

# The location of a record (file and number), and its fields.
LocatedRecord = tuple[str, dict[str, Any]]


def read_objects(path: Path) -> Iterator[LocatedRecord]:
    """The records of a file with their locations. Raises UserError for an invalid record."""
    for where, _, record in records_of(path):
        if isinstance(record, RecordError):
            raise UserError(f"{where}: {record}")
        if not isinstance(record, dict):
            raise UserError(f"{where}: Expected an object.")
        check_unicode(where, record)
        yield where, record


def is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
