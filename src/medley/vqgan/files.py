"""`vqgan.yaml` and `vqgan.ckpt` as published, and the VQGAN inside a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from medley.errors import UserError
from medley.images.preprocess import Fit
from medley.utils.files import atomic_file
from medley.vqgan import VQGAN, VQGANConfig

HUGGING_FACE_PREFIX = "model.vqmodel."
_TRAINING_ONLY = ("loss.", "quantize.ema")  # of a training run; not part of the model
_LIGHTNING = ("pytorch_lightning.", "lightning.", "lightning_fabric.")


def load_tensors(path: Path) -> dict[str, Any]:
    """A pickle of tensors, read with weights_only=True and mapped, not copied.

    Classes of Lightning, which its checkpoints mention beside the weights, are replaced by
    inert stand-ins. Raises UserError for a file that is missing, a Git-LFS pointer, broken,
    or one that carries code.
    """
    check_weights_file(path)
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an older container, or a broken file: the load below tells which
        named = []
    inert: list[Any] = [
        (type(name.rpartition(".")[2], (), {}), name)
        for name in named
        if name.startswith(_LIGHTNING)
    ]
    mapped = not _is_legacy(path)
    try:
        with torch.serialization.safe_globals(inert):
            loaded = torch.load(path, "cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a torn pickle makes torch raise nearly anything
        foreign = [name for name in named if not name.startswith(_LIGHTNING)]
        if foreign:
            raise UserError(
                f"{path}: this pickle holds more than tensors ({', '.join(foreign)}) and is not "
                "read, since unpickling could run code"
            ) from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: broken, cut off, or no file of weights ({first})") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds {type(loaded).__name__}, expected a table of tensors")
    return loaded


def check_weights_file(path: Path) -> None:
    """Raises UserError where weights are missing, or a Git-LFS pointer stands for them."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as handle:
        if handle.read(40).startswith(b"version https://git-lfs"):
            raise UserError(
                f"{path}: a Git-LFS pointer stands in place of the weights; run `git lfs pull` "
                "in the repository it comes from"
            )


def _is_legacy(path: Path) -> bool:
    with open(path, "rb") as handle:
        return handle.read(2) != b"PK"  # only zip containers can be mapped


def read_vqgan(folder: Path) -> tuple[VQGAN, Fit]:
    """`vqgan.yaml` and `vqgan.ckpt` in a folder -> VQGAN with its decoder, and its fit."""
    yaml_path, weights_path = folder / "vqgan.yaml", folder / "vqgan.ckpt"
    if not yaml_path.is_file():
        raise UserError(f"{yaml_path}: no such file; a VQGAN needs vqgan.yaml and vqgan.ckpt")
    try:
        parsed = yaml.safe_load(yaml_path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{yaml_path}: not YAML ({error})") from error
    try:
        config = VQGANConfig.from_yaml(parsed, str(yaml_path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    fit = (parsed.get("preprocessing") or {}).get("fit", "crop")
    if fit not in ("crop", "pad"):
        raise UserError(f"{yaml_path}: preprocessing.fit is {fit!r}, expected crop or pad")
    loaded = load_tensors(weights_path)
    state = loaded.get("state_dict", loaded)
    kept = {k: v for k, v in state.items() if not k.startswith(_TRAINING_ONLY)}
    return build_vqgan(config, kept, str(weights_path)), fit


def write_vqgan(folder: Path, vqgan: VQGAN, fit: Fit) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "vqgan.yaml") as temporary:
        content = {**vqgan.config.to_yaml(), "preprocessing": {"fit": fit}}
        temporary.write_text(yaml.safe_dump(content), encoding="utf-8")
    state = {k: v.detach().cpu().contiguous() for k, v in vqgan.state_dict().items()}
    with atomic_file(folder / "vqgan.ckpt") as temporary:
        torch.save({"state_dict": state}, temporary)


def build_vqgan(config: VQGANConfig, state: dict[str, Tensor], where: str) -> VQGAN:
    """A VQGAN with exactly these weights. Raises UserError naming what is missing or surplus."""
    with torch.device("meta"):
        vqgan = VQGAN(config)
    expected = vqgan.state_dict()
    check_names(expected, state, where)
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(state[name].shape)}, the configuration "
                f"makes it {tuple(tensor.shape)}"
            )
    copies = {name: tensor.detach().float().clone() for name, tensor in state.items()}
    vqgan.load_state_dict(copies, assign=True)
    return vqgan.eval()


def check_names(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raises UserError naming tensors that are missing or surplus, and what would mend it."""
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    advice = {
        "missing": "copy all files of the checkpoint again, its configuration among them",
        "not known": "the configuration beside these weights is that of another (smaller?) model",
    }
    for problem, names in (("missing", missing), ("not known", surplus)):
        if names:
            rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
            listed = f"{', '.join(names[:5])}{rest}"
            raise UserError(f"{where}: tensors {problem}: {listed}; {advice[problem]}")


# --- inside a Hugging Face folder ---------------------------------------------------------


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


def from_hugging_face_config(fields: Any) -> VQGANConfig:
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
    """What the Hugging Face model carries of a VQGAN: everything but the decoder."""
    return {
        HUGGING_FACE_PREFIX + name: tensor.detach()
        for name, tensor in vqgan.state_dict().items()
        if not name.startswith("decoder.")
    }


def vqgan_without_decoder(
    fields: Any, names: Iterable[str], get: Callable[[str], Tensor], where: str
) -> VQGAN:
    """The VQGAN of a Hugging Face folder; its decoder stays random and must not be used."""
    config = from_hugging_face_config(fields)
    state = {
        name.removeprefix(HUGGING_FACE_PREFIX): get(name)
        for name in names
        if name.startswith(HUGGING_FACE_PREFIX)
    }
    fresh = VQGAN(config).decoder.state_dict()
    state |= {f"decoder.{name}": tensor for name, tensor in fresh.items()}
    return build_vqgan(config, state, where)
