"""Writes checkpoints in either layout, and compares a written checkpoint with its source."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from torch import Tensor

from medley.checkpoints.chameleon import copy_tokenizer, write_model
from medley.checkpoints.checkpoint import Checkpoint, open_checkpoint
from medley.checkpoints.huggingface import write_config, write_processor, write_weights
from medley.checkpoints.weight_map import Norms
from medley.errors import UserError
from medley.modeling.dims import ModelDims
from medley.utils.config_files import read_json_object
from medley.utils.files import atomic_dir, require_space
from medley.utils.tensor_files import check_names
from medley.vqgan.files import hugging_face_tensors

_LICENSES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "ACCEPTABLE_USE*")


def write_hugging_face(
    target: Path,
    source: Checkpoint,
    tensors: Iterator[tuple[str, Tensor]] | None = None,
    verify: Callable[[Checkpoint], None] | None = None,
) -> None:
    """Writes a checkpoint in Hugging Face's layout, atomically.

    Args:
        source: provides configuration, tokenizers and VQGAN
        tensors: the decoder's tensors, for example of a merged adapter; those of `source` unless
            given
        verify: called with the new checkpoint before it gets its name. If it raises, nothing stays.
    """
    config, dtype = source.config(), source.dtype()
    vqgan, _, has_decoder = source.vqgan()
    require_space(target, source.weight_bytes())
    with atomic_dir(target) as folder:
        vq_tensors = hugging_face_tensors(vqgan)
        write_weights(folder, chain(tensors or source.tensors(), vq_tensors.items()))
        write_config(folder, config, dtype)
        parsed = read_json_object(source.tokenizer_file)
        write_processor(folder, parsed, vqgan.config.codes_per_image, vqgan.config.resolution)
        if has_decoder:
            copy_tokenizer(source.tokenizer_folder, folder / "tokenizer")
        copy_licenses(source.folder, folder)
        if verify is not None:
            verify(open_checkpoint(folder))


def write_chameleon(
    target: Path,
    source: Checkpoint,
    size: str,
    original: Checkpoint | None = None,
    shards: int | None = None,
    norms: Norms = "equal",
    verify: Callable[[Checkpoint], None] | None = None,
) -> None:
    """Writes a checkpoint in Chameleon's layout, atomically.

    Args:
        size: name of the folder below `models`
        original: checkpoint that the model was trained from; its params.json and its tokenizer
            folder are copied. Without it, both come from `source`.
        shards: number of shards; that of the model unless given
        norms: see `weight_map.to_chameleon`
        verify: called with the new checkpoint before it gets its name. If it raises, nothing stays.
    """
    _check_representable(source)
    dims = ModelDims.from_config(source.config())
    if shards is not None and shards < 1:
        raise UserError(f"--shards: Out of range (got {shards}, expected 1 or more).")
    dims = replace(dims, shards=shards or dims.shards)
    weights = None
    if original is not None:
        if original.fingerprint() != source.fingerprint():
            raise UserError(
                f"{original.folder}: Its VQGAN has another token space than {source.folder}. Name "
                "the checkpoint that the model was trained from."
            )
        weights = original.chameleon_weights
        if replace(weights.dims, shards=dims.shards) != dims:
            raise UserError(
                f"{original.folder}: The model has other sizes than {source.folder} (got "
                f"{weights.dims}, expected {dims})."
            )
    require_space(target, source.weight_bytes())
    with atomic_dir(target) as folder:
        write_model(folder / "models" / size, dims, source.tensors, weights, norms)
        tokenizer = (original or source).tokenizer_folder
        copy_tokenizer(tokenizer, folder / "tokenizer")
        copy_licenses((original or source).folder, folder)
        if verify is not None:
            verify(open_checkpoint(folder))


def _check_representable(source: Checkpoint) -> None:
    """Raises UserError for a configuration that changes logits and that params.json cannot hold."""
    config = source.config()
    rope = dict(config.rope_parameters or {})
    found = {
        "rope_type": (rope.pop("rope_type", "default"), "default"),
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (bool(config.attention_bias), False),
        "mlp_bias": (bool(config.mlp_bias), False),
        "head_dim": (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            config.hidden_size // config.num_attention_heads,
        ),
    }
    rope.pop("rope_theta", None)
    found |= {name: (value, None) for name, value in rope.items()}
    for name, (value, expected) in found.items():
        if value != expected and not (name == "partial_rotary_factor" and value == 1):
            raise UserError(
                f"{source.folder / 'config.json'}: Chameleon's layout cannot hold {name} (got "
                f"{value!r}, expected {expected!r}), and the model would change without it. Keep "
                "this model in Hugging Face's layout."
            )


def copy_licenses(source: Path, target: Path) -> None:
    """Copies the licenses and terms of use of the weights."""
    for pattern in _LICENSES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def max_abs_diff(one: Checkpoint, other: Checkpoint) -> float:
    """Largest absolute difference between the decoder tensors of two checkpoints.

    Raises UserError for tensors that are missing, unexpected or of another shape or dtype.
    """
    expected = dict(one.tensors())
    largest = 0.0
    found: set[str] = set()
    for name, tensor in other.tensors():
        found.add(name)
        reference = expected.get(name)
        if reference is None or (reference.shape, reference.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"{other.folder}: {name} is not in {one.folder}, or has another shape or dtype."
            )
        largest = max(largest, float((reference.float() - tensor.float()).abs().max()))
    check_names(expected, found, str(other.folder))
    return largest
