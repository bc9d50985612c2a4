"""A data set of the field to documents, documents to a data set, or one to another.

    python -m conversion.convert_dataset --from vqa_rad --input FOLDER --output data
    python -m conversion.convert_dataset --from llava --input mix.json --output mix.jsonl \
        --image_folder pictures
    python -m conversion.convert_dataset --from documents --to sharegpt --input docs.jsonl \
        --output out.json

An --output with a suffix is one file; any other is a folder with a file for each published split
(or, with --test_share, for halves without a common picture) and `pictures.csv`, the list of its
pictures. Every bad record is named and counted, and nothing is written; with --skip_bad the rest
is, and the bad ones are kept beside it.

The same as `medley convert`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("convert", argv, prog="conversion.convert_dataset")


if __name__ == "__main__":
    sys.exit(main())
