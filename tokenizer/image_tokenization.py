"""Pictures to image codes, on any number of ranks.

In: a CSV, a Parquet file, a folder of pictures, a WebDataset tar or a folder of them. Out: a
folder of Parquet shards with a manifest, and `errors_rank_<r>.jsonl` naming every picture that
could not be read.

    torchrun --nproc-per-node=2 -m tokenizer.image_tokenization \
        --input pictures.csv --output codes --ckpt tiny

Started again after a kill, with the same or another number of ranks, it goes on with the
partitions that are not there yet.

The same as `medley tokenize-images`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("tokenize-images", argv, prog="tokenizer.image_tokenization")


if __name__ == "__main__":
    sys.exit(main())
