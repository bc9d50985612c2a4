"""How well a VQGAN keeps one's own pictures: before spending days on a decoder, look.

In: a checkpoint and an image list. Out: a folder with `index.html`, a page of measures and of
originals above their reconstructions for each group, and `report.json` with the same figures.

    python -m tokenizer.reconstruction_report --input pictures --ckpt tiny --output report

The same as `medley reconstruction-report`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("reconstruction-report", argv, prog="tokenizer.reconstruction_report")


if __name__ == "__main__":
    sys.exit(main())
