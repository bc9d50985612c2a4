"""Tokenization, step 1: images to image codes, on any number of ranks.

In: a list of images (CSV or Parquet with a column `img_path`), a folder of images, a WebDataset tar
or a folder of tars; a checkpoint with a VQGAN. Out: a folder with

- `partition_<k>_rank_<r>.parquet`: `img_path` and `img_tokens` (the image codes, 0 to 8191),
- `errors_rank_<r>.jsonl`: every image that could not be read, and why,
- `manifest.json`: options, inputs and the fingerprint of the VQGAN.

    torchrun --nproc-per-node=2 -m tokenizer.image_tokenization \
        --input images.csv --output codes --ckpt tiny

An interrupted run resumes when it is started again, also with another number of ranks. The same as
`medley tokenize-images`. Step 2 is tokenizer/tokenize_jsonl.py.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("tokenize-images", argv, prog="tokenizer.image_tokenization")


if __name__ == "__main__":
    sys.exit(main())
