"""LLaVA-Med's figures out of the articles they were printed in, and its data files.

    python -m conversion.fetch_figures --input llava_med_image_urls.jsonl --output images \
        --allow_network
    python -m conversion.fetch_figures --data llava_med_instruct_10k.json --output data \
        --allow_network

Archives are fetched side by side, gone on with where they broke off, and deleted once their figures
are taken out. What is there already is not fetched again; what cannot be had is named in
missing.jsonl, and the rest is kept. Nothing is fetched without --allow_network: the program then
says what it would do.

The same as `medley fetch-figures`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("fetch-figures", argv, prog="conversion.fetch_figures")


if __name__ == "__main__":
    sys.exit(main())
