"""Finds, reads and writes a VQGAN: `vqgan.yaml` with `vqgan.ckpt`, or inside a Hugging Face folder.

A model in Hugging Face's layout contains the encoder and the codebook only. The full VQGAN, with
its decoder, is in the folder `tokenizer` of the checkpoint if the checkpoint has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml
from torch import Tensor

from medley.errors import UserError
from medley.images.preprocess import Preprocessing
from medley.tiny.embedded import TINY, checkpoint_folder
from medley.utils.config_files import (
    integer,
    library_errors,
    number,
    read_json_object,
    read_yaml_object,
    shown,
)
from medley.utils.files import atomic_file
from medley.utils.tensor_files import (
    ShardedTensors,
    check_names,
    check_weight,
    check_weights,
    load_pickle,
)
from medley.vqgan.model import VQGAN, Decoder, VQGANConfig

HUGGING_FACE_PREFIX = "model.vqmodel."
_TRAINING_ONLY = ("loss.", "quantize.ema")  # tensors of a training run, not of the model


class LoadedVQGAN(NamedTuple):
    """A VQGAN in float32 on the CPU. Without `has_decoder`, its decoder has random weights."""

    vqgan: VQGAN
    preprocessing: Preprocessing
    has_decoder: bool


def vqgan_folder(path: str | Path) -> Path | None:
    """The folder with `vqgan.yaml` and `vqgan.ckpt` of a checkpoint, or None.

    `path` is that folder, a checkpoint with a folder `tokenizer`, `CKPT/models/7b`, or `tiny`.
    """
    folder = checkpoint_folder(path)
    candidates = [folder, folder / "tokenizer"]
    if folder.parent.name == "models" and (folder / "params.json").is_file():
        candidates.append(folder.parents[1] / "tokenizer")
    for candidate in candidates:
        if (candidate / "vqgan.yaml").is_file() or (candidate / "vqgan.ckpt").is_file():
            return candidate
    return None


def open_vqgan(path: str | Path) -> LoadedVQGAN:
    """The VQGAN of a checkpoint in any layout, of a folder with only a VQGAN, or of `tiny`.

    Raises UserError if no VQGAN is found or if its files are incomplete.
    """
    found = vqgan_folder(path)
    if found is not None:
        return LoadedVQGAN(*read_vqgan(found), has_decoder=True)
    folder = checkpoint_folder(path)
    if not folder.is_dir():
        raise UserError(f"{path}: Folder not found (expected a checkpoint, or `{TINY}`).")
    if (folder / "config.json").is_file():
        return LoadedVQGAN(_read_encoder(folder), Preprocessing(), has_decoder=False)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{path}: An adapter has no VQGAN. Name its base checkpoint.")
    raise UserError(
        f"{path}: No VQGAN found (expected vqgan.yaml and vqgan.ckpt in this folder or in its "
        "folder tokenizer, or a Chameleon model in Hugging Face's layout)."
    )


def read_vqgan(folder: Path) -> tuple[VQGAN, Preprocessing]:
    """`vqgan.yaml` and `vqgan.ckpt` in a folder -> VQGAN with decoder, and its preprocessing."""
    yaml_path, weights_path = folder / "vqgan.yaml", folder / "vqgan.ckpt"
    if not yaml_path.is_file():
        raise UserError(f"{yaml_path}: File not found. A VQGAN needs vqgan.yaml and vqgan.ckpt.")
    parsed = read_yaml_object(yaml_path)
    config = VQGANConfig.from_yaml(parsed, str(yaml_path))
    preprocessing = _parse_preprocessing(parsed.get("preprocessing"), yaml_path)
    loaded = load_pickle(weights_path)
    state = loaded.get("state_dict", loaded)
    if not isinstance(state, dict):
        raise UserError(
            f"{weights_path}: Invalid state_dict (got {shown(type(state).__name__)}, expected a "
            "dictionary of tensors)."
        )
    state = {n: t for n, t in state.items() if not str(n).startswith(_TRAINING_ONLY)}
    return build_vqgan(config, check_weights(state, weights_path), str(weights_path)), preprocessing


def _parse_preprocessing(entry: object, where: Path) -> Preprocessing:
    """The entry `preprocessing` of `vqgan.yaml`. Chameleon's own files have none."""
    if entry is None:
        return Preprocessing()
    allowed: dict[str, tuple[object, ...]] = {
        "fit": ("crop", "pad"),
        "exif_orientation": (True, False),
    }
    if not isinstance(entry, dict):
        raise UserError(f"{where}: Invalid preprocessing (got {shown(entry)}, expected a mapping).")
    for name, value in entry.items():
        if name not in allowed:
            raise UserError(
                f"{where}: Unknown preprocessing field {shown(name)} (expected "
                f"{' or '.join(allowed)}). Update Medley if a newer version wrote the file."
            )
        if type(value) not in (str, bool) or value not in allowed[name]:
            raise UserError(
                f"{where}: Invalid preprocessing.{name} (got {shown(value)}, expected "
                f"{' or '.join(yaml.safe_dump(c).split()[0] for c in allowed[name])})."
            )
    return Preprocessing(**entry)


def write_vqgan(folder: Path, vqgan: VQGAN, preprocessing: Preprocessing) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "vqgan.yaml") as temporary:
        content = {**vqgan.config.to_yaml(), "preprocessing": preprocessing.describe()}
        temporary.write_text(yaml.safe_dump(content), encoding="utf-8")
    state = {name: t.detach().cpu().contiguous() for name, t in vqgan.state_dict().items()}
    with atomic_file(folder / "vqgan.ckpt") as temporary:
        torch.save({"state_dict": state}, temporary)


def build_vqgan(config: VQGANConfig, state: dict[str, Tensor], where: str) -> VQGAN:
    """A VQGAN with exactly these weights, in float32.

    Raises UserError that names missing and unexpected tensors and wrong shapes.
    """
    _check_sizes(config, state, where)
    with (
        library_errors(where, "The configuration is invalid", "Copy its file again."),
        torch.device("meta"),
    ):
        vqgan = VQGAN(config)
    expected = vqgan.state_dict()
    check_names(expected, state, where)
    for name, tensor in expected.items():
        check_weight(name, state[name], tuple(tensor.shape), where)
    copies = {name: tensor.detach().float().clone() for name, tensor in state.items()}
    vqgan.load_state_dict(copies, assign=True)
    return vqgan.eval()


def _check_sizes(config: VQGANConfig, state: dict[str, Tensor], where: str) -> None:
    """Raises UserError for sizes that are not those of the weights.

    A network of false sizes may take hours to build, or all memory.
    """
    first, last, book = "encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding"
    book += ".weight"
    check_names([first, last, book], state.keys() & {first, last, book}, where)
    levels = {n.split(".")[2] for n in state if n.startswith("encoder.down.")}
    blocks = {n.split(".")[4] for n in state if n.startswith("encoder.down.0.block.")}
    stages = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(len(levels))]
    check_names(stages, state.keys() & set(stages), where)
    widths = [*state[first].shape[:1], *(state[stage].shape[0] for stage in stages)]
    for name, got, expected in (
        ("ch_mult", len(config.ch_mult), len(levels)),
        ("num_res_blocks", config.num_res_blocks, len(blocks)),
        ("ch and ch_mult", [config.ch, *(config.ch * m for m in config.ch_mult)], widths),
        ("in_channels", [config.in_channels], list(state[first].shape[1:2])),
        ("z_channels", [config.z_channels], list(state[last].shape[:1])),
        ("n_embed and embed_dim", [config.n_embed, config.embed_dim], list(state[book].shape)),
    ):
        if got != expected:
            raise UserError(
                f"{where}: The weights do not fit {name} of the configuration (got {got}, "
                f"expected {expected}). Copy all files of the checkpoint again."
            )


# --- inside a Hugging Face folder ---------------------------------------------------------


def read_config(folder: Path) -> transformers.ChameleonConfig:
    """`config.json` of a model in Hugging Face's layout. Raises UserError for other models."""
    path = folder / "config.json"
    fields = read_json_object(path)
    if fields.get("model_type") != "chameleon":
        raise UserError(
            f"{path}: Unsupported model_type (got {shown(fields.get('model_type'))}, expected "
            "'chameleon'). Only Chameleon models (Chameleon, Anole, MedMax) can be loaded."
        )
    _check_fields(path, fields)
    config: transformers.ChameleonConfig
    with library_errors(path, "Invalid configuration", "Copy the file again."):
        config = transformers.ChameleonConfig.from_dict(fields)
    return config


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    """Raises UserError for a number that transformers accepts and that no model has."""
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "vocab_size", "max_position_embeddings", "num_labels",
                 "model_parallel_size"):  # fmt: skip
        if fields.get(name) is not None:
            integer(path, name, fields[name])
    if fields.get("num_labels") is not None:  # transformers makes a name for each
        integer(path, "num_labels", fields["num_labels"], high=1 << 16)
    if fields.get("rms_norm_eps") is not None:
        number(path, "rms_norm_eps", fields["rms_norm_eps"], high=1)
    tokens = fields.get("vocabulary_map") or {}
    if not isinstance(tokens, dict):
        raise UserError(
            f"{path}: Invalid vocabulary_map (got {shown(tokens)}, expected an object with the id "
            "of each token)."
        )
    for name, value in tokens.items():
        integer(path, f"vocabulary_map.{name}", value, low=0)


def _read_encoder(folder: Path) -> VQGAN:
    """The VQGAN of a Hugging Face folder. Its decoder gets random weights and is unusable."""
    config = from_hugging_face_config(read_config(folder).vq_config, folder / "config.json")
    weights = ShardedTensors(folder)
    own = [name for name in weights.names() if name.startswith(HUGGING_FACE_PREFIX)]
    state = {n.removeprefix(HUGGING_FACE_PREFIX): t for n, t in weights.tensors(own)}
    _check_sizes(config, state, str(folder))
    state |= {f"decoder.{name}": t for name, t in Decoder(config).state_dict().items()}
    return build_vqgan(config, state, str(folder))


def to_hugging_face_config(config: VQGANConfig) -> dict[str, Any]:
    """The fields of ChameleonVQVAEConfig."""
    return {
        "embed_dim": config.embed_dim,
        "num_embeddings": config.n_embed,
        "double_latent": False,
        "latent_channels": config.z_channels,
        "resolution": config.resolution,
        "in_channels": config.in_channels,
        "base_channels": config.ch,
        "channel_multiplier": list(config.ch_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": list(config.attn_resolutions),
        "dropout": config.dropout,
    }


def from_hugging_face_config(
    fields: transformers.ChameleonVQVAEConfig, where: str | Path
) -> VQGANConfig:
    """Raises UserError that names `where` and the field for a size that is not one."""

    def size(name: str) -> int:
        return integer(where, f"vq_config.{name}", getattr(fields, name))

    def sizes(name: str) -> tuple[int, ...]:
        values = getattr(fields, name)
        if not isinstance(values, list | tuple | None):
            raise UserError(
                f"{where}: Invalid vq_config.{name} (got {shown(values)}, expected a list)."
            )
        return tuple(integer(where, f"vq_config.{name}", value) for value in values or ())

    return VQGANConfig.checked(
        str(where),
        ch=size("base_channels"),
        ch_mult=sizes("channel_multiplier"),
        num_res_blocks=size("num_res_blocks"),
        resolution=size("resolution"),
        z_channels=size("latent_channels"),
        embed_dim=size("embed_dim"),
        n_embed=size("num_embeddings"),
        attn_resolutions=sizes("attn_resolutions"),
        in_channels=size("in_channels"),
    )


def hugging_face_tensors(vqgan: VQGAN) -> dict[str, Tensor]:
    """The tensors of a VQGAN that Hugging Face's model contains: all except the decoder's."""
    return {
        HUGGING_FACE_PREFIX + name: tensor.detach()
        for name, tensor in vqgan.state_dict().items()
        if not name.startswith("decoder.")
    }
