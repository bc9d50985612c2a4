"""Checks of documents and token files: statistics, and an error for each bad line."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medley.data.document import Document, DocumentError, assistant_spans
from medley.data.document_json import EMPTY_ANSWER, is_empty_answer, read_document
from medley.data.document_tokenizer import DocumentTokenizer, parse_line
from medley.data.token_dataset import UNTRAINED_TURNS, check_untrained_turns, read_token_rows
from medley.data.vocabulary import Vocabulary
from medley.utils.jsonl import line_ranges


def read_unparsed(path: Path) -> Iterator[tuple[str, Any]]:
    """Location and content of each document: a line as bytes, or a row of a Parquet file."""
    if path.suffix == ".parquet":
        yield from read_token_rows(path)
        return
    for where in line_ranges(path):
        for number, line in where.lines(path):
            yield f"{path}:{number}", line


@dataclass(frozen=True)
class CheckedDocument:
    row: dict[str, Any]
    document: Document
    ids: list[int]
    untrained_turns: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()

    def trained_spans(self, vocabulary: Vocabulary) -> list[tuple[int, int]]:
        """Half-open ranges of positions that training uses by default."""
        return assistant_spans(self.ids, vocabulary, self.untrained_turns)


def check_document(content: Any, tokenizer: DocumentTokenizer) -> CheckedDocument:
    """Parses and tokenizes a line or a row. Raises UserError that describes the error."""
    row = parse_line(content) if isinstance(content, bytes) else content
    if not (isinstance(row, dict) and "tokens" in row):
        tokenized = tokenizer.tokenize(row)
        assert tokenized is not None  # only --overflow drop returns None
        return CheckedDocument(
            row, read_document(row).document, tokenized.ids, tokenized.untrained_turns,
            tokenized.remarks,
        )  # fmt: skip
    ids = row["tokens"]
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        raise DocumentError("'tokens' is not a list of integers.")
    limit = tokenizer.max_length
    if limit is not None and len(ids) > limit:
        raise DocumentError(f"The document has {len(ids)} tokens (--max_length is {limit}).")
    check_untrained_turns(row, "The row")
    untrained = tuple(row.get(UNTRAINED_TURNS) or ())
    document = Document.from_ids(ids, tokenizer.tokenizer)
    if untrained and max(untrained) >= len(document.turns):
        raise DocumentError(
            f"{UNTRAINED_TURNS!r} has a turn that does not exist (got {max(untrained)}, expected "
            f"less than {len(document.turns)})."
        )
    document = Document(tuple(
        replace(turn, trained=number not in untrained)
        for number, turn in enumerate(document.turns)
    ))  # fmt: skip
    remarks = (EMPTY_ANSWER,) * sum(map(is_empty_answer, document.turns))
    return CheckedDocument(row, document, ids, untrained, remarks)


@dataclass
class ValidationStats:
    """Totals of a checked file. `codes_per_image` counts the images by their number of codes."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    codes_per_image: Counter[int] = field(default_factory=Counter)
    shortest: int = sys.maxsize
    longest: int = 0

    def add(self, checked: CheckedDocument, vocabulary: Vocabulary) -> None:
        ids = checked.ids
        starts = [i for i, token in enumerate(ids) if token == vocabulary.begin_image]
        sizes = [ids.index(vocabulary.end_image, start) - start - 1 for start in starts]
        spans = checked.trained_spans(vocabulary)
        self.codes_per_image.update(sizes)
        self.counts.update({
            "documents": 1, "turns": len(checked.document.turns), "images": len(sizes),
            "tokens": len(ids), "image tokens": sum(sizes) + 2 * len(sizes),
            "trained tokens": sum(end - start for start, end in spans),
            f"documents of task {checked.row.get('task')}": 1,
            f"documents of source {checked.row.get('source')}": 1,
        })  # fmt: skip
        self.counts.update(checked.remarks)
        if checked.untrained_turns:
            self.counts["turns that are not trained on (weight 0)"] += len(checked.untrained_turns)
        self.shortest = min(self.shortest, len(ids))
        self.longest = max(self.longest, len(ids))

    def summary(self) -> list[tuple[str, str]]:
        """Names and values of all totals, for a report."""
        counts = {**self.counts, **({"errors": self.errors} if self.errors else {})}
        rows = [(name, str(count)) for name, count in sorted(counts.items())]
        if self.counts["documents"]:
            rows.append(("tokens per document", f"{self.shortest} to {self.longest}"))
        return rows
