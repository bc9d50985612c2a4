"""Weight deltas in LLaVA's format: the difference between a model and its base, by tensor.

Embedding and head may have more rows than the base's. A delta contains the additional rows
unchanged. It also contains unchanged tensors that only the model has, if they are expected.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from medley.checkpoints.huggingface import other_files, write_weights
from medley.errors import UserError
from medley.utils.files import atomic_dir
from medley.utils.tensor_files import ShardedTensors

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
GROWING = ("model.embed_tokens.weight", "lm_head.weight")
# LLaVA's projector, and the VQGAN in a Hugging Face folder of a Chameleon model.
_EXPECTED_NEW = re.compile(r"model\.mm_projector\.(weight|bias)|model\.vqmodel\..+")


def add_base(name: str, delta: Tensor, base: Tensor | None) -> Tensor:
    """delta + base, in the delta's dtype. Raises UserError if the shapes do not match."""
    return _combine(name, delta, base, 1)


def subtract_base(name: str, target: Tensor, base: Tensor | None) -> Tensor:
    """target - base, in the target's dtype. Raises UserError if the shapes do not match."""
    return _combine(name, target, base, -1)


def _combine(name: str, tensor: Tensor, base: Tensor | None, sign: int) -> Tensor:
    if base is None:
        if not _EXPECTED_NEW.fullmatch(name):
            raise UserError(
                f"{name}: The base does not have this tensor. Name the base that the model was "
                "trained from."
            )
        return tensor
    base = base.to(tensor.dtype)
    if base.shape == tensor.shape:
        return _check_finite(name, tensor + sign * base)
    is_smaller = all(b <= t for b, t in zip(base.shape, tensor.shape, strict=False))
    if name not in GROWING or base.ndim != tensor.ndim or not is_smaller:
        raise UserError(
            f"{name}: Wrong shape in the base (got {tuple(base.shape)}, expected "
            f"{tuple(tensor.shape)})."
        )
    combined = tensor.clone()
    combined[: base.shape[0], : base.shape[1]] += sign * base
    return _check_finite(name, combined)


def _check_finite(name: str, result: Tensor) -> Tensor:
    if not bool(result.isfinite().all()):
        raise UserError(
            f"{name}: NaN or infinite values in {result.dtype}. Use a wider --dtype (bfloat16, "
            "float32)."
        )
    return result


def write_combined(
    source: Path,
    base: Path,
    output: Path,
    combine: Callable[[str, Tensor, Tensor | None], Tensor],
    dtype: torch.dtype | None,
    copy_missing: bool,
) -> None:
    """Writes every tensor of `source` combined with the base's, atomically.

    Args:
        source: also provides tokenizer, configuration and all other files
        combine: `add_base` or `subtract_base`
        dtype: of computation and result; that of `source` unless given
        copy_missing: copy tensors of the base that `source` lacks; otherwise they are an error
    """
    for folder in (base, source):
        if not folder.is_dir():
            raise UserError(f"{folder}: Folder not found.")
    source_tensors, base_tensors = ShardedTensors(source), ShardedTensors(base)
    base_names = set(base_tensors.names())
    missing = sorted(base_names - set(source_tensors.names()))
    if missing and not copy_missing:
        raise UserError(
            f"{source}: {len(missing)} tensors of the base are missing: {', '.join(missing[:3])}. "
            "LLaVA's program drops them silently. --copy_missing copies them from the base."
        )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source_tensors.tensors():
            other = base_tensors.get(name) if name in base_names else None
            yield name, combine(name, tensor.to(dtype or tensor.dtype), other)
        for name in missing:
            tensor = base_tensors.get(name)
            yield name, tensor.to(dtype or tensor.dtype)

    with atomic_dir(output) as temporary:
        write_weights(temporary, tensors())
        for path in other_files(source):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, temporary / path.name)
