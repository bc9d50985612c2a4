"""Similarity without a judge: of sentences, and of images and texts, by local models."""

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
from medley.inference.devices import resolve_device
from medley.utils.files import read_json

_BATCH = 64
_MAX_SENTENCE_TOKENS = 512


class SentenceSimilarity:
    """A sentence-transformers folder, such as MiniLM.

    The embedding is the mean of the last layer, or its first token if the folder's pooling
    configuration requires it. Its similarities compare answers with each other; they are not
    comparable with a judge's scores.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        from transformers import AutoModel, AutoTokenizer

        self.name = folder.resolve().name
        with _loading_errors(folder, "a sentence-embedding model"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True)
        pooling_file = folder / "1_Pooling" / "config.json"
        pooling = read_json(pooling_file) if pooling_file.is_file() else {}
        self.first_token = bool(pooling.get("pooling_mode_cls_token", False))
        self.device = resolve_device(device)
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, D) float32, normalized to length 1."""
        embeddings = []
        max_length = min(int(self.model.config.max_position_embeddings), _MAX_SENTENCE_TOKENS)
        for start in range(0, len(texts), _BATCH):
            inputs = self.tokenizer(
                list(texts[start : start + _BATCH]), padding=True, truncation=True,
                max_length=max_length, return_tensors="pt",
            ).to(self.device)  # fmt: skip
            states = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            pooled = states[:, 0] if self.first_token else mean
            embeddings.append(normalize(pooled, dim=-1).cpu())
        return torch.cat(embeddings)

    def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Cosine similarities of pairs of texts."""
        return _cosines(self.embed(first), self.embed(second))


class ImageSimilarity:
    """A folder of a model with an image tower and a text tower, in transformers' layout.

    Examples are CLIP, SigLIP and BiomedCLIP.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        from transformers import AutoModel, AutoProcessor

        self.name = folder.resolve().name
        if (folder / "open_clip_config.json").is_file() and not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: The model is in open_clip's layout. Use the same model in "
                "transformers' layout (config.json, model.safetensors, preprocessor_config.json)."
            )
        with _loading_errors(folder, "an image-text similarity model"):
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True)
        if not hasattr(self.model, "get_image_features"):
            raise UserError(f"{folder}: {type(self.model).__name__} does not embed images.")
        self.device = resolve_device(device)
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """N images -> (N, D) float32, normalized to length 1."""
        embeddings = []
        for start in range(0, len(images), _BATCH):
            batch = [to_rgb(image) for image in images[start : start + _BATCH]]
            inputs = self.processor(images=batch, return_tensors="pt").to(self.device)
            embeddings.append(_normalized(self.model.get_image_features(**inputs)))
        return torch.cat(embeddings)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, D) float32, normalized to length 1; long texts are truncated."""
        embeddings = []
        config = getattr(self.model.config, "text_config", self.model.config)
        max_length = int(config.max_position_embeddings)  # SigLIP needs padding to this length.
        for start in range(0, len(texts), _BATCH):
            inputs = self.processor(
                text=list(texts[start : start + _BATCH]), padding="max_length", truncation=True,
                max_length=max_length, return_tensors="pt",
            ).to(self.device)  # fmt: skip
            embeddings.append(_normalized(self.model.get_text_features(**inputs)))
        return torch.cat(embeddings)

    def compare_with_texts(
        self, images: Sequence[Image.Image], texts: Sequence[str]
    ) -> list[float]:
        """Cosine similarities of images with their texts."""
        return _cosines(self.embed_images(images), self.embed_texts(texts))

    def compare(self, first: Sequence[Image.Image], second: Sequence[Image.Image]) -> list[float]:
        """Cosine similarities of pairs of images."""
        return _cosines(self.embed_images(first), self.embed_images(second))


def _normalized(output: Any) -> Tensor:
    """The features of a model's output, which is a tensor or has `pooler_output`."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return normalize(features.float(), dim=-1).cpu()


def require_model_folder(folder: Path | None) -> None:
    """Raises UserError if a folder is given and does not exist."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: Model folder not found. Models are not downloaded.")


def _cosines(first: Tensor, second: Tensor) -> list[float]:
    return [float(value) for value in (first * second).sum(-1)]


@contextmanager
def _loading_errors(folder: Path, kind: str) -> Iterator[None]:
    """Turns any error of loading a folder into a UserError."""
    require_model_folder(folder)
    try:
        yield
    except Exception as error:  # The error depends on what the folder contains instead.
        raise UserError(f"{folder}: Not {kind} of transformers ({error}).") from error
