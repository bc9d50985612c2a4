"""Generates a dataset of phantoms: synthetic scans with documents and questions.

    python -m conversion.draw_phantoms --output DIR --modality MR-CT --train 300 --test 60

In: only the options. Out, in DIR: `images/`, `images.csv` (paths of all images), `train.jsonl`
(documents to train on) and `test.jsonl` (one question per row). `medley draw-phantoms` is the same
command.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("draw-phantoms", argv, prog="conversion.draw_phantoms")


if __name__ == "__main__":
    sys.exit(main())
