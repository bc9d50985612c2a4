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
from medley.utils.files import atomic_file, read_json
from medley.utils.tensor_files import ShardedTensors, check_names, load_pickle
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
    try:
        parsed = yaml.safe_load(yaml_path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{yaml_path}: Invalid YAML ({error}).") from error
    try:
        config = VQGANConfig.from_yaml(parsed, str(yaml_path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    preprocessing = _parse_preprocessing(parsed.get("preprocessing"), yaml_path)
    loaded = load_pickle(weights_path)
    state = loaded.get("state_dict", loaded)
    state = {name: t for name, t in state.items() if not name.startswith(_TRAINING_ONLY)}
    return build_vqgan(config, state, str(weights_path)), preprocessing


def _parse_preprocessing(entry: object, where: Path) -> Preprocessing:
    """The entry `preprocessing` of `vqgan.yaml`. Chameleon's own files have none."""
    if entry is None:
        return Preprocessing()
    allowed: dict[str, tuple[object, ...]] = {
        "fit": ("crop", "pad"),
        "exif_orientation": (True, False),
    }
    if not isinstance(entry, dict):
        raise UserError(f"{where}: Invalid preprocessing (got {entry!r}, expected a mapping).")
    for name, value in entry.items():
        if name not in allowed:
            raise UserError(
                f"{where}: Unknown preprocessing.{name} (expected {' or '.join(allowed)}). "
                "Update Medley if a newer version wrote the file."
            )
        if type(value) not in (str, bool) or value not in allowed[name]:
            raise UserError(
                f"{where}: Invalid preprocessing.{name} (got {value!r}, expected "
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
    with torch.device("meta"):
        vqgan = VQGAN(config)
    expected = vqgan.state_dict()
    check_names(expected, state, where)
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{where}: Wrong shape of {name} (got {tuple(state[name].shape)}, expected "
                f"{tuple(tensor.shape)} by the configuration)."
            )
    copies = {name: tensor.detach().float().clone() for name, tensor in state.items()}
    vqgan.load_state_dict(copies, assign=True)
    return vqgan.eval()


# --- inside a Hugging Face folder ---------------------------------------------------------


def read_config(folder: Path) -> transformers.ChameleonConfig:
    """`config.json` of a model in Hugging Face's layout. Raises UserError for other models."""
    fields = read_json(folder / "config.json")
    if fields.get("model_type") != "chameleon":
        raise UserError(
            f"{folder / 'config.json'}: Unsupported model_type (got {fields.get('model_type')!r}, "
            "expected 'chameleon'). Only Chameleon models (Chameleon, Anole, MedMax) can be loaded."
        )
    config: transformers.ChameleonConfig = transformers.ChameleonConfig.from_dict(fields)
    return config


def _read_encoder(folder: Path) -> VQGAN:
    """The VQGAN of a Hugging Face folder. Its decoder gets random weights and is unusable."""
    config = from_hugging_face_config(read_config(folder).vq_config)
    weights = ShardedTensors(folder)
    own = [name for name in weights.names() if name.startswith(HUGGING_FACE_PREFIX)]
    state = {n.removeprefix(HUGGING_FACE_PREFIX): t for n, t in weights.tensors(own)}
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


def from_hugging_face_config(fields: transformers.ChameleonVQVAEConfig) -> VQGANConfig:
    return VQGANConfig(
        ch=fields.base_channels,
        ch_mult=tuple(fields.channel_multiplier),
        num_res_blocks=fields.num_res_blocks,
        resolution=fields.resolution,
        z_channels=fields.latent_channels,
        embed_dim=fields.embed_dim,
        n_embed=fields.num_embeddings,
        attn_resolutions=tuple(fields.attn_resolutions or ()),
        in_channels=fields.in_channels,
    )


def hugging_face_tensors(vqgan: VQGAN) -> dict[str, Tensor]:
    """The tensors of a VQGAN that Hugging Face's model contains: all except the decoder's."""
    return {
        HUGGING_FACE_PREFIX + name: tensor.detach()
        for name, tensor in vqgan.state_dict().items()
        if not name.startswith("decoder.")
    }
