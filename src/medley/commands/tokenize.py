"""Tokenizes documents, in constant memory.

In: a JSON Lines file of documents and, for images without codes in their line, a folder of image
codes. Out: JSON Lines (the line plus `tokens`, as MedMax writes it) or, for the suffix .parquet,
Parquet; a manifest; a report.

    medley tokenize --input_file docs.jsonl --image_codes codes \
        --tokenizer_file CKPT/tokenizer/text_tokenizer.json --output_file tokens.jsonl

All lines are checked. Bad lines are listed with their numbers, and then nothing is written. With
`--on_error skip`, the good lines are written, and the bad lines go to OUTPUT.bad_lines.jsonl.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from tqdm import tqdm

from medley.data.document_tokenizer import Compat, DocumentTokenizer, Overflow
from medley.data.file_tokenizer import BadLine, TokenizationStats, tokenize_file
from medley.data.token_dataset import TokenParquetWriter
from medley.errors import PartialFailure, UserError
from medley.utils.cli_options import Alias, resolved
from medley.utils.files import atomic_file
from medley.utils.jsonl import jsonl_line
from medley.utils.manifest import read_manifest, read_preprocessing, write_manifest


@dataclass(frozen=True)
class TokenizeOptions:
    """Tokenizes documents.

    Args:
        input_file: JSON Lines file of documents
        tokenizer_file: text_tokenizer.json of the checkpoint
        output_file: token file, .jsonl or .parquet
        image_codes: folder of image codes, for images without codes in their line
        num_workers: processes; by default, one per core
        max_length: maximum number of tokens of a document
        overflow: treatment of longer documents; error, drop, or trim_text, which removes text
            tokens and never an image
        on_error: fail (write nothing) or skip (write the good lines, and the bad lines to
            OUTPUT.bad_lines.jsonl)
        max_errors: maximum number of bad lines to list
        compat: medmax parses all special tokens in a text, inserts one image at every placeholder
            and does not check image codes, as MedMax's program does
    """

    aliases: ClassVar = {
        "skip_bad_lines": Alias("on_error", when_set="skip", when_unset="fail")  # alias
    }

    input_file: Path
    tokenizer_file: Path
    output_file: Path
    image_codes: Path | None = None
    num_workers: int | None = None
    max_length: int | None = None
    overflow: Overflow = "error"
    on_error: Literal["fail", "skip"] = "fail"
    max_errors: int = 20
    compat: Compat = "none"

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"--max_length: Too small (got {self.max_length}, expected 2 or more).")
        if self.output_file.suffix not in (".jsonl", ".parquet"):
            raise UserError(
                f"--output_file {self.output_file}: Unsupported suffix (expected .jsonl or "
                ".parquet)."
            )

    @property
    def parquet(self) -> bool:
        return self.output_file.suffix == ".parquet"

    @property
    def bad_lines_file(self) -> Path:
        return self.output_file.with_name(f"{self.output_file.name}.bad_lines.jsonl")


def tokenize(options: TokenizeOptions) -> None:
    if not options.input_file.is_file():
        raise UserError(f"{options.input_file}: File not found.")
    make_tokenizer = partial(
        DocumentTokenizer, options.tokenizer_file, options.image_codes, options.max_length,
        options.overflow, options.compat,
    )  # fmt: skip
    workers = options.num_workers if options.num_workers is not None else os.cpu_count() or 1
    size = options.input_file.stat().st_size
    total = TokenizationStats()
    with (
        _open_output(options) as write,
        _open_bad_lines(options) as write_bad_lines,
        tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing") as progress,
    ):
        for result in tokenize_file(options.input_file, make_tokenizer, options.parquet, workers):
            write(result.output)
            write_bad_lines(result.bad_lines)
            for bad in result.bad_lines[: max(0, options.max_errors - total.bad_lines)]:
                tqdm.write(f"{options.input_file}:{bad.line}: {bad.error}", file=sys.stderr)
            total.merge(result.stats)
            progress.update(result.num_bytes)
        _check_result(options, total)  # an error here discards the temporary output
    _write_manifest(options, total)
    print(f"{options.output_file}: {total.report()}")
    if total.bad_lines:
        print(f"bad lines: {options.bad_lines_file}")


@contextmanager
def _open_output(options: TokenizeOptions) -> Iterator[Callable[[Any], object]]:
    """Yields a function that writes to the output. An exception discards the output."""
    with atomic_file(options.output_file) as temporary:
        if options.parquet:
            with TokenParquetWriter(temporary) as writer:
                yield writer.write
        else:
            with open(temporary, "wb") as file:
                yield file.write


@contextmanager
def _open_bad_lines(
    options: TokenizeOptions,
) -> Iterator[Callable[[Sequence[BadLine]], object]]:
    if options.on_error == "fail":
        yield lambda bad_lines: None
        return
    with (
        atomic_file(options.bad_lines_file) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        yield lambda bad_lines: file.writelines(jsonl_line(asdict(bad)) for bad in bad_lines)


def _check_result(options: TokenizeOptions, total: TokenizationStats) -> None:
    if total.bad_lines and options.on_error == "fail":
        raise PartialFailure(
            f"{options.input_file}: {total.bad_lines} bad lines, "
            f"{min(total.bad_lines, options.max_errors)} of them listed above "
            f"({total.missing_image_codes} without codes of an image, {total.too_long} too long). "
            "Nothing was written. Use --on_error skip to write the other lines."
        )
    if not total.documents:
        raise UserError(f"{options.input_file}: The file has no documents to write.")
    answers = total.answers
    if answers["empty"] and answers["empty"] == answers["all"] - answers["untrained"]:
        raise UserError(
            f"{options.input_file}: All {answers['empty']} answers are empty, so there is nothing "
            "to learn. Check the names of the keys in the documents."
        )
    if answers["untrained documents"] == total.documents:
        raise UserError(
            f"{options.input_file}: All answers have the weight 0, so there is nothing to learn."
        )


def _write_manifest(options: TokenizeOptions, total: TokenizationStats) -> None:
    source = {} if options.image_codes is None else read_manifest(options.image_codes)
    if total.images_with_inline_codes:
        source = {}  # the VQGAN of codes in the documents file is unknown
    inputs = [options.input_file, options.tokenizer_file]
    lengths = {str(length): count for length, count in sorted(total.lengths.items())}
    write_manifest(
        options.output_file, resolved(options), inputs, source.get("token_space"),
        **read_preprocessing(source), counts=total.counts(), lengths=lengths,
        answers=dict(total.answers), remarks=dict(total.remarks),
    )  # fmt: skip
