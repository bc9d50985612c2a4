"""A documents file -> token sequences, in several processes, in constant memory.

The file is cut into ranges of lines. Each worker converts ranges to a piece of the output file, and
the results come in the order of the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from medley.data.document_tokenizer import (
    DocumentTokenizer,
    DocumentTooLong,
    MissingImageCodes,
    TokenizedDocument,
    check_line_length,
)
from medley.data.token_dataset import fast_json, to_record_batch
from medley.errors import UserError
from medley.utils.jsonl import LineRange, line_ranges
from medley.utils.parallel import ordered_map


@dataclass
class TokenizationStats:
    """Totals of a tokenized file.

    Attributes:
        image_tokens: image tokens with the begin and end tokens of images
        images_with_inline_codes: images whose codes are in the documents file itself
        dropped_documents: documents left out by `--overflow drop`
        bad_lines: lines with an error, of which `missing_image_codes` and `too_long` are parts
        lengths: number of documents by length, rounded up to a power of two
        answers: assistant turns (`all`), those without text and images (`empty`), turns of weight 0
            (`untrained`), and documents without a turn to train on (`untrained documents`)
        remarks: how often each note on a line occurs
    """

    documents: int = 0
    tokens: int = 0
    images: int = 0
    image_tokens: int = 0
    images_with_inline_codes: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0
    dropped_documents: int = 0
    bad_lines: int = 0
    missing_image_codes: int = 0
    too_long: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)

    def add_document(self, document: TokenizedDocument) -> None:
        self.documents += 1
        self.tokens += len(document.ids)
        self.images += document.images
        self.image_tokens += document.image_tokens
        self.images_with_inline_codes += document.images_with_inline_codes
        self.truncated_documents += bool(document.truncated_tokens)
        self.truncated_tokens += document.truncated_tokens
        self.answers.update({
            "all": document.answers, "empty": document.empty_answers,
            "untrained": len(document.untrained_turns),
            "untrained documents": int(document.is_untrained),
        })  # fmt: skip
        self.remarks.update(document.remarks)
        self.lengths[1 << (len(document.ids) - 1).bit_length()] += 1

    def add_error(self, error: UserError) -> None:
        self.bad_lines += 1
        self.missing_image_codes += isinstance(error, MissingImageCodes)
        self.too_long += isinstance(error, DocumentTooLong)

    def merge(self, other: TokenizationStats) -> None:
        for own in fields(self):
            setattr(self, own.name, getattr(self, own.name) + getattr(other, own.name))

    def counts(self) -> dict[str, int]:
        """All totals except `lengths`, `answers` and `remarks`."""
        values = {own.name: getattr(self, own.name) for own in fields(self)}
        return {name: int(v) for name, v in values.items() if not isinstance(v, Counter)}

    def report(self) -> str:
        """The totals and a histogram of the lengths, as text."""
        text_tokens = self.tokens - self.image_tokens
        lines = [
            f"{self.documents} documents, {self.tokens} tokens ({text_tokens} text tokens, "
            f"{self.image_tokens} image tokens of {self.images} images)",
            f"{self.dropped_documents} documents dropped because they are too long, "
            f"{self.truncated_documents} truncated by {self.truncated_tokens} tokens, "
            f"{self.bad_lines} bad lines",
        ]
        if self.answers["untrained"]:
            lines.append(
                f"{self.answers['untrained']} turns are not trained on (weight 0); "
                f"{self.answers['untrained documents']} documents have no other answer"
            )
        lines += [f"{remark}: {number} times" for remark, number in self.remarks.most_common()]
        lines.append(f"{'tokens up to':>14}  documents")
        for length, documents in sorted(self.lengths.items()):
            bar = "#" * round(40 * documents / self.documents)
            lines.append(f"{length:>14}  {documents:<10} {bar}")
        return "\n".join(lines)


@dataclass(frozen=True)
class BadLine:
    """A rejected line. `content` is None for a line too long to read."""

    line: int
    error: str
    content: str | None


@dataclass
class TokenizedRange:
    """The result of one range of lines: a piece of the output file, totals, rejected lines."""

    output: bytes | pa.RecordBatch
    num_bytes: int  # of the input
    stats: TokenizationStats = field(default_factory=TokenizationStats)
    bad_lines: list[BadLine] = field(default_factory=list)


def tokenize_file(
    path: Path,
    make_tokenizer: Callable[[], DocumentTokenizer],
    parquet: bool,
    num_workers: int,
) -> Iterator[TokenizedRange]:
    """Tokenizes all lines of a file, in order.

    `output` of each result is a record batch for Parquet (`parquet`), or lines of JSON.
    """
    prepare = partial(_prepare_worker, path, make_tokenizer, parquet)
    return ordered_map(_tokenize_range, line_ranges(path), num_workers, prepare)


_worker: tuple[Path, DocumentTokenizer, bool]  # arguments of this process


def _prepare_worker(
    path: Path, make_tokenizer: Callable[[], DocumentTokenizer], parquet: bool
) -> None:
    global _worker
    _worker = path, make_tokenizer(), parquet


def _tokenize_range(where: LineRange) -> TokenizedRange:
    path, tokenizer, parquet = _worker
    result = TokenizedRange(to_record_batch([]) if parquet else b"", where.length)

    def reject(number: int, error: UserError, content: str | None) -> None:
        result.stats.add_error(error)
        result.bad_lines.append(BadLine(number, str(error), content))

    try:  # a range longer than the limit is a single line, which is not read
        check_line_length(where.length)
    except UserError as error:
        reject(where.first_line, error, None)
        return result
    rows: list[dict[str, Any]] = []
    for number, line in where.lines(path):
        try:
            document = tokenizer(line)
        except UserError as error:
            reject(number, error, line.decode("utf-8", errors="backslashreplace"))
            continue
        if document is None:
            result.stats.dropped_documents += 1
            continue
        result.stats.add_document(document)
        rows.append(document.output_row())
    if parquet:
        result.output = to_record_batch(rows)
    else:
        # With --compat medmax, the image codes of a line are not checked.
        id_fields = ("tokens", "image_tokens") if tokenizer.compat == "none" else ("tokens",)
        result.output = "".join(fast_json(row, id_fields) + "\n" for row in rows).encode()
    return result
