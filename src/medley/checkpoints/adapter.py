"""LoRA adapters in PEFT's layout: attach, check what was saved, merge.

`W + scaling * B A` for every adapted matrix, computed in float32 and rounded once to the
base's dtype (Hu et al. 2021; scaling is alpha / r, with rslora alpha / sqrt(r)).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medley.checkpoints.checkpoint import Checkpoint, adapter_base_name, is_adapter, open_checkpoint
from medley.errors import UserError
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.utils.files import read_json
from medley.utils.tensor_files import check_weights_file, load_tensors

_PREFIX = "base_model.model."
_COVERED = {"peft_type": ("LORA",), "bias": ("none",), "use_dora": (False, None)}


def find_adapter(path: Path) -> Path:
    """The adapter in a folder: itself, or that of its newest whole Trainer checkpoint."""
    if is_adapter(path):
        return path
    numbered = {
        int(match[1]): folder
        for folder in path.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and is_adapter(folder)
    }
    if not numbered:
        raise UserError(
            f"{path}: no adapter; expected adapter_config.json and adapter_model.safetensors "
            "there or in a checkpoint-N below it"
        )
    return numbered[max(numbered)]


def resolve_base(adapter: Path, base: str | Path | None) -> Checkpoint:
    """The base of an adapter: `--base` where given, else what its configuration names."""
    named = base or adapter_base_name(adapter)
    if named is None:
        raise UserError(f"{adapter}: adapter_config.json names no base model; name it with --base")
    return open_checkpoint(named)


def read_adapter(folder: Path, trained: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter.

    Raises UserError for one whose tensors are missing, empty, not finite or, where it is `trained`,
    all zero: such an adapter would merge to the base, silently.
    """
    config: dict[str, Any] = read_json(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    older = folder / "adapter_model.bin"
    if not path.is_file() and older.is_file():
        path = older
        tensors = load_tensors(path)
    elif path.is_file():
        check_weights_file(path)
        try:
            with safe_open(path, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
        except SafetensorError as error:
            raise UserError(f"{path}: broken or cut off ({error})") from error
    else:
        raise UserError(f"{path}: no such file; the adapter is not whole without it")
    problem = _validate(tensors, trained)
    if problem is not None:
        raise UserError(f"{path}: {problem}")
    return config, tensors


def _validate(tensors: dict[str, Tensor], trained: bool) -> str | None:
    if not tensors:
        return "holds no tensors (saved under ZeRO-3 without gathering?)"
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            return f"{name} is empty (saved under ZeRO-3 without gathering?)"
        if not bool(tensor.isfinite().all()):
            return f"{name} holds NaN or infinite values; the training run went wrong"
    learned = [t for n, t in tensors.items() if "lora_A" not in n]
    if trained and all(not bool(tensor.any()) for tensor in learned):
        return "every learned tensor is zero: this adapter was never trained"
    return None


def load_adapter(
    decoder: ChameleonForConditionalGeneration, folder: Path, learns: bool = False
) -> Any:
    """A decoder with an adapter laid over it, unmerged, as a PeftModel; `learns` to train it on."""
    _, tensors = read_adapter(folder)  # refuses an empty one with a reason
    modules = {n: _shape(m) for n, m in decoder.named_modules() if hasattr(m, "weight")}
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix(_PREFIX).partition(".lora_")
        if not kind:
            continue
        shape = modules.get(module)
        side = 1 if kind.startswith("A") else 0
        if shape is None or shape[side] != tensor.shape[side]:
            raise UserError(
                f"{folder}: {name} {tuple(tensor.shape)} does not fit the base "
                f"({module}: {'no such matrix' if shape is None else tuple(shape)}); was it "
                "trained on another one?"
            )
    model = peft.PeftModel.from_pretrained(decoder, str(folder), is_trainable=learns)
    return model if learns else model.eval()


def _shape(module: Any) -> tuple[int, ...]:
    """Of a module's weight; of a quantised one as it was before."""
    if hasattr(module, "in_features"):
        return (module.out_features, module.in_features)
    return tuple(module.weight.shape)


def merged_tensors(base: Checkpoint, adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """The base's decoder tensors with the adapter merged in, one at a time.

    Raises UserError for an option that this merge does not cover, for a tensor of the adapter
    that finds no place, and for shapes that do not match.
    """
    config, tensors = read_adapter(adapter)
    for option, good in _COVERED.items():
        if option in config and config[option] not in good:
            raise UserError(
                f"{adapter / 'adapter_config.json'}: {option} is {config[option]!r}, which the "
                f"merge does not cover (it covers {', '.join(map(str, good))})"
            )
    left = set(tensors)
    for name, weight in base.tensors():
        module = name.removesuffix(".weight")
        yield name, _merged(name, weight, _PREFIX + module, config, tensors, left)
    if left:
        raise UserError(
            f"{adapter}: {len(left)} tensors have no place in {base.folder}: "
            f"{', '.join(sorted(left)[:3])}"
        )


def _merged(
    name: str,
    weight: Tensor,
    module: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    left: set[str],
) -> Tensor:
    down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    rows = f"{module}.token_adapter.trainable_tokens_delta"
    saved = f"{module}.weight"
    merged = weight
    if saved in tensors:  # modules_to_save: the whole tensor was trained
        left.discard(saved)
        merged = tensors[saved].to(weight.dtype)
    if rows in tensors:
        left.discard(rows)
        merged = merged.clone()
        merged[_token_indices(config, module)] = tensors[rows].to(weight.dtype)
    if down not in tensors:
        return merged
    a, b = tensors[down].float(), tensors[up].float()
    left -= {down, up}
    if (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise UserError(
            f"{name}: the base's matrix is {tuple(weight.shape)}, the adapter's "
            f"{(b.shape[0], a.shape[1])}; is it the base that the adapter was trained on?"
        )
    delta = b @ a * _scaling(config, module.removeprefix(_PREFIX))
    if config.get("fan_in_fan_out"):
        delta = delta.t()
    return (merged.float() + delta).to(weight.dtype)


def _scaling(config: dict[str, Any], module: str) -> float:
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else float(rank))


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that matches the end of a module's name, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _token_indices(config: dict[str, Any], module: str) -> list[int]:
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        for name, own in indices.items():
            if module.endswith(name):
                return list(own)
        raise UserError(f"adapter_config.json names no trainable_token_indices for {module}")
    return list(indices or [])


def verify_merge(base: Checkpoint, adapter: Path, merged: Checkpoint) -> float:
    """Largest difference of float32 logits between base + adapter and the merged checkpoint."""
    decoder = load_adapter(base.decoder(torch.float32), adapter)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.text_tokenizer().vocabulary.size, (2, 32), generator=generator)
    with torch.inference_mode():
        expected = decoder(input_ids=ids).logits
        found = merged.decoder(torch.float32)(input_ids=ids).logits
    return float((expected - found).abs().max())
