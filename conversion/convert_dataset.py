"""Converts a dataset to documents, documents to a dataset, or one dataset format to another.

    python -m conversion.convert_dataset --from vqa_rad --input FOLDER --output data
    python -m conversion.convert_dataset --from llava --input mix.json --output mix.jsonl \
        --image_folder images
    python -m conversion.convert_dataset --from documents --to sharegpt --input docs.jsonl \
        --output out.json

In: a dataset in one of the formats of docs/formats.md, as published or as one of its files.
Out: a single file (an --output with a suffix), or a folder with one file per published split. With
--test_fraction, the folder has `train` and `test` files without a common image. The folder also
has `images.csv`, the image list that tokenizer.image_tokenization reads. Documents are what
tokenizer.tokenize_jsonl reads.

Bad records are listed and counted, and nothing is written. With --on_error skip, the valid records
are written, and the bad ones go to `bad.jsonl` in the folder or `OUTPUT.bad.jsonl`.

This is the same program as `medley convert`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("convert", argv, prog="conversion.convert_dataset")


if __name__ == "__main__":
    sys.exit(main())
