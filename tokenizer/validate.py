"""Checks documents or tokens: counts, every error with its line, and what will be learned.

In: a JSONL file of documents, or a tokens file (JSONL with `tokens`, or Parquet). Out: a report;
with --html a page of the first documents with their pictures.

    python -m tokenizer.validate --input_file docs.jsonl --image_codes codes \
        --tokenizer_file CKPT/tokenizer/text_tokenizer.json --html preview.html

Ends with status 3 when anything is wrong.

The same as `medley validate`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("validate", argv, prog="tokenizer.validate")


if __name__ == "__main__":
    sys.exit(main())
