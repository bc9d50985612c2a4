"""Writes what a model learned beyond its base. In Hugging Face's layout.

    python -m conversion.make_delta --base BASE --target MODEL --delta OUT

Tokenizer and configuration come from the target. Tensors of the base that the target lacks, which
LLaVA's program loses silently, are an error, or taken over with --take_missing.

The same as `medley make-delta`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("make-delta", argv, prog="conversion.make_delta")


if __name__ == "__main__":
    sys.exit(main())
