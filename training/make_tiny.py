"""Makes the embedded model `tiny` from scratch: VQGAN, text tokenizer, decoder.

    python -m training.make_tiny --output build/tiny

In: only seeds; the training data are phantoms (`medley.phantoms`). Out: a checkpoint in Chameleon's
layout, and `training_log.json` with the loss curves. It takes an hour and a half on 2 cores. An
interrupted run resumes after the last complete part; the decoder resumes from its last save. The
recipe is in `training/tiny/`.
"""

import sys

from medley.utils.cli_options import run_program
from training.tiny.make import make_tiny
from training.tiny.recipe import Options


def main(argv: list[str] | None = None) -> int:
    return run_program("training.make_tiny", Options, make_tiny, argv)


if __name__ == "__main__":
    sys.exit(main())
