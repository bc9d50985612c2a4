"""A checkpoint in Chameleon's or Hugging Face's layout, and everything that can be read from it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import Tensor

from medley.checkpoints.chameleon import ChameleonWeights, is_chameleon, model_folder
from medley.checkpoints.huggingface import CONFIG, EMBEDDING, HEAD, check_sizes, is_hugging_face
from medley.data.vocabulary import IMAGE, IMAGE_IN_UNMODIFIED_FILE, TextTokenizer
from medley.errors import UserError
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.modeling.dims import ARCHITECTURE
from medley.tiny.embedded import TINY, checkpoint_folder
from medley.utils.config_files import library_errors, read_json_object, shown
from medley.utils.tensor_files import ShardedTensors, check_names, check_weight
from medley.vqgan.files import (
    HUGGING_FACE_PREFIX,
    LoadedVQGAN,
    from_hugging_face_config,
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
    path = adapter / "adapter_config.json"
    name = read_json_object(path).get("base_model_name_or_path")
    if name is not None and (not isinstance(name, str) or "\0" in name):
        raise UserError(
            f"{path}: Invalid base_model_name_or_path (got {shown(name)}, expected a name)."
        )
    return name or None


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

    def check_vocabulary(self) -> None:
        """Raises UserError if the tokenizer has ids that the decoder does not have."""
        size, expected = self._text_tokenizer.vocabulary.size, self._config.vocab_size
        if size > expected:
            raise UserError(
                f"{self.tokenizer_file}: A token id does not exist in the model (got {size - 1}, "
                f"expected at most {expected - 1}). Use the tokenizer of this checkpoint."
            )

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
        """The decoder's tensors under Hugging Face's names, without those of the VQGAN.

        A head that is tied to the embedding is among them, whether or not the files contain it.
        Raises UserError for a tensor of another shape than the configuration's.
        """
        for name, tensor in self._tensors():
            shape = self.shapes.get(name)
            yield name, check_weight(name, tensor, shape, str(self.folder))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self.layout == "chameleon":
            yield from self.chameleon_weights.tensors()
            return
        names = self._hugging_face_weights.names()
        own = [name for name in names if not name.startswith(HUGGING_FACE_PREFIX)]
        yield from self._hugging_face_weights.tensors(own)
        if self._config.tie_word_embeddings and HEAD not in own:
            yield HEAD, self._hugging_face_weights.get(EMBEDDING)

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
        names = self._hugging_face_weights.names()
        return self._hugging_face_weights.get(HEAD if HEAD in names else EMBEDDING).dtype

    def decoder(self, dtype: torch.dtype | None = None) -> ChameleonForConditionalGeneration:
        """A new decoder on the CPU, with image logits; in the dtype of the files unless given.

        Raises UserError that names tensors that are missing, unexpected or of another shape.
        """
        config = self.config()
        decoder = self._empty_decoder(config)
        state = {n: t.to(dtype or t.dtype, copy=True) for n, t in self.tensors()}
        state |= {n: t.clone() for n, t in hugging_face_tensors(self._vqgan.vqgan).items()}
        expected = decoder.state_dict()
        check_names(expected, state, str(self.folder))
        for name, tensor in expected.items():
            check_weight(name, state[name], tuple(tensor.shape), str(self.folder))
        decoder.load_state_dict(state, assign=True)
        decoder.tie_weights()  # has no effect unless the configuration ties the head
        # The rotary buffers are not in the files and were created on the meta device.
        decoder.model.rotary_emb = type(decoder.model.rotary_emb)(config=config)
        decoder.config.architectures = [ARCHITECTURE]
        return decoder.eval()

    def _empty_decoder(
        self, config: transformers.ChameleonConfig
    ) -> ChameleonForConditionalGeneration:
        """A decoder without memory, on the meta device."""
        where = self.folder / CONFIG if self.layout == "huggingface" else self.model_folder
        with (
            library_errors(where, "No model can be made of the configuration", "Copy it again."),
            torch.device("meta"),
        ):
            return ChameleonForConditionalGeneration(config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of a decoder, including those of its VQGAN."""
        state = self._empty_decoder(self.config()).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

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
            return self._hugging_face_config()
        tokenizer = self._text_tokenizer
        names = tokenizer.raw_tokenizer.get_vocab()
        names = {IMAGE if n == IMAGE_IN_UNMODIFIED_FILE else n: i for n, i in names.items()}
        vq_config = to_hugging_face_config(self._vqgan.vqgan.config)
        return self.chameleon_weights.dims.to_config(vq_config, names, tokenizer.vocabulary)

    def _hugging_face_config(self) -> transformers.ChameleonConfig:
        """config.json. Raises UserError if its sizes are not those of the weights."""
        config = read_config(self.folder)
        where = self.folder / CONFIG
        own = to_hugging_face_config(self._vqgan.vqgan.config)
        found = to_hugging_face_config(from_hugging_face_config(config.vq_config, where))
        for name in own.keys() - {"dropout"}:
            if found[name] != own[name]:
                raise UserError(
                    f"{where}: vq_config.{name} is not that of the VQGAN (got "
                    f"{shown(found[name])}, expected {own[name]}). Copy all files of the "
                    "checkpoint again."
                )
        weights = self._hugging_face_weights
        check_sizes(where, config, weights.shapes())
        if config.tie_word_embeddings and HEAD in weights.names():
            # transformers ties equal tensors only.
            config.tie_word_embeddings = torch.equal(weights.get(HEAD), weights.get(EMBEDDING))
        return config
