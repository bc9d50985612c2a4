"""Checks documents or tokens: counts, every error with its line, and what will be learned.

In: a JSONL file of documents, or a tokens file (JSONL with `tokens`, or Parquet). Out: a report;
with --html a page of the first documents with their pictures.

    medley validate --input_file docs.jsonl --image_codes codes \
        --tokenizer_file CKPT/tokenizer/text_tokenizer.json --html preview.html

Ends with status 3 when anything is wrong.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from medley.data.document import Document, DocumentError, ImagePart, assistant_spans
from medley.data.document_tokenizer import DocumentTokenizer, parse_line
from medley.data.preview import example_text, page
from medley.data.token_dataset import read_rows
from medley.errors import PartialFailure, UserError
from medley.images.preprocess import ImageError, open_image
from medley.utils.files import atomic_file
from medley.utils.jsonl import line_ranges
from medley.vqgan.image_tokenizer import ImageTokenizer


@dataclass(frozen=True)
class ValidateOptions:
    """Checks documents or tokens.

    Args:
        input_file: JSONL file of documents, or a tokens file
        tokenizer_file: text_tokenizer.json of the checkpoint
        image_codes: folder of code shards, for pictures that carry no codes in their line
        max_length: longest sequence that is no error
        html: write a page of the first documents with their pictures
        examples: documents on that page
        ckpt: draw pictures from their codes with the VQGAN of this checkpoint
        max_errors: errors that are listed
    """

    input_file: Path
    tokenizer_file: Path
    image_codes: Path | None = None
    max_length: int | None = None
    html: Path | None = None
    examples: int = 20
    ckpt: str | None = None
    max_errors: int = 20


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Places and lines as bytes, or rows of a Parquet file as they are."""
    if path.suffix == ".parquet":
        yield from read_rows(path)
        return
    for where in line_ranges(path):
        for number, line in where.lines(path):
            yield f"{path}:{number}", line


def validate(options: ValidateOptions) -> None:
    lines = DocumentTokenizer(options.tokenizer_file, options.image_codes, options.max_length)
    counts: Counter[str] = Counter()
    lengths: list[int] = [sys.maxsize, 0]
    examples: list[tuple[str, Document, list[int]]] = []
    codes: Counter[int] = Counter()
    for place, line in tqdm(rows_of(options.input_file), unit=" documents", mininterval=1):
        try:
            row = parse_line(line) if isinstance(line, bytes) else line
            document, ids = check(row, lines)
        except UserError as error:
            counts["errors"] += 1
            if counts["errors"] <= options.max_errors:
                tqdm.write(f"{place}: {error}", file=sys.stderr)
            continue
        count(counts, codes, row, document, ids, lines)
        lengths = [min(lengths[0], len(ids)), max(lengths[1], len(ids))]
        if len(examples) < options.examples:
            examples.append((place, document, ids))
    if not counts["documents"] and not counts["errors"]:
        raise UserError(f"{options.input_file}: no documents in it")
    summary = [(name, str(n)) for name, n in sorted(counts.items())]
    if examples:
        summary.append(("tokens of a document", f"{lengths[0]} to {lengths[1]}"))
        print("\nThe first document, what is learned between \u27e6 and \u27e7:\n")
        print(example_text(examples[0][2], lines.tokenizer), "\n")
    for name, value in summary:
        print(f"{name}: {value}")
    if options.html is not None:
        write_page(options, summary, examples)
    if len(codes) > 1:
        print(f"pictures with different numbers of codes: {dict(codes)}")
    if counts["errors"]:
        raise PartialFailure(f"{options.input_file}: {counts['errors']} errors")
    if len(codes) > 1:
        raise PartialFailure(f"{options.input_file}: one VQGAN gives every picture as many codes")


def check(row: Any, lines: DocumentTokenizer) -> tuple[Document, list[int]]:
    """The document of a line, and its ids. Raises UserError for a bad one."""
    if isinstance(row, dict) and "tokens" in row:
        ids = row["tokens"]
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
            raise DocumentError("'tokens' is no list of whole numbers")
        if lines.max_length is not None and len(ids) > lines.max_length:
            raise DocumentError(f"{len(ids)} tokens, --max_length is {lines.max_length}")
        return Document.from_ids(ids, lines.tokenizer), ids
    done = lines.tokenize(row)
    assert done is not None  # nothing is dropped with --overflow error
    return Document.from_json(row), done.ids


def count(
    counts: Counter[str],
    codes: Counter[int],
    row: dict[str, Any],
    document: Document,
    ids: list[int],
    lines: DocumentTokenizer,
) -> None:
    marks = lines.tokenizer.vocabulary
    starts = [place for place, token in enumerate(ids) if token == marks.begin_image]
    sizes = [ids.index(marks.end_image, start) - start - 1 for start in starts]
    codes.update(sizes)
    spans = assistant_spans(ids, marks)
    counts.update({
        "documents": 1, "turns": len(document.turns), "pictures": len(sizes), "tokens": len(ids),
        "tokens of pictures": sum(sizes) + 2 * len(sizes),
        "tokens learned": sum(end - start for start, end in spans),
        f"documents of task {row.get('task')}": 1, f"documents of source {row.get('source')}": 1,
    })  # fmt: skip


def write_page(
    options: ValidateOptions,
    summary: list[tuple[str, str]],
    examples: list[tuple[str, Document, list[int]]],
) -> None:
    assert options.html is not None
    tokenizer = None if options.ckpt is None else ImageTokenizer.from_checkpoint(options.ckpt)

    def show(picture: ImagePart) -> Image.Image | str:
        if tokenizer is not None and picture.codes is not None:
            try:
                return tokenizer.decode([picture.codes])[0]
            except UserError as error:
                return str(error)
        if picture.path is None:
            return f"a picture of {len(picture.codes or ())} codes; --ckpt would draw it"
        try:
            return open_image(picture.path, "middle")
        except ImageError as error:
            return str(error)

    documents = [(place, document) for place, document, _ in examples]
    with atomic_file(options.html) as temporary:
        written = page(str(options.input_file), summary, documents, show)
        temporary.write_text(written, encoding="utf-8")
    print(f"wrote {options.html}")
