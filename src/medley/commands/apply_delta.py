"""Makes a model of its base and a delta. In Hugging Face's layout.

    medley apply-delta --base BASE --delta DIR --target OUT

Tokenizer and configuration come from the delta. Tensors of the base that the delta lacks, which
LLaVA's program loses silently, are an error, or taken over with --take_missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medley.checkpoints.deltas import DTYPES, add_base, write_combined
from medley.utils.cli_options import resolved
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class ApplyDeltaOptions:
    """Makes a model of its base and a delta.

    Args:
        base: folder of the base
        target: folder of the model
        delta: folder of the delta
        dtype: of arithmetic and result (LLaVA's is float16); the delta's own if not given
        take_missing: take over tensors of the base that the delta lacks
    """

    base: Path
    target: Path
    delta: Path
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    take_missing: bool = False


def apply_delta(options: ApplyDeltaOptions) -> None:
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    write_combined(
        options.delta, options.base, options.target, add_base, dtype, options.take_missing
    )
    write_manifest(options.target, resolved(options), [], None)
    print(f"wrote {options.target}")
