"""Documents to token sequences, in constant memory.

In: a JSONL file of documents and, for pictures without codes, a folder of code shards. Out:
JSONL (the line plus `tokens`, as MedMax writes it) or, by the name `*.parquet`, Parquet; a
manifest and a report of what went through.

    python -m tokenizer.tokenize_jsonl --input_file docs.jsonl --image_codes codes \
        --tokenizer_file CKPT/tokenizer/text_tokenizer.json --output_file tokens.jsonl

Every line is looked at before the first complaint: bad ones are listed with their numbers, and
nothing is written. With --skip_bad_lines the rest is written, and the bad ones are kept in
OUTPUT.bad_lines.jsonl.

The same as `medley tokenize`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("tokenize", argv, prog="tokenizer.tokenize_jsonl")


if __name__ == "__main__":
    sys.exit(main())
