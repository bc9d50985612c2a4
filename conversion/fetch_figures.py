"""Downloads LLaVA-Med's figures from the archives of their articles, or its data files.

    python -m conversion.fetch_figures --input llava_med_image_urls.jsonl --output images \\
        --allow_network
    python -m conversion.fetch_figures --data llava_med_instruct_10k.json --output data \\
        --allow_network

In: LLaVA-Med's image-URL file, or the names of its data files. Out: OUTPUT/ID.jpg for each figure,
with figures.jsonl (size and SHA-256 of each) and missing.jsonl (figures that could not be fetched,
with the reason); or the data files, verified against published checksums. Archives are downloaded
concurrently and deleted after their figures are extracted. Interrupted downloads resume, and
existing figures are not fetched again. Without --allow_network the command only reports what it
would fetch. `medley fetch-figures` is the same command.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("fetch-figures", argv, prog="conversion.fetch_figures")


if __name__ == "__main__":
    sys.exit(main())
