"""Loading: a checkpoint in any layout -> a Model on its device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from medley.checkpoints.adapter import (
    find_adapter,
    load_adapter,
    overwritten_tensors,
    resolve_base,
)
from medley.checkpoints.adapter_config import AdapterConfig
from medley.checkpoints.checkpoint import Checkpoint, is_adapter, open_checkpoint
from medley.errors import UserError
from medley.generation.kv_cache import bytes_per_token
from medley.generation.model_runner import BRANCHES
from medley.inference.devices import (
    AUTO_MAP,
    dispatch,
    replace_deprecated_map,
    resolve_device,
    resolve_dtype,
)
from medley.inference.memory import limit_caches
from medley.inference.model import Model
from medley.modeling.quantization import Quantize, quantize_layers, require_quantization
from medley.utils.manifest import check_fingerprint


def load(
    ckpt: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    vqgan: str | Path | None = None,
    quantize: Quantize | None = None,
) -> Model:
    """Opens a checkpoint in any of the three layouts, or `tiny`, the embedded model.

    Args:
        ckpt: checkpoint folder, LoRA adapter folder, or `tiny`
        device: auto (CUDA, else MPS, else CPU; MPS is untested), a torch device, or auto_map, which
            distributes the layers over several GPUs
        dtype: auto is the checkpoint's own on an accelerator and float32 on the CPU
        adapter: LoRA adapter of `ckpt`, which is merged into the weights unless they are quantized
        base: base checkpoint of a `ckpt` that is an adapter; by default the one it was trained on
        vqgan: folder of a VQGAN with a decoder
        quantize: store the layers' matrices in 4 or 8 bits

    Raises UserError for anything missing or mismatched.
    """
    checkpoint, adapter_folder = resolve(ckpt, adapter, base)
    return load_model(checkpoint, device, dtype, adapter_folder, vqgan, quantize)


def resolve(
    ckpt: str | Path, adapter: str | Path | None, base: str | Path | None
) -> tuple[Checkpoint, Path | None]:
    """The base checkpoint and the adapter to apply to it. Loads no weights."""
    path = Path(ckpt)
    if path.is_dir() and (is_adapter(path) or _contains_adapter_checkpoints(path)):
        if adapter is not None:
            raise UserError(
                f"{ckpt} is a LoRA adapter and cannot be combined with --adapter. Pass its base as "
                "--ckpt, or omit --adapter."
            )
        found = find_adapter(path)
        return resolve_base(found, base), found
    if base is not None:
        raise UserError(
            f"--base is only valid for a LoRA adapter, and {ckpt} is not one. Remove --base."
        )
    return open_checkpoint(ckpt), None if adapter is None else Path(adapter)


def _contains_adapter_checkpoints(path: Path) -> bool:
    return any(is_adapter(folder) for folder in path.glob("checkpoint-*"))


def load_model(
    checkpoint: Checkpoint,
    device: str,
    dtype: str | torch.dtype,
    adapter: str | Path | None,
    vqgan: str | Path | None,
    quantize: Quantize | None,
) -> Model:
    """`load` for a checkpoint that is resolved already."""
    device = replace_deprecated_map(device)
    target = resolve_device("auto" if device == AUTO_MAP else device)
    if quantize not in (None, *get_args(Quantize)):
        raise UserError(f"quantize is {quantize!r}, expected {' or '.join(get_args(Quantize))}.")
    if quantize is not None:
        require_quantization(quantize)  # before minutes of reading
    checkpoint.check_vocabulary()
    decoder: Any = checkpoint.decoder(resolve_dtype(dtype, target))
    own_dtype = next(decoder.lm_head.parameters()).dtype
    if quantize is not None:
        quantize_layers(decoder, quantize, own_dtype)
    if adapter is not None:
        decoder = _load_checked_adapter(decoder, checkpoint, Path(adapter))
        if quantize is None:
            decoder = merge_adapter(decoder)
    vqgan_folder = None if vqgan is None else Path(vqgan)
    image_tokenizer = checkpoint.image_tokenizer(vqgan_folder, device=target)
    if device == AUTO_MAP:
        per_token = bytes_per_token(decoder.config, own_dtype)
        decoder = dispatch(decoder, BRANCHES * decoder.config.max_position_embeddings * per_token)
    else:
        decoder = decoder.to(target)
    model = Model(decoder, checkpoint.text_tokenizer(), image_tokenizer, fuse=True)
    limit_caches([model])
    return model


def merge_adapter(decoder: Any) -> Any:
    """The decoder with its adapter merged into the weights, for decode steps with fused weights.

    In half precision the merged weights are rounded once more: on the embedded model, the error of
    the logits grows by 2 to 4 percent (docs/log.md). An adapter of a head or an embedding that are
    tied stays unmerged, because merging would change both.
    """
    own = decoder.get_base_model()
    embedding, head = own.get_input_embeddings(), own.get_output_embeddings()
    is_plain = isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    if decoder.config.tie_word_embeddings and not is_plain:
        return decoder
    return decoder.merge_and_unload()


def share_base(model: Model, checkpoint: Checkpoint, adapter: Path) -> Model:
    """A second model: an adapter on the decoder of `model`, which stays unchanged.

    Both share the base's weights and the tokenizers. The adapter needs memory for its own matrices
    and its cache only. `checkpoint` is the one that `model` was loaded from.
    """
    folder = find_adapter(adapter)
    if AdapterConfig.read(folder).changes_base or overwritten_tensors(folder):
        raise UserError(
            f"{adapter}: This adapter changes weights of its base, which other models share "
            "(init_lora_weights, bias, layer_replication, or saved embeddings). Serve it alone, "
            "or merge it first."
        )
    tensors = (*model.decoder.parameters(), *model.decoder.buffers())
    twin = copy.deepcopy(model.decoder, {id(tensor): tensor for tensor in tensors})
    decoder = _load_checked_adapter(twin, checkpoint, adapter)
    adapted = Model(decoder, model.text_tokenizer, model.image_tokenizer, fuse=True)
    limit_caches([adapted])
    return adapted


def _load_checked_adapter(decoder: Any, checkpoint: Checkpoint, adapter: Path) -> Any:
    """Applies an adapter. Raises UserError if it was trained on another base."""
    folder = find_adapter(adapter)
    if (adapter / "manifest.json").is_file():
        check_fingerprint(adapter, checkpoint.fingerprint(), str(checkpoint.folder))
    return load_adapter(decoder, folder)
