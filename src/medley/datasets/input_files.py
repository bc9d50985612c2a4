"""The files of a dataset: published names by split, and tables as hubs store them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from medley.datasets.base import ConversionConfig, RawRecord
from medley.datasets.readers import records_of
from medley.errors import UserError

TABLE_SUFFIXES = (".parquet", ".arrow")
ROW_ID = (
    "medley_row"  # identifies a record of a table without an id; its "id" is made of file and row
)
SPLIT_NAMES = {  # as files, folders and columns call the splits, in lower case
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip
_SPLIT_IN_NAME = re.compile(rf"(?:^|[-_.])({'|'.join(SPLIT_NAMES)})(?=[-_.]|$)")


def table_files(path: Path) -> list[Path]:
    """The Parquet and Arrow files at a path: a file, or a folder with its subfolders.

    This includes snapshots of hubs and the cache folders of `datasets`. Raises UserError for a
    folder that has the same file in several subfolders, such as revisions or configurations.
    """
    if path.is_file():
        return [path] if path.suffix.lower() in TABLE_SUFFIXES else []
    files = [
        file
        for suffix in TABLE_SUFFIXES
        for file in path.glob(f"**/*{suffix}")
        if file.is_file()
        and not file.name.startswith(("cache-", "."))
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    by_name: dict[str, set[Path]] = {}
    for file in files:
        by_name.setdefault(f"{split_of(file, path)} {file.name}", set()).add(file.parent)
    for name, folders in by_name.items():
        if len(folders) > 1:
            first, second, *_ = sorted(folders)
            raise UserError(
                f"{path}: Several folders contain a table {name.strip()} ({first} and {second}). "
                "Name one of them with --input."
            )
    return sorted(files)


def split_of(file: Path, root: Path) -> str:
    """The split that a file's name or the name of its folder states, or an empty string."""
    for name in (file.stem, *reversed(file.relative_to(root).parts[:-1] if root.is_dir() else ())):
        if found := _SPLIT_IN_NAME.findall(name.lower()):
            return SPLIT_NAMES[found[-1]]
    return ""


def records_at(path: Path) -> Iterator[RawRecord]:
    """The records of a file, or of all tables in a folder."""
    files = table_files(path) if path.is_dir() else []
    for file in files or [path]:
        yield from records_of(file)


def table_records(
    config: ConversionConfig, published: Mapping[str, Sequence[str]]
) -> Iterator[RawRecord] | None:
    """The records of the tables at the input; None if there are no tables, or a published file.

    A record without an id gets one of its file and row. Raises UserError for a split without files.
    """
    is_published = any((config.path / n).is_file() for names in published.values() for n in names)
    files = [] if is_published else table_files(config.path)
    if not files:
        return None
    splits = [split_of(file, config.path) for file in files]
    selected = [
        (split, file)
        for split, file in zip(splits, files, strict=True)
        if config.split in ("all", split)
    ]
    if not selected:
        raise UserError(
            f"--split {config.split}: {config.path} has no such split (expected one of "
            f"{', '.join(sorted({split for split in splits if split}))})."
        )
    return _number_records(selected)


def _number_records(files: Sequence[tuple[str, Path]]) -> Iterator[RawRecord]:
    for split, path in files:
        for where, _, record in records_of(path):
            if isinstance(record, dict):
                number = where.rpartition(" ")[2]
                name = path.stem if split_of(path, path) else f"{split}-{path.stem}".strip("-")
                identifier = next(
                    (record[k] for k in ("id", "qid") if record.get(k) is not None),
                    f"{name}-{number}",
                )
                record = {**record, "id": identifier, ROW_ID: number}
            yield where, split, record


def split_files(
    config: ConversionConfig, names: Mapping[str, Sequence[str]], dataset: str
) -> list[tuple[str, Path]]:
    """(split, file) for each selected split of a dataset.

    Args:
        config: gives the input, a folder or a single file, and the selected split
        names: published file names of each split, relative to the folder
        dataset: name of the dataset in errors

    Raises:
        UserError: there is no file of a selected split.
    """
    path = config.path
    if path.is_file():
        splits = [s for s, files in names.items() if path.name in {Path(f).name for f in files}]
        if config.split not in ("all", *splits[:1]):
            own_split = splits[0] if splits else "of an unknown split"
            raise UserError(f"--split {config.split}: {path} is {own_split}.")
        return [(splits[0] if splits else "", path)]
    selected = list(names) if config.split == "all" else [config.split]
    if unknown := [split for split in selected if split not in names]:
        raise UserError(
            f"--split {unknown[0]}: {dataset} has no such split (expected one of "
            f"{', '.join(names)})."
        )
    files = []
    for split in selected:
        existing = [path / name for name in names[split] if (path / name).is_file()]
        files += [(split, existing[0])] if existing else []
    if not files:
        expected = ", ".join(name for split in selected for name in names[split])
        raise UserError(f"{path}: No file of {dataset} found (expected one of {expected}).")
    return files
