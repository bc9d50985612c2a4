"""Tokenization, step 3: a check of documents or token files before training.

In: a JSON Lines file of documents, or a token file of step 2. Out: statistics, each error with its
line, and the first document with its trained tokens in brackets; with --html_report, an HTML report
of the first documents with their images.

    python -m tokenizer.validate --input_file docs.jsonl --image_codes codes \
        --tokenizer_file CKPT/tokenizer/text_tokenizer.json --html_report preview.html

Exits with status 3 if there are errors. The same as `medley validate`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("validate", argv, prog="tokenizer.validate")


if __name__ == "__main__":
    sys.exit(main())
