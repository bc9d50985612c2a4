"""What each tensor of an adapter does to which tensor of the base.

Shapes: D model width, O outputs, I inputs, R rank, V vocabulary.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from medley.checkpoints.adapter_config import AdapterConfig
from medley.errors import UserError
from medley.vqgan.files import HUGGING_FACE_PREFIX

PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"
_LORA = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.weight)?")
_ADAPTER_NAMES = (
    (re.compile(r"(\.lora_[AB])\.[^.]+(\.weight|\.bias)$"), r"\1\2"),
    (re.compile(r"(\.lora_embedding_[AB]|\.trainable_tokens_delta)\.[^.]+$"), r"\1"),
    (re.compile(r"\.modules_to_save\.[^.]+(\.weight|\.bias)$"), r"\1"),
)
_WRAPPED = re.compile(r"(\.token_adapter)?\.(base_layer|original_module)(?=\.)")
_GROWING = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Update:
    """What an adapter does to one tensor of the base.

    Attributes:
        saved: replaces the tensor (modules_to_save)
        base_copy: PEFT's copy of the base's tensor, which must be equal to it
        down: A (R, I), or for an embedding (R, V)
        up: B (O, R), or for an embedding (D, R)
        scaling: factor of B A
        is_embedding: the result of B A is transposed
        rows: replace the rows `row_ids`
    """

    saved: Tensor | None = None
    base_copy: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scaling: float = 1.0
    is_embedding: bool = False
    rows: Tensor | None = None
    row_ids: tuple[int, ...] = ()

    def apply(self, weight: Tensor) -> Tensor:
        """The tensor of the base with this update, in its dtype. Computes in float32."""
        merged = weight if self.saved is None else self.saved.to(weight.dtype)
        if self.rows is not None:
            merged = merged.clone()
            merged[list(self.row_ids)] = self.rows.to(weight.dtype)
        if self.down is None or self.up is None:
            return merged
        delta = self.up.float() @ self.down.float() * self.scaling
        if self.is_embedding:
            delta = delta.t()
        return (merged.float() + delta).to(weight.dtype)


def plain_name(name: str) -> str:
    """A tensor's name as PEFT saves it: without the name of the adapter, `default` for example."""
    for pattern, replacement in _ADAPTER_NAMES:
        name = pattern.sub(replacement, name)
    return name


def plan_updates(
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    merging: bool,
) -> dict[str, Update]:
    """The update of each tensor of the base, by its name.

    Args:
        shapes: of the base's tensors, including those of its VQGAN
        merging: False if PEFT applies the adapter. Tensors of its other options then pass.

    Raises UserError for tensors that the base does not have, and for shapes that do not match.
    """
    plan = _Plan(config, shapes)
    named = {plain_name(name): tensor for name, tensor in tensors.items()}
    if len(named) != len(tensors):
        raise UserError(
            f"{plan.folder}: Contains the tensors of several adapters. Save one adapter alone."
        )
    for name, tensor in sorted(named.items()):
        plan.add(name, tensor)
    if plan.unknown and merging:
        raise UserError(
            f"{plan.folder}: {len(plan.unknown)} tensors do not exist in the base: "
            f"{', '.join(plan.unknown[:3])}. Name the base that the adapter was trained on."
        )
    updates = {name: plan.finish(name) for name in plan.updates}
    fixed = [name for name in updates if name.startswith(HUGGING_FACE_PREFIX)]
    if fixed and merging:
        warnings.warn(
            f"{plan.folder}: {len(fixed)} tensors of the image tokenizer are left out "
            f"({fixed[0]} ...). The token space stays that of the base.",
            stacklevel=3,
        )
    return {name: update for name, update in updates.items() if name not in fixed}


class _Plan:
    """Collects updates while the tensors of an adapter are read."""

    def __init__(self, config: AdapterConfig, shapes: dict[str, tuple[int, ...]]) -> None:
        self.config = config
        self.folder = config.path.parent
        self.shapes = shapes
        self.updates: dict[str, Update] = {}
        self.unknown: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        own = name.removeprefix(PREFIX)
        lora = _LORA.fullmatch(own)
        if not name.startswith(PREFIX):
            self.unknown.append(name)
        elif lora is not None:
            side = "down" if lora[2].endswith("A") else "up"
            is_embedding = lora[2].startswith("embedding")
            self._set(name, f"{lora[1]}.weight", **{side: tensor, "is_embedding": is_embedding})
        elif own.endswith(_ROWS):
            self._set(name, own.removesuffix(_ROWS) + ".weight", rows=tensor)
        else:
            target = _WRAPPED.sub("", own)
            if target in self.shapes and tuple(tensor.shape) != self.shapes[target]:
                raise self._misfit(target, name, tuple(tensor.shape))
            self._set(name, target, **{"saved" if target == own else "base_copy": tensor})

    def _set(self, name: str, target: str, **fields: Any) -> None:
        if target in self.shapes:
            self.updates[target] = replace(self.updates.get(target, Update()), **fields)
        else:
            self.unknown.append(name)

    def finish(self, target: str) -> Update:
        """Checks that the parts of an update fit each other and the base."""
        update, shape = self.updates[target], self.shapes[target]
        module = target.removesuffix(".weight")
        if update.rows is not None:
            ids = self.config.rows_of(module)
            if tuple(update.rows.shape) != (len(ids), shape[1]) or max(ids) >= shape[0]:
                raise self._misfit(
                    target, f"trainable_token_indices of {module}", tuple(update.rows.shape)
                )
            update = replace(update, row_ids=tuple(ids))
        if (update.down is None) != (update.up is None):
            raise UserError(
                f"{self.folder}: {module} has only one of its two matrices. Copy all files of the "
                "adapter again."
            )
        if update.down is None or update.up is None:
            return update
        if update.down.ndim != 2 or update.up.ndim != 2:
            raise self._misfit(target, f"LoRA of {module}", tuple(update.down.shape))
        down, up = self._unblocked(update.down, update.up, update.is_embedding, shape)
        product = (up.shape[0], down.shape[1])
        expected = shape[::-1] if update.is_embedding else shape
        if product != expected or up.shape[1] != down.shape[0]:
            got = product[::-1] if update.is_embedding else product
            raise self._misfit(target, f"LoRA of {module}", got)
        scaling = self.config.scaling(module, down.shape[0])
        return replace(update, down=down, up=up, scaling=scaling)

    def _unblocked(
        self, down: Tensor, up: Tensor, is_embedding: bool, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """The matrices of BD-LoRA in full: PEFT saves the blocks of one of them, stacked."""
        blocks = self.config.blocks
        if blocks == 1 or is_embedding:
            return down, up
        if down.shape[1] * blocks == shape[1]:
            down = _block_diagonal(down, blocks)
        if up.shape[1] * blocks == down.shape[0]:
            up = _block_diagonal(up, blocks)
        return down, up

    def _misfit(self, target: str, name: str, found: tuple[int, ...]) -> UserError:
        expected = self.shapes[target]
        module = target.removesuffix(".weight")
        if module in _GROWING and found[1:] == expected[1:]:
            return UserError(
                f"{self.folder}: The adapter's {module.removeprefix('model.')} has {found[0]} "
                f"rows, the base {expected[0]}. Were tokens added before training? Chameleon's "
                "vocabulary is fixed: train without new tokens, or name the base that has them."
            )
        return UserError(
            f"{self.folder}: {name} does not fit the base's {target} (got {found}, expected "
            f"{expected}). Name the base that the adapter was trained on."
        )


def _block_diagonal(stacked: Tensor, blocks: int) -> Tensor:
    """Blocks (R, I / n), stacked by rows -> the full matrix (R, I), zero beside the blocks."""
    rows, columns = stacked.shape
    full = stacked.new_zeros(rows, columns * blocks)
    for number, block in enumerate(stacked.chunk(blocks)):
        height = block.shape[0]
        full[number * height : (number + 1) * height, number * columns :][:, :columns] = block
    return full
