"""LoRA adapters in PEFT's layout: find, check, load, merge.

A merged matrix is `W + scaling * B A`, computed in float32 and rounded once to the base's dtype
(Hu et al. 2021; scaling is alpha / r, or alpha / sqrt(r) with rslora).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from medley.checkpoints.adapter_config import AdapterConfig
from medley.checkpoints.adapter_updates import PREFIX, Update, plain_name, plan_updates
from medley.checkpoints.checkpoint import Checkpoint, adapter_base_name, is_adapter, open_checkpoint
from medley.checkpoints.huggingface import EMBEDDING, HEAD
from medley.checkpoints.logits import LogitDifference, compare_logits, random_ids
from medley.errors import UserError
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.utils.config_files import library_errors, read_json_object
from medley.utils.tensor_files import check_weight, load_tensors


def find_adapter(path: Path) -> Path:
    """The folder itself if it is an adapter, or its newest `checkpoint-N` that is one."""
    if is_adapter(path):
        return path
    numbered = {
        int(match[1]): folder
        for folder in path.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and is_adapter(folder)
    }
    if not numbered:
        raise UserError(
            f"{path}: No adapter found (expected adapter_config.json and "
            "adapter_model.safetensors in this folder or in a folder checkpoint-N below it)."
        )
    return numbered[max(numbered)]


def resolve_base(adapter: Path, base: str | Path | None) -> Checkpoint:
    """The base checkpoint of an adapter: `base`, or the one that its configuration names."""
    name = base or adapter_base_name(adapter)
    if name is None:
        raise UserError(
            f"{adapter}: adapter_config.json does not name a base model. Name it with --base."
        )
    return open_checkpoint(name)


def weights_file(folder: Path) -> Path:
    """The file of an adapter's tensors; older versions of PEFT wrote a pickle."""
    path, older = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    return older if older.is_file() and not path.is_file() else path


def read_adapter(folder: Path, trained: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter.

    Raises UserError if the tensors are missing, empty or not finite. With `trained`, all-zero
    tensors are an error, too: such an adapter would merge to an unchanged base.
    """
    config = read_json_object(folder / "adapter_config.json")
    path = weights_file(folder)
    if not path.is_file():
        raise UserError(f"{path}: File not found. The adapter is incomplete without it.")
    tensors = load_tensors(path)
    for name, tensor in tensors.items():
        check_weight(name, tensor, None, str(path))
    problem = _find_problem(tensors, trained)
    if problem is not None:
        raise UserError(f"{path}: {problem}")
    return config, tensors


def _find_problem(tensors: dict[str, Tensor], trained: bool) -> str | None:
    if not tensors:
        return "Contains no tensors (saved under ZeRO-3 without gathering?)."
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            return f"{name} is empty (saved under ZeRO-3 without gathering?)."
        if not bool(tensor.isfinite().all()):
            return f"{name} contains NaN or infinite values. The training run diverged."
    # lora_A starts random, and base_layer is a copy of the base.
    others = [t for n, t in tensors.items() if "lora_A" not in n and ".base_layer." not in n]
    if trained and all(not bool(tensor.any()) for tensor in others):
        return "All trained tensors are zero. This adapter was never trained."
    return None


def load_adapter(
    decoder: ChameleonForConditionalGeneration, folder: Path, trainable: bool = False
) -> peft.PeftModel:
    """Applies an adapter to a decoder without merging; with `trainable`, to continue training.

    Raises UserError for an option that PEFT cannot apply again, and for tensors that do not fit.
    """
    _, tensors = read_adapter(folder)  # reports an empty adapter
    config = AdapterConfig.read(folder)
    config.check(merging=False)
    if not config.options.get("layer_replication"):
        updates = plan_updates(config, tensors, _shapes(decoder.config), merging=False)
        _check_copies(folder, updates, decoder.state_dict().items(), "this base")
    fix = "Copy its files again, or name the base that it was trained on."
    with library_errors(folder, "PEFT cannot apply this adapter", fix):
        model = peft.PeftModel.from_pretrained(decoder, str(folder), is_trainable=trainable)
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    found = {plain_name(name) for name in tensors}
    expected = {plain_name(name) for name in own}
    missing = sorted(expected - found)
    unknown = sorted(found - expected - {plain_name(name) for name in model.state_dict()})
    for problem, names in (("are missing", missing), ("do not exist in the base", unknown)):
        if names:
            raise UserError(
                f"{folder}: {len(names)} tensors {problem}: {', '.join(names[:3])}. Name the base "
                "that the adapter was trained on, or copy its files again."
            )
    return model if trainable else model.eval()


def overwritten_tensors(folder: Path) -> list[str]:
    """Tensors of the base that PEFT overwrites when it applies the adapter.

    PEFT saves copies of the base's embeddings beside an adapter of them.
    """
    config = AdapterConfig.read(folder)
    _, tensors = read_adapter(folder)
    names = [plain_name(name).removeprefix(PREFIX) for name in tensors]
    return [
        name
        for name in names
        if name.endswith((".weight", ".bias"))
        and ".lora_" not in name
        and not config.saves(name.rpartition(".")[0])
    ]


def _shapes(config: transformers.ChameleonConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a decoder, before quantization."""
    with torch.device("meta"):
        decoder = ChameleonForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}


def merged_tensors(base: Checkpoint, adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """The base's decoder tensors with the adapter merged in, one at a time.

    Raises UserError, before the first tensor, for an unsupported option, for a tensor of the
    adapter that the base does not have, and for shapes that do not match.
    """
    config = AdapterConfig.read(adapter)
    config.check(merging=True)
    _, tensors = read_adapter(adapter)
    updates = plan_updates(config, tensors, base.shapes, merging=True)
    _refuse_untying(adapter, updates, base)
    if any(update.base_copy is not None for update in updates.values()):
        _check_copies(adapter, updates, base.tensors(), str(base.folder))
    return _merged(base, updates)


def _refuse_untying(adapter: Path, updates: dict[str, Update], base: Checkpoint) -> None:
    """Raises UserError for an adapter that changes the head or embedding of a base that ties them.

    The merged model would need two tensors where its configuration has one.
    """
    tied = [name for name in (EMBEDDING, HEAD) if name in updates]
    if tied and base.config().tie_word_embeddings:
        raise UserError(
            f"{adapter}: It changes {tied[0]}, which {base.folder} ties to the other of embedding "
            "and head (tie_word_embeddings). Such an adapter cannot be merged; use it unmerged, or "
            "train one without this tensor."
        )


def _check_copies(
    adapter: Path, updates: dict[str, Update], base: Iterable[tuple[str, Tensor]], name: str
) -> None:
    """PEFT saves copies of adapted embeddings. Raises UserError if the base has others."""
    for tensor_name, weight in base:
        copy = updates.get(tensor_name, Update()).base_copy
        if copy is None or copy.shape != weight.shape:
            continue
        # One of the two may be rounded to another dtype.
        if not torch.equal(copy.to(weight), weight) and not torch.equal(copy, weight.to(copy)):
            raise UserError(
                f"{adapter}: Its copy of the base's {tensor_name} differs from that of {name}. "
                "Name the base that the adapter was trained on."
            )


def _merged(base: Checkpoint, updates: dict[str, Update]) -> Iterator[tuple[str, Tensor]]:
    for name, weight in base.tensors():
        yield name, updates[name].apply(weight) if name in updates else weight


def merge_difference(base: Checkpoint, adapter: Path, merged: Checkpoint) -> LogitDifference:
    """Float32 logits of base and adapter, compared with those of the merged model."""
    ids = random_ids(base)
    with torch.inference_mode():
        expected = load_adapter(base.decoder(torch.float32), adapter)(input_ids=ids).logits
        found = merged.decoder(torch.float32)(input_ids=ids).logits
    return compare_logits(expected, found)
