"""The output files of a conversion: written under temporary names, renamed if it succeeds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from medley.datasets.base import ConversionConfig, FormatSpec, RecordError, RestrictedRecord
from medley.datasets.readers import RecordWriter, open_writer
from medley.datasets.samples import format_rejected
from medley.utils.files import atomic_dir, atomic_file, escape_name

IMAGE_LIST = "images.csv"
_REJECTED_KINDS = ("bad", "restricted")


class OutputFiles:
    """Files of one conversion; `open_output_files` creates it.

    An output with a suffix is a single file; any other output is a folder with a file per split.
    """

    def __init__(
        self, output: Path, folder: Path | None, max_errors: int, stack: ExitStack
    ) -> None:
        self.output = output
        self.temporary_folder = folder
        self.writers: dict[str, RecordWriter] = {}  # by split; "" for a single file
        self._max_errors, self._stack = max_errors, stack
        self._rejected: dict[str, TextIO] = {}
        self._bad = 0

    @property
    def is_folder(self) -> bool:
        return self.temporary_folder is not None

    @property
    def parent(self) -> Path:
        """The final folder of the written files."""
        return self.output if self.is_folder else self.output.parent

    def file_names(self, spec: FormatSpec) -> list[str]:
        """Final names of the files that were written in a format."""
        if self.is_folder:
            return [f"{split}.{spec.layout}" for split in self.writers]
        return [self.output.name for _ in self.writers]

    def writer(self, split: str, spec: FormatSpec, config: ConversionConfig) -> RecordWriter:
        """The writer of a split's file; opens the file at the first call."""
        name = split if self.is_folder else ""
        if name not in self.writers:
            if self.temporary_folder is not None:
                path = self.temporary_folder / f"{name}.{spec.layout}"
            else:
                path = self._stack.enter_context(atomic_file(self.output))
            self.writers[name] = self._stack.enter_context(open_writer(path, spec, config))
        return self.writers[name]

    def reject(self, where: str, error: RecordError, record: Any) -> None:
        """Writes a record to the file of rejected records, and prints the first bad ones."""
        kind = "restricted" if isinstance(error, RestrictedRecord) else "bad"
        if kind not in self._rejected:
            path = self._rejected_path(kind)
            if not self.is_folder:
                path = self._stack.enter_context(atomic_file(path))
            self._rejected[kind] = self._stack.enter_context(path.open("w", encoding="utf-8"))
        self._rejected[kind].write(format_rejected(where, error, record))
        self._bad += kind == "bad"
        if kind == "bad" and self._bad <= self._max_errors:
            tqdm.write(f"{where}: {escape_name(str(error))}", file=sys.stderr)

    def remove_old_rejected(self) -> None:
        """Removes an earlier run's files of rejected records; a folder is always new."""
        if not self.is_folder:
            for kind in set(_REJECTED_KINDS) - set(self._rejected):
                self._rejected_path(kind).unlink(missing_ok=True)

    def _rejected_path(self, kind: str) -> Path:
        if self.temporary_folder is not None:
            return self.temporary_folder / f"{kind}.jsonl"
        return self.output.with_name(f"{self.output.name}.{kind}.jsonl")


@contextmanager
def open_output_files(output: Path, max_errors: int) -> Iterator[OutputFiles]:
    """Gives the output files; they get their final names when the block ends without an error.

    `max_errors` is the number of bad records that are printed.
    """
    with ExitStack() as stack:
        folder = None if output.suffix else stack.enter_context(atomic_dir(output))
        files = OutputFiles(output, folder, max_errors, stack)
        yield files
        files.remove_old_rejected()
