"""Writes what a model learned beyond its base. In Hugging Face's layout.

    medley make-delta --base BASE --target MODEL --delta OUT

Tokenizer and configuration come from the target. Tensors of the base that the target lacks, which
LLaVA's program loses silently, are an error, or taken over with --take_missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medley.checkpoints.deltas import DTYPES, subtract_base, write_combined
from medley.utils.cli_options import resolved
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class MakeDeltaOptions:
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


def make_delta(options: MakeDeltaOptions) -> None:
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    write_combined(
        options.target, options.base, options.delta, subtract_base, dtype, options.take_missing
    )
    write_manifest(options.delta, resolved(options), [], None)
    print(f"wrote {options.delta}")
