"""Tokenization, step 2: documents to token sequences, in constant memory.

In: a JSON Lines file of documents (`text` or `messages`, `image_path`, `image_tokens`; see
docs/formats.md), the image codes of step 1 and the text_tokenizer.json of a checkpoint. Out: a
token file for training, as JSON Lines (the line plus `tokens`, as MedMax writes it) or, for the
suffix .parquet, as Parquet; `OUTPUT.manifest.json`; a report with the lengths of the documents.

    python -m tokenizer.tokenize_jsonl --input_file docs.jsonl --image_codes codes \
        --tokenizer_file CKPT/tokenizer/text_tokenizer.json --output_file tokens.jsonl

All lines are checked. Bad lines are listed with their numbers, and then nothing is written. With
`--on_error skip`, the good lines are written, and the bad lines go to OUTPUT.bad_lines.jsonl. The
same as `medley tokenize`. Step 3 is tokenizer/validate.py.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("tokenize", argv, prog="tokenizer.tokenize_jsonl")


if __name__ == "__main__":
    sys.exit(main())
