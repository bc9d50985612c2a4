"""Documents to token sequences, in constant memory.

In: a JSONL file of documents and, for pictures without codes, a folder of code shards. Out:
JSONL (the line plus `tokens`, as MedMax writes it) or, by the name `*.parquet`, Parquet; a
manifest and a report of what went through.

    medley tokenize --input_file docs.jsonl --image_codes codes \
        --tokenizer_file CKPT/tokenizer/text_tokenizer.json --output_file tokens.jsonl

Every line is looked at before the first complaint: bad ones are listed with their numbers, and
nothing is written. With --skip_bad_lines the rest is written, and the bad ones are kept in
OUTPUT.bad_lines.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from tqdm import tqdm

from medley.data.document_tokenizer import (
    LARGEST_LINE,
    DocumentTokenizer,
    DocumentTooLong,
    MissingCodes,
    Overflow,
)
from medley.data.token_dataset import ParquetOutput, json_line, parquet_batch
from medley.errors import PartialFailure, UserError
from medley.utils.cli_options import resolved
from medley.utils.files import atomic_file
from medley.utils.jsonl import LineRange, line_ranges
from medley.utils.manifest import read_manifest, write_manifest
from medley.utils.parallel import ordered_map


@dataclass(frozen=True)
class TokenizeOptions:
    """Turns documents into token sequences.

    Args:
        input_file: JSONL file of documents
        tokenizer_file: text_tokenizer.json of the checkpoint
        output_file: tokens file, .jsonl or .parquet
        image_codes: folder of code shards, for pictures that carry no codes in their line
        num_workers: processes; one for every core if not given
        max_length: longest sequence that is let through
        overflow: what happens to a longer one; error, drop, or trim_text, which cuts words and
            never a picture
        skip_bad_lines: write the good lines, keep the bad ones beside the output
        max_errors: bad lines that are listed
        compat: medmax parses every mark in a text, repeats one picture at each place and
            leaves codes unchecked, as MedMax's program does
    """

    input_file: Path
    tokenizer_file: Path
    output_file: Path
    image_codes: Path | None = None
    num_workers: int | None = None
    max_length: int | None = None
    overflow: Overflow = "error"
    skip_bad_lines: bool = False
    max_errors: int = 20
    compat: Literal["none", "medmax"] = "none"

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"--max_length is {self.max_length}, expected 2 or more")
        if self.output_file.suffix not in (".jsonl", ".parquet"):
            raise UserError(f"--output_file {self.output_file}: expected .jsonl or .parquet")

    @property
    def parquet(self) -> bool:
        return self.output_file.suffix == ".parquet"

    @property
    def bad_lines(self) -> Path:
        return self.output_file.with_name(f"{self.output_file.name}.bad_lines.jsonl")


@dataclass
class Result:
    """What became of one range of lines."""

    output: bytes | pa.RecordBatch
    counts: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # by the next power of two
    bad: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0  # bytes of the range

    def add(self, other: Result) -> None:
        self.counts.update(other.counts)
        self.counts["bad lines"] += len(other.bad)
        self.lengths.update(other.lengths)


_job: tuple[DocumentTokenizer, Path, bool]  # of this process


def _start(options: TokenizeOptions) -> None:
    global _job
    lines = DocumentTokenizer(
        options.tokenizer_file, options.image_codes, options.max_length, options.overflow,
        options.compat,
    )  # fmt: skip
    _job = lines, options.input_file, options.parquet


def _tokenize(where: LineRange) -> Result:
    """One range of lines, in a worker process."""
    tokenize, path, parquet = _job
    result = Result(parquet_batch([]) if parquet else b"", size=where.length)
    rows: list[dict[str, Any]] = []
    if where.length > LARGEST_LINE:  # one line, which is not even read
        reason = f"a line of {where.length} bytes, the limit is {LARGEST_LINE}"
        result.bad.append({"line": where.first_line, "error": reason, "content": None})
        return result
    for number, line in where.lines(path):
        try:
            done = tokenize(line)
        except UserError as error:
            result.counts["missing pictures"] += isinstance(error, MissingCodes)
            result.counts["too long"] += isinstance(error, DocumentTooLong)
            content = line.decode("utf-8", errors="backslashreplace")
            result.bad.append({"line": number, "error": str(error), "content": content})
            continue
        if done is None:
            result.counts["dropped as too long"] += 1
            continue
        result.counts.update({
            "documents": 1, "tokens": len(done.ids), "pictures": done.pictures,
            "image tokens": done.image_tokens, "pictures with codes in their line": done.own_codes,
            "trimmed documents": bool(done.trimmed), "trimmed tokens": done.trimmed,
        })  # fmt: skip
        result.lengths[1 << (len(done.ids) - 1).bit_length()] += 1
        rows.append({**done.row, "tokens": done.ids})
    if parquet:
        result.output = parquet_batch(rows)
    else:
        # Ours are checked by now; MedMax's codes are not.
        checked = ("tokens", "image_tokens") if tokenize.compat == "none" else ("tokens",)
        result.output = "".join(json_line(row, checked) + "\n" for row in rows).encode()
    return result


def tokenize(options: TokenizeOptions) -> None:
    if not options.input_file.is_file():
        raise UserError(f"{options.input_file}: no such file")
    workers = options.num_workers if options.num_workers is not None else os.cpu_count() or 1
    total = Result(b"")
    with (
        _output(options) as write,
        _side_file(options) as keep,
        tqdm(
            total=options.input_file.stat().st_size, unit="B", unit_scale=True, desc="tokenizing"
        ) as progress,
    ):
        ranges = line_ranges(options.input_file)
        for result in ordered_map(_tokenize, ranges, workers, partial(_start, options)):
            write(result.output)
            keep(result.bad)
            _complain(options, result, total.counts["bad lines"])
            total.add(result)
            progress.update(result.size)
        _refuse(options, total.counts)  # before the output gets its name
    _finish(options, total)


@contextmanager
def _output(options: TokenizeOptions) -> Iterator[Callable[[Any], object]]:
    """Gives what writes an output; the file gets its name when all has gone well."""
    with atomic_file(options.output_file) as temporary:
        if options.parquet:
            with ParquetOutput(temporary) as write:
                yield write
        else:
            with open(temporary, "wb") as file:
                yield file.write


@contextmanager
def _side_file(options: TokenizeOptions) -> Iterator[Callable[[list[dict[str, Any]]], object]]:
    if not options.skip_bad_lines:
        yield lambda bad: None
        return
    with (
        atomic_file(options.bad_lines) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        yield lambda bad: file.writelines(f"{json.dumps(b, ensure_ascii=False)}\n" for b in bad)


def _complain(options: TokenizeOptions, result: Result, before: int) -> None:
    for bad in result.bad[: max(0, options.max_errors - before)]:
        tqdm.write(f"{options.input_file}:{bad['line']}: {bad['error']}", file=sys.stderr)


def _refuse(options: TokenizeOptions, counts: Counter[str]) -> None:
    bad = counts["bad lines"]
    if bad and not options.skip_bad_lines:
        raise PartialFailure(
            f"{options.input_file}: {bad} bad lines, {min(bad, options.max_errors)} of them listed "
            f"above ({counts['missing pictures']} lack codes of a picture, {counts['too long']} "
            "are too long); nothing was written (--skip_bad_lines writes the rest)"
        )
    if not counts["documents"]:
        raise UserError(f"{options.input_file}: no documents came through")


def _finish(options: TokenizeOptions, total: Result) -> None:
    counts = total.counts
    source = {} if options.image_codes is None else read_manifest(options.image_codes)
    if counts["pictures with codes in their line"]:
        source = {}  # nobody can know whose codes those are
    inputs = [options.input_file, options.tokenizer_file]
    lengths = {str(length): n for length, n in sorted(total.lengths.items())}
    write_manifest(
        options.output_file, resolved(options), inputs, source.get("token_space"),
        fit=source.get("fit"), counts=dict(counts), lengths=lengths,
    )  # fmt: skip
    words = counts["tokens"] - counts["image tokens"]
    print(
        f"{options.output_file}: {counts['documents']} documents, {counts['tokens']} tokens "
        f"({words} of text, {counts['image tokens']} of {counts['pictures']} pictures)"
    )
    print(
        f"{counts['dropped as too long']} documents dropped as too long, "
        f"{counts['trimmed documents']} trimmed by {counts['trimmed tokens']} tokens, "
        f"{counts['bad lines']} bad lines"
    )
    print(f"{'tokens up to':>14}  documents")
    for length, documents in sorted(total.lengths.items()):
        bar = "#" * round(40 * documents / counts["documents"])
        print(f"{length:>14}  {documents:<10} {bar}")
    if counts["bad lines"]:
        print(f"bad lines: {options.bad_lines}")
