"""A data set of the field to documents, documents to a data set, or one to another.

    medley convert --from vqa_rad --input FOLDER --output data
    medley convert --from llava --input mix.json --output mix.jsonl \
        --image_folder pictures
    medley convert --from documents --to sharegpt --input docs.jsonl \
        --output out.json

An --output with a suffix is one file; any other is a folder with a file for each published split
(or, with --test_share, for halves without a common picture) and `pictures.csv`, the list of its
pictures. Every bad record is named and counted, and nothing is written; with --skip_bad the rest
is, and the bad ones are kept beside it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
from tqdm import tqdm

from medley.datasets.conversion import Check, ConversionStats, rejected_record
from medley.datasets.readers import writer
from medley.datasets.registry import (
    FORMATS,
    ConversionConfig,
    FormatSpec,
    Name,
    RecordError,
    Sample,
)
from medley.datasets.splits import content_hashes, find_leaks, paths_of
from medley.datasets.splitting import plan_split, select_records
from medley.datasets.statistics import PUBLISHED, DatasetStats, SplitHash
from medley.errors import PartialFailure, UserError
from medley.utils.cli_options import Alias, resolved
from medley.utils.files import atomic_dir, atomic_file, escape_name, read_json, write_json
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class ConvertOptions:
    """Converts a data set.

    Args:
        source: format of the input
        target: format of the output
        input: its file, or its folder as published
        output: a file, or a folder for several splits
        image_folder: where pictures are named from; embedded ones are written there
        split: the published split to convert
        test_share: share of the pictures that are kept for testing, in place of published splits
        max_samples: most records to write, the first ones unless balanced
        balance: take the max_samples evenly over concepts
        balance_key: value of the records that names their concept; domain, organ or modality
        seed: seed of the choice
        prompt: question put to captions
        language: language of SLAKE's questions
        prompt_format: ScienceQA's prompt, what is asked and what is answered
        dataset: name in dataset_info.json
        question_key: column of the questions
        answer_key: column of the answers
        image_key: column of the pictures
        caption_key: column of the captions
        image_codes: codes by id for MedMax's rows that need credentials
        id_key: value that names these rows
        check: how pictures are looked at
        skip_bad: write the good records, keep the bad ones beside the output
        max_errors: bad records that are shown
        stats: print counts by domain, type of question and length
        leaks: compare the pictures of published splits by content
        pictures: also write the list of pictures to this file
        compat: llava for the published ScienceQA converter's mixed-up AL and AE
    """

    input: Path
    output: Path
    source: Name
    target: Name = "documents"
    image_folder: Path | None = None
    split: str = "all"
    test_share: float | None = None
    max_samples: int | None = None
    balance: bool = False
    balance_key: str | None = None
    seed: int = 0
    prompt: str | None = None
    language: Literal["all", "en", "zh"] = "all"
    prompt_format: str = ConversionConfig.prompt_format
    dataset: str | None = None
    question_key: str = ConversionConfig.question_key
    answer_key: str = ConversionConfig.answer_key
    image_key: str = ConversionConfig.image_key
    caption_key: str = ConversionConfig.caption_key
    image_codes: Path | None = None
    id_key: str = ConversionConfig.id_key
    check: Check = "header"
    skip_bad: bool = False
    max_errors: int = 20
    stats: bool = False
    leaks: bool = True
    pictures: Path | None = None
    compat: Literal["none", "llava"] = "none"

    spelling: ClassVar = {"source": "from", "target": "to"}  # `from` is a reserved word of Python
    aliases: ClassVar = {"source": Alias("from"), "target": Alias("to")}

    def __post_init__(self) -> None:
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise UserError(f"--test_share is {self.test_share}, expected above 0 and below 1")
        if self.test_share is not None and not self.is_folder:
            raise UserError(f"--test_share makes two files: name a folder, not {self.output}")
        if self.max_samples is not None and self.max_samples < 1:
            raise UserError(f"--max_samples is {self.max_samples}, expected 1 or more")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}, expected 0 or more")
        if self.balance and self.max_samples is None:
            raise UserError("--balance needs --max_samples")
        if FORMATS[self.target].write is None:
            raise UserError(
                f"--to {self.target}: it can only be read; documents or llava hold as much"
            )

    @property
    def is_folder(self) -> bool:
        return not self.output.suffix

    def choices(self) -> ConversionConfig:
        usual = FORMATS[self.source].images_in
        folder = self.image_folder
        if folder is None and usual is not None:
            folder = usual(self.input)
        names = set(ConversionConfig.__dataclass_fields__) - {"path", "image_folder"}
        return ConversionConfig(self.input, folder, **{name: getattr(self, name) for name in names})


@dataclass
class Part:
    """A split, or a half."""

    hash: SplitHash = field(default_factory=SplitHash)
    pictures: dict[str, None] = field(default_factory=dict)  # in the order they come


class Conversion:
    """What is written, and known of it, while records go by."""

    def __init__(self, options: ConvertOptions, place: Any, keep: Any, stack: ExitStack) -> None:
        self.options, self.target, self.choices = (
            options,
            FORMATS[options.target],
            options.choices(),
        )
        self.place, self.keep, self.stack = place, keep, stack
        self.in_folder = options.is_folder
        self.tally, self.counts = ConversionStats(), DatasetStats()
        self.parts: dict[str, Part] = {}
        self.writers: dict[str, Any] = {}  # by the name of their file
        self.inputs: set[str] = set()

    def add(self, where: str, split: str, record: Any, sample: Sample) -> None:
        """Writes a sample to the file of its split; what the target cannot hold is a bad record."""
        if not self.in_folder and self.options.split == "all" and split != "all":
            sample = replace(sample, fields={**sample.fields, "split": split})  # all in one file
        try:
            assert self.target.write is not None
            row = self.target.write(sample, self.choices)
            self._writer(split if self.in_folder else "")(row)
        except RecordError as error:
            self.tally.counts["bad"] += 1
            self.keep(where, f"--to {self.options.target}: {error}", record)
            return
        self.tally.counts["written"] += 1
        self.inputs.add(re.sub(r":( (record|problem) .*|\d+)$", "", where))
        self._count(split, sample, row)

    def _writer(self, name: str) -> Any:
        if name not in self.writers:
            opened = writer(self.place(name, self.target), self.target, self.choices)
            self.writers[name] = self.stack.enter_context(opened)
        return self.writers[name]

    def _count(self, split: str, sample: Sample, row: dict[str, Any]) -> None:
        if self.target.layout == "csv" and (unwritten := set(sample.fields) - set(row)):
            names = ", ".join(sorted(unwritten))
            self.tally.remarks[f"values that CSV has no place for, {names}"] += 1
        self.counts.add(sample)
        part = self.parts.setdefault(split, Part())
        part.hash.add(sample.document)
        if self.in_folder or self.options.pictures is not None or split != "all":
            part.pictures |= dict.fromkeys(paths_of(sample.document))

    def describe(self, beside: dict[str, dict[str, Any]]) -> None:
        """Adds the written files to what the target puts beside them."""
        folder = self.options.output if self.in_folder else self.options.output.parent
        for name, entries in beside.items():
            for part in self.writers:
                own = f"{part}.{self.target.layout}" if self.in_folder else self.options.output.name
                assert self.target.beside is not None
                entries |= self.target.beside(own, self.choices)[name]
            write_json(folder / name, entries)


def convert(options: ConvertOptions) -> None:
    form = FORMATS[options.source]
    if options.split != "all" and not form.splits:
        raise UserError(f"--split {options.split}: {options.source} is published without splits")
    described = entries_beside(options, FORMATS[options.target])
    plan = plan_split(
        form, options.choices(), options.check, options.test_share,
        options.max_samples if options.balance else None, options.balance_key, options.seed,
    )  # fmt: skip
    with ExitStack() as stack:
        place, keep = stack.enter_context(outputs(options))
        done = Conversion(options, place, keep, stack)
        found = select_records(form, done.choices, options.check, done.tally, keep, plan)
        for where, split, record, sample in tqdm(found, unit=" records", desc="converting"):
            done.add(where, split, record, sample)
            if plan.taken is None and done.tally.counts["written"] == options.max_samples:
                break
        refuse(options, done.tally)
        if options.test_share is not None and len(done.parts) < 2:
            raise UserError(
                f"--test_share {options.test_share}: all records fell into one half; there are too "
                "few pictures (or texts)"
            )
        if options.is_folder:
            write_pictures(place("pictures", None), done.parts)
        find_leaks = leaking(done.parts) if len(done.parts) > 1 and options.leaks else []
    done.describe(described)
    finish(done, find_leaks)


def entries_beside(options: ConvertOptions, target: FormatSpec) -> dict[str, dict[str, Any]]:
    """What stands already in the files that the target puts beside its own, by their names."""
    if target.beside is None:
        return {}
    folder = options.output if options.is_folder else options.output.parent
    found = {}
    for name in target.beside(options.output.name, options.choices()):
        found[name] = read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(found[name], dict):
            raise UserError(f"{folder / name}: no object, and an entry is to be added to it")
    return found


@contextmanager
def outputs(
    options: ConvertOptions,
) -> Iterator[tuple[Callable[[str, FormatSpec | None], Path], Any]]:
    """Gives the place of each output file, and what keeps a bad record; the files get their names
    when all has gone well."""
    with ExitStack() as stack:
        folder = stack.enter_context(atomic_dir(options.output)) if options.is_folder else None
        kept: dict[str, Any] = {}
        count = 0

        def place(name: str, form: FormatSpec | None) -> Path:
            suffix = "csv" if form is None else form.layout
            if folder is not None:
                return folder / f"{name}.{suffix}"
            return stack.enter_context(atomic_file(options.output))

        def keep(where: str, reason: str, record: Any) -> None:
            nonlocal count
            kind = "withheld" if reason.startswith("needs credentials") else "bad"
            if kind not in kept:
                path = beside(options, kind, folder)
                temporary = path if folder is not None else stack.enter_context(atomic_file(path))
                kept[kind] = stack.enter_context(open(temporary, "w", encoding="utf-8"))
            kept[kind].write(rejected_record(where, reason, record) + "\n")
            count += kind == "bad"
            if kind == "bad" and count <= options.max_errors:
                tqdm.write(f"{where}: {escape_name(reason)}", file=sys.stderr)

        yield place, keep
        for kind in {"bad", "withheld"} - set(kept) if folder is None else ():
            beside(options, kind, None).unlink(missing_ok=True)  # of an earlier run


def beside(options: ConvertOptions, kind: str, folder: Path | None) -> Path:
    if folder is not None:
        return folder / f"{kind}.jsonl"
    return options.output.with_name(f"{options.output.name}.{kind}.jsonl")


def refuse(options: ConvertOptions, tally: ConversionStats) -> None:
    bad = tally.counts["bad"]
    if bad and not options.skip_bad:
        raise PartialFailure(
            f"{options.input}: {bad} of {tally.counts['records']} records are bad, "
            f"{min(bad, options.max_errors)} of them listed above; nothing was written (--skip_bad "
            "writes the rest)"
        )
    if not tally.counts["written"]:
        raise UserError(f"{options.input}: no record came through ({bad} bad)")


def write_pictures(path: Path, parts: dict[str, Part]) -> None:
    names = dict.fromkeys(name for part in parts.values() for name in part.pictures)
    pd.DataFrame({"img_path": list(names)}).to_csv(path, index=False)


def finish(done: Conversion, found: list[str]) -> None:
    """The manifest, and what a person wants to know."""
    options, tally, counts, parts = done.options, done.tally, done.counts, done.parts
    if options.pictures is not None:
        with atomic_file(options.pictures) as temporary:
            write_pictures(temporary, parts)
    hashes = {name: [part.hash.records, part.hash.hexadecimal()] for name, part in parts.items()}
    write_manifest(
        options.output, resolved(options), [Path(file) for file in sorted(done.inputs)], None,
        counts=dict(tally.counts), splits=hashes, statistics=counts.tables(), leaks=found,
    )  # fmt: skip
    print(f"{options.output}: {tally.counts['written']} of {tally.counts['records']} records")
    for name, (records, digest) in hashes.items():
        published = known(options, name, digest)
        print(f"  {name}: {records} records, hash {digest[:16]}{published}")
    print("".join(f"  {line}\n" for line in found), end="")
    for remark, number in tally.remarks.items():
        print(f"  {remark}: {number} times")
    if repeated := tally.duplicates.count():
        print(f"  {repeated} records have an id that another one has, too")
    if tally.counts["withheld"]:
        print(f"  {tally.counts['withheld']} records need credentials: listed, not written")
    if options.stats:
        for table, rows in counts.tables().items():
            print(f"{table}:")
            print("".join(f"  {number:>9,}  {row}\n" for row, number in rows.items()), end="")
    if tally.counts["bad"]:
        print(f"  {tally.counts['bad']} bad records are kept beside it")
    if torn := tally.counts["files not read to their end"]:
        raise PartialFailure(
            f"{torn} files could not be read to their end: what stands behind is not there"
        )


def known(options: ConvertOptions, split: str, digest: str) -> str:
    records, published = PUBLISHED.get((options.source, split), (0, ""))
    if not published or options.test_share is not None or options.max_samples is not None:
        return ""
    return ", the published split" if digest == published else f", not the published {records}"


def leaking(parts: dict[str, Part]) -> list[str]:
    hashes, failed = content_hashes(path for part in parts.values() for path in part.pictures)
    lines = [
        f"{leak.pictures} of {leak.of} pictures of {leak.part} stand in {leak.other}, too"
        for leak in find_leaks({name: part.pictures for name, part in parts.items()}, hashes)
    ]
    return [*lines, f"{len(failed)} pictures could not be read and compared"] if failed else lines
