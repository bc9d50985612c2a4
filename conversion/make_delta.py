"""Writes what a model learned beyond its base. In Hugging Face's layout.

    python -m conversion.make_delta --base BASE --target MODEL --delta OUT

Tokenizer and configuration come from the target. Tensors of the base that the target lacks, which
LLaVA's program loses silently, are an error, or taken over with --take_missing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medley.checkpoints.deltas import DTYPES, take_delta, write_combined
from medley.utils.cli_options import resolved, run_program
from medley.utils.files import write_manifest


@dataclass(frozen=True)
class Options:
    """Writes what a model learned beyond its base.

    Args:
        base: folder of the base
        target: folder of the model
        delta: folder of the delta
        dtype: of arithmetic and result (LLaVA's is float16); the target's own if not given
        take_missing: take over tensors of the base that the target lacks
    """

    base: Path
    target: Path
    delta: Path
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    take_missing: bool = False


def work(options: Options) -> None:
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    write_combined(
        options.target, options.base, options.delta, take_delta, dtype, options.take_missing
    )
    write_manifest(options.delta, resolved(options), [], None)
    print(f"wrote {options.delta}")


def main(argv: list[str] | None = None) -> int:
    return run_program("conversion.make_delta", Options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
