"""Cleans generated conversations into LLaVA-Med's instruction file.

    python -m conversion.clean_instructions --input raw.jsonl --output instruct.json

In: the output of conversion.generate_instructions, or an instruction file in LLaVA-Med's format.
Out: an instruction file (JSON list), and OUTPUT.dropped.jsonl with the dropped turns and the
reasons. Drops questions without exactly one answer, refusals, and answers that refer to their
caption; the regular expressions are in a file (--cleaning_rules). `medley clean-instructions` is
the same command.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("clean-instructions", argv, prog="conversion.clean_instructions")


if __name__ == "__main__":
    sys.exit(main())
