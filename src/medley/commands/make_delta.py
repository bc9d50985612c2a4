"""Subtracts a base from a model: a weight delta in LLaVA's format, in Hugging Face's layout.

    medley make-delta --base BASE --target MODEL --delta OUT

Tokenizer and configuration come from the target. Tensors of the base that the target lacks are an
error, unless --copy_missing copies them. LLaVA's program drops them silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from medley.checkpoints.deltas import DTYPES, subtract_base, write_combined
from medley.utils.cli_options import Alias, resolved
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class MakeDeltaOptions:
    """Subtracts a base from a model.

    Args:
        base: folder of the base
        target: folder of the model
        delta: folder of the delta
        dtype: dtype of computation and result (LLaVA's is float16); the target's if not given
        copy_missing: copy tensors of the base that the target lacks
    """

    aliases: ClassVar[dict[str, Alias]] = {"take_missing": Alias("copy_missing")}

    base: Path
    target: Path
    delta: Path
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    copy_missing: bool = False


def make_delta(options: MakeDeltaOptions) -> None:
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    write_combined(
        options.target, options.base, options.delta, subtract_base, dtype, options.copy_missing
    )
    write_manifest(options.delta, resolved(options), [], None)
    print(f"wrote {options.delta}")
