"""Replies of conversion.generate_instructions to LLaVA-Med's instruction file.

    python -m conversion.clean_instructions --input raw.jsonl --output instruct.json

Questions without exactly one answer, refusals, and answers that speak of their caption are dropped,
and kept in OUTPUT.dropped.jsonl with the reason; the rules are a file (--rules). An instruction
file in LLaVA-Med's own form is cleaned, too.

The same as `medley clean-instructions`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("clean-instructions", argv, prog="conversion.clean_instructions")


if __name__ == "__main__":
    sys.exit(main())
