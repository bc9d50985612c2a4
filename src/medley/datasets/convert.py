"""Writes samples in a target format, with statistics, sidecar files and image lists.

with open_output_files(output, max_errors=20) as files:
    conversion = Conversion("llava", config, files)
    for item in select_records(FORMATS["vqa_rad"], config, ..., files.reject, plan):
        conversion.add(item)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from medley.datasets.base import ConversionConfig, RecordError, Sample
from medley.datasets.output_files import OutputFiles
from medley.datasets.registry import FORMATS, FormatName
from medley.datasets.samples import ConversionStats, ReadSample
from medley.datasets.splits import find_leaks, image_paths, patient_of
from medley.datasets.statistics import PUBLISHED_SPLITS, DatasetStats, SplitHash
from medley.errors import PartialFailure, UserError
from medley.utils.files import read_json, write_json

_RECORD_NUMBER = re.compile(r":( (record|problem) .*|\d+)$")
Sidecars = dict[str, dict[str, Any]]  # file name -> content


@dataclass
class SplitStats:
    """Hash, image paths and patients of a written split."""

    hash: SplitHash = field(default_factory=SplitHash)
    images: dict[str, None] = field(default_factory=dict)  # in order of appearance
    patients: set[str] = field(default_factory=set)


class Conversion:
    """Writes samples to the files of their splits and collects statistics about them.

    Attributes:
        stats: counts of read, written and rejected records
        dataset_stats: tables about the written records
        splits: statistics of each written split
        input_files: files that the written records come from
    """

    def __init__(
        self,
        target: FormatName,
        config: ConversionConfig,
        files: OutputFiles,
        list_images: bool = False,
    ) -> None:
        """`list_images` collects the image paths also for a single output file."""
        self.target, self.spec, self.config, self.files = target, FORMATS[target], config, files
        self.list_images = list_images
        self.stats, self.dataset_stats = ConversionStats(), DatasetStats()
        self.splits: dict[str, SplitStats] = {}
        self.input_files: set[str] = set()

    def add(self, item: ReadSample) -> None:
        """Writes a sample. A sample that the target cannot represent is rejected as bad."""
        sample = item.sample
        if not self.files.is_folder and self.config.split == "all" and item.split != "all":
            # A single file holds all splits; the field keeps them apart.
            sample = replace(sample, fields={**sample.fields, "split": item.split})
        try:
            assert self.spec.write is not None
            row = self.spec.write(sample, self.config)
            self.files.writer(item.split, self.spec, self.config)(row)
        except RecordError as error:
            self.stats.counts["bad"] += 1
            reason = RecordError(f"--to {self.target}: {error}")
            self.files.reject(item.where, reason, item.record)
            return
        self.stats.counts["written"] += 1
        self.input_files.add(_RECORD_NUMBER.sub("", item.where))
        self._update(item.split, sample, row)

    def _update(self, split: str, sample: Sample, row: dict[str, Any]) -> None:
        if self.spec.layout == "csv" and (lost := set(sample.fields) - set(row)):
            self.stats.remarks[f"fields without a CSV column ({', '.join(sorted(lost))})"] += 1
        self.dataset_stats.add(sample)
        split_stats = self.splits.setdefault(split, SplitStats())
        split_stats.hash.add(sample.document)
        if (patient := patient_of(sample)) is not None:
            split_stats.patients.add(patient)
        if self.files.is_folder or self.list_images or split != "all":
            split_stats.images |= dict.fromkeys(image_paths(sample.document))

    def check(self, skip_bad: bool, max_errors: int) -> None:
        """Checks the result before the files get their final names.

        Raises:
            PartialFailure: there are bad records, and `skip_bad` is false.
            UserError: no record was written.
        """
        path, bad = self.config.path, self.stats.counts["bad"]
        if bad and not skip_bad:
            raise PartialFailure(
                f"{path}: {bad} of {self.stats.counts['records']} records are bad (the first "
                f"{min(bad, max_errors)} are listed above). Nothing was written. Use --on_error "
                "skip to write the valid records."
            )
        if not self.stats.counts["written"]:
            raise UserError(f"{path}: The input contains no valid records ({bad} bad).")

    def write_sidecars(self, existing: Sidecars) -> None:
        """Adds the written files to the sidecar files."""
        for name, entries in existing.items():
            for file_name in self.files.file_names(self.spec):
                assert self.spec.sidecar_files is not None
                entries |= self.spec.sidecar_files(file_name, self.config)[name]
            write_json(self.files.parent / name, entries)

    def split_hashes(self) -> dict[str, tuple[int, str]]:
        """Split -> number of records and hash."""
        return {
            name: (stats.hash.records, stats.hash.hexadecimal())
            for name, stats in self.splits.items()
        }

    def split_images(self) -> dict[str, list[str]]:
        """Split -> image paths."""
        return {name: list(stats.images) for name, stats in self.splits.items()}

    def patient_leaks(self) -> list[str]:
        """Lines about patients that two splits share."""
        splits = {name: stats.patients for name, stats in self.splits.items()}
        patients = {patient: patient for own in splits.values() for patient in own}
        return [
            f"{leak.common} of {leak.total} patients of {leak.split} are also in {leak.other}"
            for leak in find_leaks(splits, patients)
            if leak.total
        ]

    def summary(self, published: Mapping[str, str], leaks: Iterable[str]) -> list[str]:
        """Lines that describe the result.

        Args:
            published: split -> result of the comparison with the published split
            leaks: lines that describe images common to several splits
        """
        counts = self.stats.counts
        lines = [f"{self.files.output}: {counts['written']} of {counts['records']} records"]
        for name, (records, digest) in self.split_hashes().items():
            comparison = f", {published[name]}" if name in published else ""
            lines.append(f"  {name}: {records} records, hash {digest[:16]}{comparison}")
        lines += [f"  {line}" for line in leaks]
        lines += [f"  {remark}: {number} times" for remark, number in self.stats.remarks.items()]
        if self.stats.unread_keys:
            keys = ", ".join(f"{name} ({n})" for name, n in self.stats.unread_keys.most_common())
            lines.append(f"  keys with text that are not part of the documents: {keys}")
        if duplicates := self.stats.duplicates.count():
            lines.append(f"  {duplicates} records have the id of an earlier record")
        if counts["restricted"]:
            lines.append(
                f"  {counts['restricted']} records require credentials; they are listed in the "
                "restricted.jsonl file"
            )
        if counts["bad"]:
            lines.append(f"  {counts['bad']} bad records are listed in the bad.jsonl file")
        return lines

    def statistics_lines(self) -> list[str]:
        """The tables about the written records, as text."""
        lines = []
        for title, table in self.dataset_stats.tables().items():
            lines.append(f"{title}:")
            lines += [f"  {number:>9,}  {name}" for name, number in table.items()]
        return lines


def read_sidecars(target: FormatName, output: Path, config: ConversionConfig) -> Sidecars:
    """The present content of the sidecar files that the target format writes.

    Raises UserError for a file that is not a JSON object.
    """
    sidecar_files = FORMATS[target].sidecar_files
    if sidecar_files is None:
        return {}
    folder = output.parent if output.suffix else output
    sidecars = {}
    for name in sidecar_files(output.name, config):
        sidecars[name] = read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(sidecars[name], dict):
            raise UserError(f"{folder / name}: The file is not a JSON object.")
    return sidecars


def compare_with_published(
    source: FormatName, split_hashes: Mapping[str, tuple[int, str]]
) -> dict[str, str]:
    """Split -> whether it is the published split, for splits whose published hash is known."""
    result = {}
    for split, (_, digest) in split_hashes.items():
        if (source, split) in PUBLISHED_SPLITS:
            records, published = PUBLISHED_SPLITS[source, split]
            same = digest == published
            result[split] = (
                "the published split" if same else f"not the published split of {records} records"
            )
    return result


def write_image_list(path: Path, split_images: Mapping[str, Iterable[str]]) -> None:
    """Writes the images of all splits, each once, as CSV with the column `img_path`."""
    unique = dict.fromkeys(name for images in split_images.values() for name in images)
    pd.DataFrame({"img_path": list(unique)}).to_csv(path, index=False)
