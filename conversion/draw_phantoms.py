"""Draws phantoms to files: pictures, documents to learn from, questions to be tested with.

    python -m conversion.draw_phantoms --output DIR --modality MR-CT --train 300 --test 60

writes `images/`, `pictures.csv`, `train.jsonl` and `test.jsonl` to DIR.

The same as `medley draw-phantoms`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("draw-phantoms", argv, prog="conversion.draw_phantoms")


if __name__ == "__main__":
    sys.exit(main())
