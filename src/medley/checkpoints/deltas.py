"""What a model learned beyond its base, tensor by tensor, as LLaVA publishes it.

A delta is target minus base. Embedding and head may have more rows than the base's: the rows
added stand whole. What the base lacks stands whole too, where its name is expected.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from medley.checkpoints.huggingface import HuggingFaceWeights, other_files, write_weights
from medley.errors import UserError
from medley.utils.files import atomic_dir

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
GROWING = ("model.embed_tokens.weight", "lm_head.weight")
# Of LLaVA a projector; of ours the VQGAN inside of a Hugging Face folder.
_EXPECTED_NEW = re.compile(r"model\.mm_projector\.(weight|bias)|model\.vqmodel\..+")


def add_base(name: str, delta: Tensor, base: Tensor | None) -> Tensor:
    """base + delta, in the delta's dtype. Raises UserError for shapes that do not fit."""
    return _combine(name, delta, base, 1)


def subtract_base(name: str, target: Tensor, base: Tensor | None) -> Tensor:
    """target - base, in the target's dtype. Raises UserError for shapes that do not fit."""
    return _combine(name, target, base, -1)


def _combine(name: str, tensor: Tensor, base: Tensor | None, sign: int) -> Tensor:
    if base is None:
        if not _EXPECTED_NEW.fullmatch(name):
            raise UserError(f"{name}: not in the base; is it the base that the model was made of?")
        return tensor
    base = base.to(tensor.dtype)
    if base.shape == tensor.shape:
        return _finite(name, tensor + sign * base)
    smaller = all(b <= t for b, t in zip(base.shape, tensor.shape, strict=False))
    if name not in GROWING or base.ndim != tensor.ndim or not smaller:
        raise UserError(
            f"{name}: the base's tensor is {tuple(base.shape)}, this one {tuple(tensor.shape)}"
        )
    combined = tensor.clone()
    combined[: base.shape[0], : base.shape[1]] += sign * base
    return _finite(name, combined)


def _finite(name: str, result: Tensor) -> Tensor:
    if not bool(result.isfinite().all()):
        raise UserError(
            f"{name}: not finite in {result.dtype}; choose a wider --dtype (bfloat16, float32)"
        )
    return result


def write_combined(
    source: Path,
    base: Path,
    output: Path,
    combine: Callable[[str, Tensor, Tensor | None], Tensor],
    dtype: torch.dtype | None,
    take_missing: bool,
) -> None:
    """Writes every tensor of `source` combined with the base's, whole or not at all.

    Tokenizer, configuration and whatever else there is comes from `source`. Tensors of the base
    that `source` lacks are an error, or taken over as they are.
    """
    for folder in (base, source):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    own, of_base = HuggingFaceWeights(source), HuggingFaceWeights(base)
    known = set(of_base.names())
    missing = sorted(known - set(own.names()))
    if missing and not take_missing:
        raise UserError(
            f"{source}: {len(missing)} tensors of the base are not in it: "
            f"{', '.join(missing[:3])}; LLaVA loses them without a word, --take_missing takes "
            "them over from the base"
        )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in own.tensors():
            other = of_base.get(name) if name in known else None
            yield name, combine(name, tensor.to(dtype or tensor.dtype), other)
        for name in missing:
            yield name, of_base.get(name).to(dtype or of_base.get(name).dtype)

    with atomic_dir(output) as temporary:
        write_weights(temporary, tensors())
        for path in other_files(source):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, temporary / path.name)
