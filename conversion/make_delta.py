"""Subtracts a base from a model, to publish the difference instead of the model.

Input: the base and the model in Hugging Face's layout. Output: a weight delta in LLaVA's format,
with the tokenizer and the configuration of the model. Tensors of the base that the model lacks are
an error, unless --copy_missing copies them. LLaVA's program drops them silently.

    python -m conversion.make_delta --base BASE --target MODEL --delta OUT

Same as `medley make-delta`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("make-delta", argv, prog="conversion.make_delta")


if __name__ == "__main__":
    sys.exit(main())
