"""Measures how well a VQGAN reconstructs your images, before you train a decoder on its codes.

Input: a checkpoint and an image list. Output: a folder with `index.html`, a report of metrics and
of originals above their reconstructions by group, and `report.json` with the same metrics.

    python -m tokenizer.reconstruction_report --input images --ckpt tiny --output report

Same as `medley reconstruction-report`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("reconstruction-report", argv, prog="tokenizer.reconstruction_report")


if __name__ == "__main__":
    sys.exit(main())
