"""A data set of the field to documents, documents to a data set, or one to another.

    python -m conversion.convert_dataset --from vqa_rad --input FOLDER --output data
    python -m conversion.convert_dataset --from llava --input mix.json --output mix.jsonl \
        --image_folder pictures
    python -m conversion.convert_dataset --from documents --to sharegpt --input docs.jsonl \
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from medley.errors import DataLost, UserError
from medley.files import read_json, whole_file, whole_folder, write_json, write_manifest
from medley.formats import FORMATS, Choices, Format, RecordError, Sample
from medley.formats.conversion import Check, Tally, kept_line, samples
from medley.formats.files import writer
from medley.formats.splits import balanced, content_hashes, groups, half_of, leaks, paths_of
from medley.formats.tallies import PUBLISHED, Counts, SplitHash, domain_of
from medley.options import resolved, run_program

Name = Literal[
    "documents", "llava", "sharegpt", "medmax", "medtrinity", "vqa_rad", "slake", "pathvqa",
    "pmc_vqa", "science_qa", "text_qa", "text_qa_csv", "captions",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
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
    prompt_format: str = Choices.prompt_format
    dataset: str | None = None
    question_key: str = Choices.question_key
    answer_key: str = Choices.answer_key
    image_key: str = Choices.image_key
    caption_key: str = Choices.caption_key
    image_codes: Path | None = None
    id_key: str = Choices.id_key
    check: Check = "header"
    skip_bad: bool = False
    max_errors: int = 20
    stats: bool = False
    leaks: bool = True
    pictures: Path | None = None
    compat: Literal["none", "llava"] = "none"

    def __post_init__(self) -> None:
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise UserError(f"--test_share is {self.test_share}, expected above 0 and below 1")
        if self.test_share is not None and not self.is_folder:
            raise UserError(f"--test_share makes two files: name a folder, not {self.output}")
        if self.max_samples is not None and self.max_samples < 1:
            raise UserError(f"--max_samples is {self.max_samples}, expected 1 or more")
        if self.balance and self.max_samples is None:
            raise UserError("--balance needs --max_samples")
        if FORMATS[self.target].write is None:
            raise UserError(
                f"--to {self.target}: it can only be read; documents or llava hold as much"
            )

    @property
    def is_folder(self) -> bool:
        return not self.output.suffix

    def choices(self) -> Choices:
        usual = FORMATS[self.source].pictures_in
        folder = self.image_folder
        if folder is None and usual is not None:
            folder = usual(self.input)
        names = set(Choices.__dataclass_fields__) - {"path", "image_folder"}
        return Choices(self.input, folder, **{name: getattr(self, name) for name in names})


@dataclass
class Part:
    """What goes to one file."""

    add: Callable[[dict[str, Any]], None]
    hash: SplitHash = field(default_factory=SplitHash)
    pictures: dict[str, None] = field(default_factory=dict)  # in the order they come


@dataclass(frozen=True)
class Plan:
    """What was decided in a first pass: for each good record whether it is taken, and its half."""

    taken: NDArray[np.bool_] | None = None
    halves: list[str] | None = None


def work(options: Options) -> None:
    form, target = FORMATS[options.source], FORMATS[options.target]
    choices, tally, counts = options.choices(), Tally(), Counts()
    plan = make_plan(options, form, choices)
    files: set[str] = set()
    in_folder = options.is_folder
    listed = options.is_folder or options.pictures is not None
    with ExitStack() as stack:
        place, keep = stack.enter_context(outputs(options))
        parts: dict[str, Part] = {}
        for where, split, sample in chosen(options, form, choices, tally, keep, plan):
            assert target.write is not None
            name = split if in_folder else ""
            if name not in parts:
                add = stack.enter_context(writer(place(name, target), target, choices))
                parts[name] = Part(add)
            try:
                parts[name].add(target.write(sample, choices))
            except RecordError as error:
                tally.counts["bad"] += 1
                keep(where, f"--to {options.target}: {error}", None)
                continue
            tally.counts["written"] += 1
            counts.add(sample)
            parts[name].hash.add(sample.document)
            files.add(re.sub(r":( (record|problem) \S+|\d+)$", "", where))
            if listed:
                parts[name].pictures |= dict.fromkeys(paths_of(sample.document))
        refuse(options, tally)
        if options.is_folder:
            write_pictures(place("pictures", None), parts)
    finish(options, target, choices, tally, counts, parts, sorted(files))


def chosen(
    options: Options, form: Format, choices: Choices, tally: Tally, keep: Any, plan: Plan
) -> Iterator[tuple[str, str, Sample]]:
    """The samples to write, with the split that each goes to."""
    found = samples(form, choices, options.check, tally, keep)
    shown = tqdm(found, unit=" records", desc="converting")
    for number, (where, split, sample) in enumerate(shown):
        if plan.taken is None and number == options.max_samples:
            return
        if plan.taken is None or plan.taken[number]:
            half = split or "all" if plan.halves is None else plan.halves[number]
            yield where, half, sample


def make_plan(options: Options, form: Format, choices: Choices) -> Plan:
    """Reads everything once where a record's fate depends on the others."""
    if options.test_share is None and not options.balance:
        return Plan()
    paths: list[list[str]] = []
    concepts: list[str] = []
    found = samples(form, choices, options.check, Tally(), lambda *_: None)
    for _, _, sample in tqdm(found, unit=" records", desc="planning"):
        paths.append(paths_of(sample.document))
        concepts.append(domain_of(sample, options.balance_key))
    taken, halves = None, None
    if options.balance:
        assert options.max_samples is not None
        taken = balanced(concepts, options.max_samples, options.seed)
    if options.test_share is not None:
        hashes = content_hashes(path for own in paths for path in own)
        contents = [[hashes[path] for path in own] for own in paths]
        joined = groups(contents)
        halves = [
            half_of(joined[own[0]], options.test_share) if own else "train" for own in contents
        ]
    return Plan(taken, halves)


@contextmanager
def outputs(options: Options) -> Iterator[tuple[Callable[[str, Format | None], Path], Any]]:
    """Gives the place of each output file, and what keeps a bad record; the files get their names
    when all has gone well."""
    with ExitStack() as stack:
        folder = stack.enter_context(whole_folder(options.output)) if options.is_folder else None
        bad: dict[str, Any] = {}

        def place(name: str, form: Format | None) -> Path:
            suffix = "csv" if form is None else form.layout
            if folder is not None:
                return folder / f"{name}.{suffix}"
            return stack.enter_context(whole_file(options.output))

        def keep(where: str, reason: str, record: Any) -> None:
            kind = "withheld" if reason.startswith("needs credentials") else "bad"
            if kind not in bad:
                path = beside(options, kind, folder)
                temporary = path if folder is not None else stack.enter_context(whole_file(path))
                bad[kind] = stack.enter_context(open(temporary, "w", encoding="utf-8"))
                bad[f"{kind} count"] = 0
            bad[kind].write(kept_line(where, reason, record) + "\n")
            bad[f"{kind} count"] += 1
            if kind == "bad" and bad["bad count"] <= options.max_errors:
                tqdm.write(f"{where}: {reason}", file=sys.stderr)

        yield place, keep


def beside(options: Options, kind: str, folder: Path | None) -> Path:
    if folder is not None:
        return folder / f"{kind}.jsonl"
    return options.output.with_name(f"{options.output.name}.{kind}.jsonl")


def refuse(options: Options, tally: Tally) -> None:
    bad = tally.counts["bad"]
    if bad and not options.skip_bad:
        raise DataLost(
            f"{options.input}: {bad} of {tally.counts['records']} records are bad, "
            f"{min(bad, options.max_errors)} of them listed above; nothing was written (--skip_bad "
            "writes the rest)"
        )
    if not tally.counts["written"]:
        raise UserError(f"{options.input}: no record came through ({bad} bad)")


def write_pictures(path: Path, parts: dict[str, Part]) -> None:
    names = dict.fromkeys(name for part in parts.values() for name in part.pictures)
    pd.DataFrame({"img_path": list(names)}).to_csv(path, index=False)


def finish(
    options: Options, target: Format, choices: Choices, tally: Tally, counts: Counts,
    parts: dict[str, Part], files: list[str],
) -> None:  # fmt: skip
    if options.pictures is not None:
        with whole_file(options.pictures) as temporary:
            write_pictures(temporary, parts)
    if target.beside is not None:
        for name in [f"{n}.{target.layout}" if n else options.output.name for n in parts]:
            folder = options.output if options.is_folder else options.output.parent
            for other, entries in target.beside(name, choices).items():
                there = read_json(folder / other) if (folder / other).is_file() else {}
                write_json(folder / other, there | entries)
    hashes = {name: [part.hash.records, part.hash.hexadecimal()] for name, part in parts.items()}
    found = [] if len(parts) < 2 or not options.leaks else leaking(parts)
    write_manifest(
        options.output, resolved(options), [Path(file) for file in files], None,
        counts=dict(tally.counts), splits=hashes, statistics=counts.tables(), leaks=found,
    )  # fmt: skip
    print(f"{options.output}: {tally.counts['written']} of {tally.counts['records']} records")
    for name, (records, digest) in hashes.items():
        published = known(options, name, digest)
        print(f"  {name or options.split}: {records} records, hash {digest[:16]}{published}")
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


def known(options: Options, split: str, digest: str) -> str:
    records, published = PUBLISHED.get((options.source, split), (0, ""))
    if not published or options.test_share is not None or options.max_samples is not None:
        return ""
    return ", the published split" if digest == published else f", not the published {records}"


def leaking(parts: dict[str, Part]) -> list[str]:
    hashes = content_hashes(path for part in parts.values() for path in part.pictures)
    return [
        f"{leak.pictures} of {leak.of} pictures of {leak.part} stand in {leak.other}, too"
        for leak in leaks({name: part.pictures for name, part in parts.items()}, hashes)
    ]


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv  # `from` is no name for a field of Python
    argv = [re.sub(r"^--from(=|$)", r"--source\1", word) for word in words]
    argv = [re.sub(r"^--to(=|$)", r"--target\1", word) for word in argv]
    return run_program("conversion.convert_dataset", Options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
