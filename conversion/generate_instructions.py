"""Questions and answers about figures, written by a model from their captions; or a translation.

    python -m conversion.generate_instructions --input fig_captions.json --output raw.jsonl \\
        --endpoint http://localhost:8000/v1 --model NAME
    python -m conversion.generate_instructions --translate German --input docs.jsonl \\
        --output docs.de.jsonl --endpoint URL --model NAME

Any server that speaks OpenAI's protocol will do; --api_version makes it Azure's. Every reply is
kept in OUTPUT.replies.jsonl as it comes, and never asked for again; what fails is named in
OUTPUT.failed.jsonl, and tried again by the same command. conversion.clean_instructions comes next.

The same as `medley generate-instructions`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("generate-instructions", argv, prog="conversion.generate_instructions")


if __name__ == "__main__":
    sys.exit(main())
