"""A published data set to documents, with a list of its pictures.

    python -m conversion.convert_dataset --from vqa_rad --input FOLDER --output DIR

writes `train.jsonl`, `test.jsonl` (no picture in both) and `pictures.csv` to DIR.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from tqdm import tqdm

from medley.files import whole_folder, write_manifest
from medley.formats import vqa_rad
from medley.options import resolved, run_program


@dataclass(frozen=True)
class Options:
    """Converts a data set to documents.

    Args:
        source: format of the input
        input: its folder
        output: folder of the documents
        test_share: share of the pictures that are kept for testing
    """

    input: Path
    output: Path
    source: Literal["vqa_rad"] = "vqa_rad"
    test_share: float = 0.15


def work(options: Options) -> None:
    questions = list(tqdm(vqa_rad.read(options.input), unit=" questions", desc="reading"))
    train, test = vqa_rad.split_by_picture(questions, options.test_share)
    # All pictures, also those that nothing is asked about: their codes may serve elsewhere.
    pictures = sorted(str(p) for p in vqa_rad.image_folder(options.input).iterdir())
    with whole_folder(options.output) as folder:
        for name, part in (("train.jsonl", train), ("test.jsonl", test)):
            with open(folder / name, "w", encoding="utf-8") as handle:
                for question in part:
                    handle.write(json.dumps(question.document(), ensure_ascii=False) + "\n")
        pd.DataFrame({"img_path": pictures}).to_csv(folder / "pictures.csv", index=False)
    inputs = [options.input / name for name in vqa_rad.FILES]
    write_manifest(options.output, resolved(options), inputs, None)
    print(
        f"{options.output}: {len(train)} train and {len(test)} test questions about "
        f"{len(pictures)} pictures, none in both"
    )


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv  # `from` is no name for a field of Python
    argv = [re.sub(r"^--from(=|$)", r"--source\1", word) for word in words]
    return run_program("conversion.convert_dataset", Options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
