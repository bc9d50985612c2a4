"""Lets a chat model write conversations from figure captions, or translate documents.

    python -m conversion.generate_instructions --input fig_captions.json --output raw.jsonl \\
        --endpoint http://localhost:8000/v1 --model NAME
    python -m conversion.generate_instructions --translate German --input docs.jsonl \\
        --output docs.de.jsonl --endpoint URL --model NAME

In: LLaVA-Med's captions, or documents with --translate. Out: the records with the model's reply in
`result` (input of conversion.clean_instructions), or translated documents. Any server with an
OpenAI-compatible API works; --api_version selects the Azure API. Each reply is cached in
OUTPUT.replies.jsonl on arrival, and its request is never repeated. Failed records are listed in
OUTPUT.failed.jsonl; the same command retries them. `medley generate-instructions` is the same
command.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("generate-instructions", argv, prog="conversion.generate_instructions")


if __name__ == "__main__":
    sys.exit(main())
