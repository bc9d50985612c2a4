"""Likeness without a judge: of sentences, and of pictures with words, by models on this disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from medley.errors import UserError
from medley.images.preprocess import to_rgb
from medley.inference.loading import resolve_device
from medley.utils.files import read_json

_BATCH = 64


class SentenceSimilarity:
    """A folder of sentence-transformers (MiniLM, say): mean of the last layer, or its first token
    where the folder's pooling says so. Its figures compare answers with each other, not with a
    judge's scores."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        from transformers import AutoModel, AutoTokenizer

        self.name = folder.resolve().name
        with _opening(folder, "a model of sentences"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True)
        pooling = folder / "1_Pooling" / "config.json"
        said = read_json(pooling) if pooling.is_file() else {}
        self.first_token = bool(said.get("pooling_mode_cls_token", False))
        self.device = resolve_device(device)
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32, of length 1."""
        rows = []
        longest = min(int(self.model.config.max_position_embeddings), 512)
        for start in range(0, len(texts), _BATCH):
            inputs = self.tokenizer(
                list(texts[start : start + _BATCH]), padding=True, truncation=True,
                max_length=longest, return_tensors="pt",
            ).to(self.device)  # fmt: skip
            states = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            rows.append(normalize(states[:, 0] if self.first_token else mean, dim=-1).cpu())
        return torch.cat(rows)

    def between(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Cosines of pairs of texts."""
        return _cosines(self.embed(first), self.embed(second))


class ImageSimilarity:
    """A folder of a model with a picture's and a text's tower (CLIP, SigLIP, or BiomedCLIP in
    transformers' layout)."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        from transformers import AutoModel, AutoProcessor

        self.name = folder.resolve().name
        if (folder / "open_clip_config.json").is_file() and not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: in open_clip's layout; take the same model in transformers' layout "
                "(config.json, model.safetensors and preprocessor_config.json)"
            )
        with _opening(folder, "a model of pictures and words"):
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True)
        if not hasattr(self.model, "get_image_features"):
            raise UserError(f"{folder}: a {type(self.model).__name__}, which embeds no pictures")
        self.device = resolve_device(device)
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D) float32, of length 1."""
        rows = []
        for start in range(0, len(images), _BATCH):
            batch = [to_rgb(image) for image in images[start : start + _BATCH]]
            inputs = self.processor(images=batch, return_tensors="pt").to(self.device)
            rows.append(_features(self.model.get_image_features(**inputs)))
        return torch.cat(rows)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32, of length 1; a text that is longer than the model takes is cut."""
        rows = []
        own = getattr(self.model.config, "text_config", self.model.config)
        longest = int(own.max_position_embeddings)  # SigLIP wants every text as long as that
        for start in range(0, len(texts), _BATCH):
            inputs = self.processor(
                text=list(texts[start : start + _BATCH]), padding="max_length", truncation=True,
                max_length=longest, return_tensors="pt",
            ).to(self.device)  # fmt: skip
            rows.append(_features(self.model.get_text_features(**inputs)))
        return torch.cat(rows)

    def with_texts(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        return _cosines(self.embed_images(images), self.embed_texts(texts))

    def between(self, first: Sequence[Image.Image], second: Sequence[Image.Image]) -> list[float]:
        return _cosines(self.embed_images(first), self.embed_images(second))


def _features(found: Any) -> Tensor:
    features = found if isinstance(found, Tensor) else found.pooler_output
    return normalize(features.float(), dim=-1).cpu()


def require_folder(folder: Path | None) -> None:
    """Raises UserError where a folder was named that is not there."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: no such folder of a model; it is never downloaded")


def _cosines(first: Tensor, second: Tensor) -> list[float]:
    return [float(value) for value in (first * second).sum(-1)]


@contextmanager
def _opening(folder: Path, what: str) -> Iterator[None]:
    """Turns what a folder lacks into one line. Nothing is downloaded."""
    require_folder(folder)
    try:
        yield
    except Exception as error:  # whatever a folder of something else leads to
        raise UserError(f"{folder}: not {what} of transformers ({error})") from error
