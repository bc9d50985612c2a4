"""Makes a model of its base and a delta. In Hugging Face's layout.

    python -m conversion.apply_delta --base BASE --delta DIR --target OUT

Tokenizer and configuration come from the delta. Tensors of the base that the delta lacks, which
LLaVA's program loses silently, are an error, or taken over with --take_missing.

The same as `medley apply-delta`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("apply-delta", argv, prog="conversion.apply_delta")


if __name__ == "__main__":
    sys.exit(main())
