"""Random checkpoints, adapters and documents on the disk, for benchmarks/real_size.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from PIL import Image
from random_models import (
    SIZES,
    STD,
    ModelSize,
    make_config,
    make_vqgan,
    random_squares,
    tiny_vocabulary,
)
from safetensors.torch import save_file
from torch import Tensor

from medley.checkpoints.chameleon import write_model
from medley.checkpoints.checkpoint import open_checkpoint
from medley.data.token_dataset import write_token_jsonl
from medley.data.vocabulary import TextTokenizer
from medley.images.preprocess import Preprocessing
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.modeling.dims import ModelDims
from medley.phantoms import Phantom, caption
from medley.trainer.parameters import PROJECTIONS
from medley.utils.jsonl import write_jsonl
from medley.utils.manifest import write_manifest
from medley.vqgan.files import write_vqgan

POOL = 1 << 24  # random numbers that large weights repeat, since drawing billions takes minutes
TEXT_TOKENS = 15  # of a training document, beside its image


def random_tensors(dims: ModelDims, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A decoder's tensors under Hugging Face's names, one at a time, from one pool of numbers."""
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * STD).to(dtype)
    for number, (name, shape) in enumerate(decoder_shapes(dims).items()):
        if "norm" in name:
            yield name, torch.full(shape, float(name.endswith("weight")), dtype=dtype)
            continue
        count = torch.Size(shape).numel()
        start = (7919 * number) % POOL
        rolled = torch.cat([pool[start:], pool[:start]])
        yield name, rolled.repeat(-(-count // POOL))[:count].reshape(shape)


def decoder_shapes(dims: ModelDims) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a decoder's tensors, without those of a VQGAN."""
    small = replace(SIZES["tiny"], decoder=dims)
    with torch.device("meta"):
        state = ChameleonForConditionalGeneration(make_config(small)).state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if ".vqmodel." not in name}


def make_text_tokenizer(size: int) -> dict[str, Any]:
    """The content of a `text_tokenizer.json` with `size` ids: `tiny`'s, and longer merges.

    The new tokens are pairs of its tokens that occur within words, so that texts use some of them.
    """
    parsed = copy.deepcopy(open_checkpoint("tiny").text_tokenizer().parsed)
    vocab, merges = parsed["model"]["vocab"], parsed["model"]["merges"]
    vocabulary = tiny_vocabulary()
    pieces = [name for name, id_ in vocab.items() if id_ in vocabulary.text_tokens]
    inner = [piece for piece in pieces if piece.isalpha() and piece.isascii()]
    pairs = ((left, right) for right in inner for left in pieces if left.strip("Ġ").isalpha())
    for left, right in pairs:
        if len(vocab) >= size:
            return parsed
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    raise ValueError(f"{size} ids are more than pairs of tokens give ({len(vocab)})")


def write_random_checkpoint(folder: Path, size: ModelSize, dtype: torch.dtype) -> None:
    """Writes a random checkpoint in Chameleon's layout. At most one tensor is in memory."""
    dims = size.decoder
    passes = iter((True, False))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        if next(passes):  # the first pass needs shapes only
            shapes = decoder_shapes(dims)
            return ((n, torch.empty(s, dtype=dtype, device="meta")) for n, s in shapes.items())
        return random_tensors(dims, dtype)

    write_vqgan(folder / "tokenizer", make_vqgan(size.vqgan), Preprocessing())
    parsed = make_text_tokenizer(dims.vocabulary_size)
    (folder / "tokenizer" / "text_tokenizer.json").write_text(json.dumps(parsed), "utf-8")
    write_model(folder / "models" / "random", dims, tensors)


def write_random_adapter(folder: Path, dims: ModelDims, base: Path, rank: int = 16) -> None:
    """Writes a LoRA adapter in PEFT's layout: random matrices for all projections."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}
    for name, shape in decoder_shapes(dims).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in PROJECTIONS:
            key = f"base_model.model.{module}"
            for letter, own in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                matrix = torch.randn(own, generator=generator) * STD
                state[f"{key}.lora_{letter}.weight"] = matrix
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM",
        base_model_name_or_path=str(base), inference_mode=True,
    )  # fmt: skip
    config.save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors")


def write_documents(folder: Path, size: ModelSize, count: int) -> None:
    """Writes docs.jsonl: documents of one image, as codes, and 240 words."""
    generator = np.random.default_rng(0)
    texts = " ".join(caption(Phantom.random(generator)) for _ in range(400)).split()

    def row() -> dict[str, Any]:
        start = int(generator.integers(0, len(texts) - 240))
        question = " ".join(texts[start : start + 60])
        answer = " ".join(texts[start + 60 : start + 240])
        codes = generator.integers(0, size.vqgan.n_embed, size.vqgan.codes_per_image)
        text = f"<image>{question}<reserved08706>{answer}"
        return {"text": text, "image_tokens": codes.tolist(), "source": "random", "task": "VQA"}

    write_jsonl(folder / "docs.jsonl", (row() for _ in range(count)))


def write_training_tokens(path: Path, checkpoint: Path) -> int:
    """Writes one document that answers with an image and a few words; returns its length."""
    opened = open_checkpoint(checkpoint)
    text = TextTokenizer.from_file(opened.tokenizer_file)
    vocabulary, codes = text.vocabulary, opened.vqgan()[0].config.codes_per_image
    words = text.encode("What is seen in this image of a head? There is a mass on the left.")
    image = vocabulary.image_token_ids(i % 1000 for i in range(codes))
    ids = [vocabulary.bos, *words[: TEXT_TOKENS - 5], vocabulary.end_turn, *image, vocabulary.eos]
    write_token_jsonl(path, [{"tokens": ids}])
    write_manifest(path, {}, [], opened.fingerprint())
    return len(ids)


def write_images(folder: Path, count: int, side: int) -> None:
    """Writes PNG files that are a little larger than the VQGAN's square, and list.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, square in enumerate(random_squares(count, side + side // 8)):
        paths.append(folder / f"{number}.png")
        Image.fromarray(square.numpy()).save(paths[-1])
    (folder / "list.csv").write_text("img_path\n" + "".join(f"{path}\n" for path in paths))
