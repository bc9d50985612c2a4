"""Documents to token sequences.

In: a JSONL file of documents and, for pictures without codes, a folder of code shards. Out:
JSONL (the line plus `tokens`, as MedMax writes it) or, by the name `*.parquet`, Parquet.

    python -m tokenizer.tokenize_jsonl --input_file docs.jsonl --image_codes codes \
        --tokenizer_file CKPT/tokenizer/text_tokenizer.json --output_file tokens.jsonl
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from medley.code_shards import CodeShards
from medley.document import Document, DocumentError, Picture
from medley.errors import UserError
from medley.files import json_lines, read_manifest, write_manifest
from medley.medmax import medmax_ids
from medley.options import resolved, run_program
from medley.packing import SequenceTooLong
from medley.token_shards import write_jsonl, write_parquet
from medley.vocabulary import TextTokenizer


@dataclass(frozen=True)
class Options:
    """Turns documents into token sequences.

    Args:
        input_file: JSONL file of documents
        tokenizer_file: text_tokenizer.json of the checkpoint
        output_file: tokens file, .jsonl or .parquet
        image_codes: folder of code shards, for pictures that carry no codes in their line
        max_length: longest sequence that is let through
        overflow: what happens to a longer one, error or drop
        compat: medmax parses every mark in a text, repeats one picture at each place and
            leaves codes unchecked, as MedMax's program does
    """

    input_file: Path
    tokenizer_file: Path
    output_file: Path
    image_codes: Path | None = None
    max_length: int | None = None
    overflow: Literal["error", "drop"] = "error"
    compat: Literal["none", "medmax"] = "none"


@dataclass
class Report:
    """What went through, for the last line of the program."""

    counts: Counter[str]

    def __str__(self) -> str:
        c = self.counts
        return (
            f"{c['documents']} documents, {c['tokens']} tokens ({c['image tokens']} of pictures), "
            f"{c['pictures']} pictures, {c['dropped']} dropped as too long"
        )


def sequences(options: Options, report: Report) -> Iterator[dict[str, Any]]:
    """Lines with `tokens`. Raises UserError with file and line for the first bad one."""
    tokenizer = TextTokenizer.from_file(options.tokenizer_file)
    shards = None if options.image_codes is None else CodeShards(options.image_codes)
    for number, line in tqdm(json_lines(options.input_file), unit=" documents", mininterval=1):
        place = f"{options.input_file}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON ({error.msg} at column {error.colno})") from error
        try:
            ids = ids_of(row, tokenizer, shards, options.compat)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        if options.max_length is not None and len(ids) > options.max_length:
            if options.overflow == "error":
                raise SequenceTooLong(
                    f"{place}: {len(ids)} tokens, --max_length is {options.max_length}; raise it, "
                    "or leave such documents out with --overflow drop"
                )
            report.counts["dropped"] += 1
            continue
        codes = tokenizer.vocabulary.image_codes
        report.counts.update(
            {
                "documents": 1,
                "tokens": len(ids),
                "image tokens": sum(token in codes for token in ids),
                "pictures": ids.count(tokenizer.vocabulary.begin_image),
            }
        )
        yield {**row, "tokens": ids}
    if not report.counts["documents"]:  # before the output gets its name
        raise UserError(f"{options.input_file}: no documents came through")


def ids_of(row: Any, tokenizer: TextTokenizer, shards: CodeShards | None, compat: str) -> list[int]:
    if compat == "medmax":
        return medmax_ids(row, tokenizer)
    return Document.from_json(row).map_pictures(lambda p: with_codes(p, shards)).to_ids(tokenizer)


def with_codes(picture: Picture, shards: CodeShards | None) -> Picture:
    """The picture with codes, from its line or from the shards by its path."""
    if picture.codes is not None:
        if shards is not None and len(picture.codes) != shards.codes_per_image:
            raise DocumentError(
                f"a picture with {len(picture.codes)} codes, those of {shards.folder} have "
                f"{shards.codes_per_image}"
            )
        return picture
    if shards is None:
        raise DocumentError(
            f"the picture {picture.path} has no codes in the line; name their folder with "
            "--image_codes"
        )
    codes = shards.get(str(picture.path))
    if codes is None:
        raise DocumentError(
            f"no codes of {picture.path} in {shards.folder}; tokenize it with "
            "tokenizer.image_tokenization"
        )
    return replace(picture, codes=codes)


def work(options: Options) -> None:
    report = Report(Counter())
    rows = sequences(options, report)
    write = write_parquet if options.output_file.suffix == ".parquet" else write_jsonl
    write(options.output_file, rows)
    fingerprint = None
    if options.image_codes is not None:
        fingerprint = read_manifest(options.image_codes).get("token_space")
    write_manifest(
        options.output_file, resolved(options), [options.input_file, options.tokenizer_file],
        fingerprint, counts=dict(report.counts),
    )  # fmt: skip
    print(f"{options.output_file}: {report}")


def main(argv: list[str] | None = None) -> int:
    return run_program("tokenizer.tokenize_jsonl", Options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
