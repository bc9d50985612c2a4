"""The three layouts of a checkpoint: Chameleon's, Hugging Face's, and a LoRA adapter."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from medley.checkpoints.chameleon import (
    ChameleonWeights,
    ModelDims,
    copy_tokenizer,
    is_chameleon,
    model_folder,
    write_model,
)
from medley.checkpoints.huggingface import (
    HuggingFaceWeights,
    is_hugging_face,
    read_config,
    write_config,
    write_processor,
    write_weights,
)
from medley.checkpoints.weight_map import Norms
from medley.data.vocabulary import IMAGE, IMAGE_IN_UNMODIFIED_FILE, TextTokenizer
from medley.errors import UserError
from medley.images.preprocess import Fit
from medley.modeling.chameleon import ChameleonForConditionalGeneration, decoder_config
from medley.utils.files import atomic_dir, read_json, require_space
from medley.vqgan import VQGAN
from medley.vqgan.files import (
    HUGGING_FACE_PREFIX,
    check_names,
    hugging_face_tensors,
    read_vqgan,
    to_hugging_face_config,
    vqgan_without_decoder,
)
from medley.vqgan.image_tokenizer import ImageTokenizer, token_space_fingerprint

TINY = "tiny"
Layout = Literal["chameleon", "huggingface"]


def tiny_folder() -> Path:
    """The embedded model's folder in the installed package."""
    return Path(str(resources.files("medley") / "tiny"))


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def open_checkpoint(path: str | Path, size: str | None = None) -> Checkpoint:
    """Finds out which layout a folder has. Raises UserError saying what would make it one."""
    folder = tiny_folder() if str(path) == TINY and not Path(path).is_dir() else Path(path)
    if size is None and (folder / "params.json").is_file() and folder.parent.name == "models":
        return Checkpoint(folder.parents[1], "chameleon", folder.name)  # CKPT/models/7b
    if not folder.is_dir():
        raise UserError(f"{path}: no such checkpoint folder (or `{TINY}`, the embedded model)")
    if is_chameleon(folder):
        return Checkpoint(folder, "chameleon", size)
    if is_hugging_face(folder):
        return Checkpoint(folder, "huggingface", size)
    if is_adapter(folder):
        raise UserError(f"{folder}: an adapter; a base checkpoint is needed here (--base)")
    raise UserError(
        f"{folder}: neither Chameleon's layout (models/<size>/, tokenizer/), nor Hugging Face's "
        "(config.json, model.safetensors), nor an adapter (adapter_config.json)"
    )


def vqgan_folder(path: Path) -> Path | None:
    """The folder with vqgan.yaml and vqgan.ckpt: this one, or its `tokenizer`; None for none."""
    for folder in (path, path / "tokenizer"):
        if (folder / "vqgan.yaml").is_file():
            return folder
    return None


def open_image_tokenizer(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ImageTokenizer:
    """The image tokenizer of a checkpoint in any layout, of a folder with a VQGAN, or of `tiny`."""
    folder = vqgan_folder(Path(path))
    if folder is not None:
        vqgan, fit = read_vqgan(folder)
        return ImageTokenizer(vqgan, fit, True, device, dtype)
    return open_checkpoint(path).image_tokenizer(device=device, dtype=dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; nothing is read until it is asked for."""

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
        """The tokenizer as Chameleon has it; in a published Hugging Face folder its own."""
        file = self.tokenizer_folder / "text_tokenizer.json"
        if file.is_file() or self.layout == "chameleon":
            return file
        return self.folder / "tokenizer.json"

    def text_tokenizer(self) -> TextTokenizer:
        return TextTokenizer.from_file(self.tokenizer_file)

    def vqgan(self, elsewhere: Path | None = None) -> tuple[VQGAN, Fit, bool]:
        """VQGAN, its fit, and whether it has a decoder and can draw.

        `elsewhere` names a folder with vqgan.yaml and vqgan.ckpt to take it from; one of
        another token space is refused.
        """
        if elsewhere is not None:
            vqgan, fit = read_vqgan(vqgan_folder(elsewhere) or elsewhere)
            own = token_space_fingerprint(self.vqgan()[0])
            if token_space_fingerprint(vqgan) != own:
                raise UserError(
                    f"{elsewhere}: this VQGAN speaks other codes than {self.folder} (token "
                    f"space {token_space_fingerprint(vqgan)[:12]}, expected {own[:12]})"
                )
            return vqgan, fit, True
        if self.layout == "chameleon" or (self.tokenizer_folder / "vqgan.ckpt").is_file():
            return (*read_vqgan(self.tokenizer_folder), True)
        weights = HuggingFaceWeights(self.folder)
        fields = read_config(self.folder).vq_config
        where = str(self.folder)
        return vqgan_without_decoder(fields, weights.names(), weights.get, where), "crop", False

    def image_tokenizer(
        self,
        elsewhere: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ImageTokenizer:
        vqgan, fit, has_decoder = self.vqgan(elsewhere)
        return ImageTokenizer(vqgan, fit, has_decoder, device, dtype)

    def fingerprint(self) -> str:
        return token_space_fingerprint(self.vqgan()[0])

    def config(self) -> transformers.ChameleonConfig:
        """The decoder's configuration, whatever the layout."""
        if self.layout == "huggingface":
            return read_config(self.folder)
        tokenizer, sizes = self.text_tokenizer(), ChameleonWeights(self.model_folder).sizes
        names = tokenizer.marked.get_vocab()
        names = {IMAGE if n == IMAGE_IN_UNMODIFIED_FILE else n: i for n, i in names.items()}
        return decoder_config(
            width=sizes.width,
            layers=sizes.layers,
            heads=sizes.heads,
            key_value_heads=sizes.key_value_heads,
            feed_forward=sizes.feed_forward,
            vocabulary_size=sizes.vocabulary,
            context=sizes.context,
            rope_theta=sizes.rope_theta,
            norm_eps=sizes.norm_eps,
            swin_norm=sizes.swin_norm,
            model_parallel_size=sizes.shards,
            vq_config=to_hugging_face_config(read_vqgan(self.tokenizer_folder)[0].config),
            vocabulary_map=names,
            marks=tokenizer.vocabulary,
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The decoder's tensors under Hugging Face's names, without the VQGAN's."""
        if self.layout == "chameleon":
            yield from ChameleonWeights(self.model_folder).tensors()
            return
        weights = HuggingFaceWeights(self.folder)
        own = [n for n in weights.names() if not n.startswith(HUGGING_FACE_PREFIX)]
        yield from weights.tensors(own)

    def weight_bytes(self) -> int:
        """Bytes of the files that hold weights, the VQGAN's among them."""
        folders = {self.tokenizer_folder}
        folders.add(self.model_folder if self.layout == "chameleon" else self.folder)
        kinds = (".pth", ".safetensors", ".bin", ".ckpt")
        files = [p for folder in folders if folder.is_dir() for p in folder.iterdir()]
        return sum(p.stat().st_size for p in files if p.suffix in kinds)

    def dtype(self) -> torch.dtype:
        """The dtype that the decoder's weights are kept in."""
        if self.layout == "chameleon":
            return ChameleonWeights(self.model_folder).dtype
        return HuggingFaceWeights(self.folder).get("lm_head.weight").dtype

    def decoder(self, dtype: torch.dtype | None = None) -> ChameleonForConditionalGeneration:
        """The decoder with open image logits, on the CPU; `dtype` None keeps the file's.

        Raises UserError naming tensors that are missing, surplus or of another shape.
        """
        config = self.config()
        with torch.device("meta"):
            decoder = ChameleonForConditionalGeneration(config)
        state = {n: t.to(dtype) if dtype else t.clone() for n, t in self.tensors()}
        state |= {n: t.clone() for n, t in hugging_face_tensors(self.vqgan()[0]).items()}
        expected = decoder.state_dict()
        check_names(expected, state, str(self.folder))
        for name, tensor in expected.items():
            if tensor.shape != state[name].shape:
                raise UserError(
                    f"{self.folder}: {name} has shape {tuple(state[name].shape)}, the "
                    f"configuration makes it {tuple(tensor.shape)}"
                )
        decoder.load_state_dict(state, assign=True)
        # Buffers that no file holds were made on the meta device: make them again for real.
        decoder.model.rotary_emb = type(decoder.model.rotary_emb)(config=config)
        decoder.config.architectures = ["ChameleonForConditionalGeneration"]
        return decoder.eval()


def write_hugging_face(
    target: Path, source: Checkpoint, tensors: Iterator[tuple[str, Tensor]] | None = None
) -> None:
    """Writes a checkpoint in Hugging Face's layout, whole or not at all.

    `tensors` take the place of the source's own (a merged adapter, say); the rest, VQGAN,
    tokenizer and configuration, is the source's.
    """
    config, dtype = source.config(), source.dtype()
    vqgan, _, has_decoder = source.vqgan()
    require_space(target, source.weight_bytes())
    with atomic_dir(target) as folder:
        vq_tensors = hugging_face_tensors(vqgan)
        write_weights(folder, _chain(tensors or source.tensors(), iter(vq_tensors.items())))
        write_config(folder, config, dtype)
        sizes = vqgan.config
        parsed = read_json(source.tokenizer_file)
        write_processor(folder, parsed, sizes.codes_per_image, sizes.resolution)
        if has_decoder:
            copy_tokenizer(source.tokenizer_folder, folder / "tokenizer")
        copy_licenses(source.folder, folder)


def copy_licenses(source: Path, target: Path) -> None:
    """Carries licences and terms of use along with the weights that they cover."""
    for pattern in ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "ACCEPTABLE_USE*"):
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def _chain(*parts: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for part in parts:
        yield from part


def write_chameleon(
    target: Path,
    source: Checkpoint,
    size: str,
    original: Checkpoint | None = None,
    shards: int | None = None,
    norms: Norms = "equal",
) -> None:
    """Writes a checkpoint in Chameleon's layout, whole or not at all.

    `shards` is the model's own number unless given; `norms` says what becomes of query and key
    norms that differ between the heads of one shard (see `names.to_chameleon`).

    `original` is the checkpoint that the model was made from: its params.json and tokenizer
    folder are kept. Without one both are made from `source`.
    """
    config = source.config()
    if shards is not None and shards < 1:
        raise UserError(f"--shards is {shards}, expected 1 or more")
    shards = shards or int(config.model_parallel_size or 1)
    sizes = ModelDims(
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        feed_forward=config.intermediate_size,
        vocabulary=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        swin_norm=bool(config.swin_norm),
        context=config.max_position_embeddings,
        shards=shards,
    )
    weights = None
    if original is not None:
        if original.fingerprint() != source.fingerprint():
            raise UserError(
                f"{original.folder}: its VQGAN speaks other codes than {source.folder}; name "
                "the checkpoint that the model was trained from"
            )
        weights = ChameleonWeights(original.model_folder)
        if replace(weights.sizes, shards=shards) != sizes:
            raise UserError(
                f"{original.folder}: a model of other sizes ({weights.sizes}) than {source.folder} "
                f"({sizes})"
            )
    require_space(target, source.weight_bytes())
    with atomic_dir(target) as folder:
        write_model(folder / "models" / size, sizes, source.tensors, weights, norms)
        tokenizer = (original or source).tokenizer_folder
        copy_tokenizer(tokenizer, folder / "tokenizer")
        copy_licenses((original or source).folder, folder)


def adapter_base_name(adapter: Path) -> str | None:
    """The base that an adapter's configuration names."""
    fields: dict[str, Any] = read_json(adapter / "adapter_config.json")
    name = fields.get("base_model_name_or_path")
    return str(name) if name else None


def max_abs_diff(one: Checkpoint, other: Checkpoint) -> float:
    """Largest difference between the decoder tensors of two checkpoints of any layouts.

    Raises UserError for tensors that only one of them has, or has in another shape or dtype.
    """
    expected = dict(one.tensors())
    largest = 0.0
    found: set[str] = set()
    for name, tensor in other.tensors():
        found.add(name)
        mine = expected.get(name)
        if mine is None or mine.shape != tensor.shape or mine.dtype != tensor.dtype:
            raise UserError(f"{other.folder}: {name} is not the same tensor as in {one.folder}")
        largest = max(largest, float((mine.float() - tensor.float()).abs().max()))
    check_names(expected, found, str(other.folder))
    return largest


def max_logit_diff(one: Checkpoint, other: Checkpoint) -> float:
    """Largest difference of the float32 logits of two checkpoints on the same random ids."""
    generator = torch.Generator().manual_seed(0)
    size = one.text_tokenizer().vocabulary.size
    ids = torch.randint(size, (2, 32), generator=generator)
    with torch.inference_mode():  # one decoder at a time: they may be large
        logits = [c.decoder(torch.float32)(input_ids=ids).logits for c in (one, other)]
    return float((logits[0] - logits[1]).abs().max())
