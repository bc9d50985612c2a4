"""A checkpoint in Chameleon's or Hugging Face's layout, and everything that can be read from it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from medley.checkpoints.chameleon import ChameleonWeights, is_chameleon, model_folder
from medley.checkpoints.huggingface import is_hugging_face
from medley.data.vocabulary import IMAGE, IMAGE_IN_UNMODIFIED_FILE, TextTokenizer
from medley.errors import UserError
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.modeling.dims import ARCHITECTURE
from medley.tiny.embedded import TINY, checkpoint_folder
from medley.utils.files import read_json
from medley.utils.tensor_files import ShardedTensors, check_names
from medley.vqgan.files import (
    HUGGING_FACE_PREFIX,
    LoadedVQGAN,
    hugging_face_tensors,
    open_vqgan,
    read_config,
    read_vqgan,
    to_hugging_face_config,
    vqgan_folder,
)
from medley.vqgan.image_tokenizer import ImageTokenizer, token_space_fingerprint

Layout = Literal["chameleon", "huggingface"]
_WEIGHT_SUFFIXES = (".pth", ".safetensors", ".bin", ".ckpt")


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def adapter_base_name(adapter: Path) -> str | None:
    """The base that an adapter's configuration names."""
    fields: dict[str, Any] = read_json(adapter / "adapter_config.json")
    name = fields.get("base_model_name_or_path")
    return str(name) if name else None


def open_checkpoint(path: str | Path, size: str | None = None) -> Checkpoint:
    """Detects the layout of a checkpoint folder. `tiny` is the embedded model.

    Args:
        path: CKPT or, in Chameleon's layout, CKPT/models/7b
        size: name of the folder below `models`, if there are several
    """
    folder = checkpoint_folder(path)
    if size is None and (folder / "params.json").is_file() and folder.parent.name == "models":
        return Checkpoint(folder.parents[1], "chameleon", folder.name)
    if not folder.is_dir():
        raise UserError(f"{path}: Folder not found (expected a checkpoint, or `{TINY}`).")
    if is_chameleon(folder):
        return Checkpoint(folder, "chameleon", size)
    if is_hugging_face(folder):
        return Checkpoint(folder, "huggingface", size)
    if is_adapter(folder):
        raise UserError(
            f"{folder}: This is an adapter. Name a base checkpoint here, or use --base."
        )
    raise UserError(
        f"{folder}: Unknown layout (expected Chameleon's with models/<size>/ and tokenizer/, "
        "Hugging Face's with config.json and model.safetensors, or an adapter with "
        "adapter_config.json)."
    )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder. Each part is read when it is first requested, and only once.

    `vqgan`, `text_tokenizer` and `tensors` return shared objects, which must not be modified.
    `config`, `decoder` and `image_tokenizer` return a new object on each call.
    """

    folder: Path
    layout: Layout
    model_size: str | None = None

    @property
    def model_folder(self) -> Path:
        return model_folder(self.folder, self.model_size)

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def tokenizer_file(self) -> Path:
        """Chameleon's text tokenizer. A published Hugging Face folder has its own file instead."""
        file = self.tokenizer_folder / "text_tokenizer.json"
        if file.is_file() or self.layout == "chameleon":
            return file
        return self.folder / "tokenizer.json"

    def text_tokenizer(self) -> TextTokenizer:
        return self._text_tokenizer

    def vqgan(self) -> LoadedVQGAN:
        """The VQGAN in float32 on the CPU. `image_tokenizer` returns one that may be modified."""
        return self._vqgan

    def image_tokenizer(
        self,
        vqgan_dir: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ImageTokenizer:
        """A new image tokenizer, with the checkpoint's VQGAN or with the one in `vqgan_dir`.

        Raises UserError if the VQGAN in `vqgan_dir` has another token space.
        """
        if vqgan_dir is None:
            vqgan, preprocessing, has_decoder = self._vqgan
            return ImageTokenizer(copy.deepcopy(vqgan), preprocessing, has_decoder, device, dtype)
        vqgan, preprocessing = read_vqgan(vqgan_folder(vqgan_dir) or vqgan_dir)
        found = token_space_fingerprint(vqgan)
        if found != self.fingerprint():
            raise UserError(
                f"{vqgan_dir}: This VQGAN has another token space than {self.folder} (got "
                f"{found[:12]}, expected {self.fingerprint()[:12]})."
            )
        own = self._vqgan
        if own.has_decoder and own.preprocessing != preprocessing:
            warnings.warn(
                f"{vqgan_dir}: This VQGAN's preprocessing replaces that of {self.folder} (got "
                f"{preprocessing.describe()}, expected {own.preprocessing.describe()}).",
                stacklevel=2,
            )
        return ImageTokenizer(vqgan, preprocessing, True, device, dtype)

    def fingerprint(self) -> str:
        """The fingerprint of the token space (see `token_space_fingerprint`)."""
        return self._fingerprint

    def config(self) -> transformers.ChameleonConfig:
        """A new copy of the decoder's configuration in transformers' form."""
        return copy.deepcopy(self._config)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The decoder's tensors under Hugging Face's names, without those of the VQGAN."""
        if self.layout == "chameleon":
            yield from self.chameleon_weights.tensors()
            return
        names = self._hugging_face_weights.names()
        own = [name for name in names if not name.startswith(HUGGING_FACE_PREFIX)]
        yield from self._hugging_face_weights.tensors(own)

    def weight_bytes(self) -> int:
        """Size of all files that contain weights, including the VQGAN's."""
        folders = {self.tokenizer_folder}
        folders.add(self.model_folder if self.layout == "chameleon" else self.folder)
        files = [p for folder in folders if folder.is_dir() for p in folder.iterdir()]
        return sum(p.stat().st_size for p in files if p.suffix in _WEIGHT_SUFFIXES)

    def dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights in the files."""
        if self.layout == "chameleon":
            return self.chameleon_weights.dtype
        return self._hugging_face_weights.get("lm_head.weight").dtype

    def decoder(self, dtype: torch.dtype | None = None) -> ChameleonForConditionalGeneration:
        """A new decoder on the CPU, with image logits; in the dtype of the files unless given.

        Raises UserError that names tensors that are missing, unexpected or of another shape.
        """
        config = self.config()
        with torch.device("meta"):
            decoder = ChameleonForConditionalGeneration(config)
        state = {n: t.to(dtype or t.dtype, copy=True) for n, t in self.tensors()}
        state |= {n: t.clone() for n, t in hugging_face_tensors(self._vqgan.vqgan).items()}
        expected = decoder.state_dict()
        check_names(expected, state, str(self.folder))
        for name, tensor in expected.items():
            if tensor.shape != state[name].shape:
                raise UserError(
                    f"{self.folder}: Wrong shape of {name} (got {tuple(state[name].shape)}, "
                    f"expected {tuple(tensor.shape)} by the configuration)."
                )
        decoder.load_state_dict(state, assign=True)
        # The rotary buffers are not in the files and were created on the meta device.
        decoder.model.rotary_emb = type(decoder.model.rotary_emb)(config=config)
        decoder.config.architectures = [ARCHITECTURE]
        return decoder.eval()

    @cached_property
    def chameleon_weights(self) -> ChameleonWeights:
        """The decoder's files. Only for Chameleon's layout."""
        return ChameleonWeights(self.model_folder)

    @cached_property
    def _hugging_face_weights(self) -> ShardedTensors:
        return ShardedTensors(self.folder)

    @cached_property
    def _text_tokenizer(self) -> TextTokenizer:
        return TextTokenizer.from_file(self.tokenizer_file)

    @cached_property
    def _vqgan(self) -> LoadedVQGAN:
        loaded = open_vqgan(self.folder)
        loaded.vqgan.requires_grad_(False)
        return loaded

    @cached_property
    def _fingerprint(self) -> str:
        return token_space_fingerprint(self._vqgan.vqgan)

    @cached_property
    def _config(self) -> transformers.ChameleonConfig:
        if self.layout == "huggingface":
            return read_config(self.folder)
        tokenizer = self._text_tokenizer
        names = tokenizer.raw_tokenizer.get_vocab()
        names = {IMAGE if n == IMAGE_IN_UNMODIFIED_FILE else n: i for n, i in names.items()}
        vq_config = to_hugging_face_config(self._vqgan.vqgan.config)
        return self.chameleon_weights.dims.to_config(vq_config, names, tokenizer.vocabulary)
