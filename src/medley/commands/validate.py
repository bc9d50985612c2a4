"""Checks documents or token files: statistics, each error with its line, and what is trained on.

In: a JSON Lines file of documents, or a token file (JSON Lines with `tokens`, or Parquet). Out: a
report; with --html_report, an HTML report of the first documents with their images.

    medley validate --input_file docs.jsonl --image_codes codes \
        --tokenizer_file CKPT/tokenizer/text_tokenizer.json --html_report preview.html

Exits with status 3 if there are errors.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

from medley.data.document import Document
from medley.data.document_tokenizer import DocumentTokenizer
from medley.data.preview import TRAINED_ON, image_loader, preview_text, render_documents
from medley.data.validation import CheckedDocument, ValidationStats, check_document, read_unparsed
from medley.errors import PartialFailure, UserError
from medley.utils.cli_options import Alias
from medley.utils.files import atomic_file
from medley.vqgan.image_tokenizer import ImageTokenizer


@dataclass(frozen=True)
class ValidateOptions:
    """Checks documents or token files.

    Args:
        input_file: JSON Lines file of documents, or a token file
        tokenizer_file: text_tokenizer.json of the checkpoint
        image_codes: folder of image codes, for images without codes in their line
        max_length: maximum number of tokens of a document
        html_report: write an HTML report of the first documents with their images
        examples: number of documents in the HTML report
        ckpt: decode the images of the HTML report from their codes with this checkpoint's VQGAN
        max_errors: maximum number of errors to list
    """

    aliases: ClassVar = {"html": Alias("html_report")}  # alias

    input_file: Path
    tokenizer_file: Path
    image_codes: Path | None = None
    max_length: int | None = None
    html_report: Path | None = None
    examples: int = 20
    ckpt: str | None = None
    max_errors: int = 20


def validate(options: ValidateOptions) -> None:
    tokenizer = DocumentTokenizer(options.tokenizer_file, options.image_codes, options.max_length)
    stats = ValidationStats()
    first: CheckedDocument | None = None
    examples: list[tuple[str, Document]] = []
    documents = tqdm(read_unparsed(options.input_file), unit=" documents", mininterval=1)
    for where, content in documents:
        try:
            checked = check_document(content, tokenizer)
        except UserError as error:
            stats.errors += 1
            if stats.errors <= options.max_errors:
                tqdm.write(f"{where}: {error}", file=sys.stderr)
            continue
        stats.add(checked, tokenizer.tokenizer.vocabulary)
        first = first or checked
        if len(examples) < options.examples:
            examples.append((where, checked.document))
    if first is None and not stats.errors:
        raise UserError(f"{options.input_file}: The file has no documents.")
    if first is not None:
        opening, closing = TRAINED_ON
        print(f"\nFirst document, with the trained tokens between {opening} and {closing}:\n")
        spans = first.trained_spans(tokenizer.tokenizer.vocabulary)
        print(preview_text(first.ids, tokenizer.tokenizer, spans), "\n")
    for name, value in stats.summary():
        print(f"{name}: {value}")
    if options.html_report is not None:
        _write_html_report(options, options.html_report, stats, examples)
    if len(stats.codes_per_image) > 1:
        print(f"images by number of codes: {dict(stats.codes_per_image)}")
    if stats.errors:
        raise PartialFailure(f"{options.input_file}: {stats.errors} errors.")
    if len(stats.codes_per_image) > 1:
        raise PartialFailure(
            f"{options.input_file}: Images have different numbers of codes (see above). Use codes "
            "of one VQGAN."
        )


def _write_html_report(
    options: ValidateOptions,
    path: Path,
    stats: ValidationStats,
    examples: list[tuple[str, Document]],
) -> None:
    tokenizer = None if options.ckpt is None else ImageTokenizer.from_checkpoint(options.ckpt)
    load_image = image_loader(None if tokenizer is None else tokenizer.decode)
    report = render_documents(str(options.input_file), stats.summary(), examples, load_image)
    with atomic_file(path) as temporary:
        temporary.write_text(report, encoding="utf-8")
    print(f"wrote {path}")
