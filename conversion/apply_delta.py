"""Adds a weight delta to its base.

Input: the base in Hugging Face's layout and a delta in LLaVA's format. Output: the model in Hugging
Face's layout, with the tokenizer and the configuration of the delta. Tensors of the base that the
delta lacks are an error, unless --copy_missing copies them. LLaVA's program drops them silently.

    python -m conversion.apply_delta --base BASE --delta DIR --target OUT

Same as `medley apply-delta`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("apply-delta", argv, prog="conversion.apply_delta")


if __name__ == "__main__":
    sys.exit(main())
