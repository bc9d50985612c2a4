"""Adds a weight delta to its base: the model in Hugging Face's layout.

    medley apply-delta --base BASE --delta DIR --target OUT

Tokenizer and configuration come from the delta. Tensors of the base that the delta lacks are an
error, unless --copy_missing copies them. LLaVA's program drops them silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from medley.checkpoints.deltas import DTYPES, add_base, write_combined
from medley.utils.cli_options import Alias, resolved
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class ApplyDeltaOptions:
    """Adds a weight delta to its base.

    Args:
        base: folder of the base
        target: folder of the model
        delta: folder of the delta
        dtype: dtype of computation and result (LLaVA's is float16); the delta's if not given
        copy_missing: copy tensors of the base that the delta lacks
    """

    aliases: ClassVar[dict[str, Alias]] = {"take_missing": Alias("copy_missing")}

    base: Path
    target: Path
    delta: Path
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    copy_missing: bool = False


def apply_delta(options: ApplyDeltaOptions) -> None:
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    write_combined(
        options.delta, options.base, options.target, add_base, dtype, options.copy_missing
    )
    write_manifest(options.target, resolved(options), [], None)
    print(f"wrote {options.target}")
