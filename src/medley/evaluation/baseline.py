"""A baseline: any image-text model of transformers answers the same questions."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from medley.data.document import ContentPart, Document, ImagePart
from medley.errors import UserError
from medley.evaluation.answer_files import format_answer, question_keys, read_answers, sort_answers
from medley.evaluation.questions import Question
from medley.images.preprocess import ImageError, open_image, to_rgb
from medley.inference.devices import resolve_device
from medley.utils.jsonl import append_jsonl
from medley.utils.manifest import read_manifest, write_manifest
from medley.utils.run_identity import check_same_run

MAX_NEW_TOKENS = 64


class HFBaseline:
    """A local folder with a transformers AutoModelForImageTextToText and its processor."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        """Raises UserError for a folder without such a model. Nothing is downloaded."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not folder.is_dir():
            raise UserError(f"--baseline {folder}: Folder not found. Models are not downloaded.")
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.model = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, dtype="auto"
            )
        except Exception as error:  # The error depends on what the folder contains instead.
            raise UserError(
                f"--baseline {folder}: Not an image-text model of transformers ({error})."
            ) from error
        self.device = resolve_device(device)
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def answer(self, prompt: Document) -> str:
        """The greedy answer to one question. Raises UserError for an image that cannot be read."""
        parts = prompt.turns[0].parts
        images = [to_rgb(_load_image(part)) for part in parts if isinstance(part, ImagePart)]
        inputs = self.processor(
            text=self._format_prompt(parts), images=images or None, return_tensors="pt"
        ).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        # An encoder-decoder model returns only the new tokens.
        start = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return str(self.processor.decode(output[0, start:], skip_special_tokens=True)).strip()

    def _format_prompt(self, parts: Sequence[ContentPart]) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part}
                for part in parts
            ]
            messages = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))
        placeholder = str(getattr(self.processor, "image_token", "<image>"))
        return "\n".join(placeholder if isinstance(part, ImagePart) else part for part in parts)


def _load_image(part: ImagePart) -> Image.Image:
    if part.image is not None:
        return part.image
    if part.path is None:
        raise UserError("The image has only image codes, which another model cannot read.")
    return open_image(part.path)


def write_answers(folder: Path, questions: Sequence[Question], output: Path) -> list[str]:
    """Writes LLaVA's answer file and resumes an existing one.

    Returns the questions that failed, each with its reason. Raises UserError if the file contains
    answers of another model or to other questions.
    """
    identity = run_key(folder, questions)
    if output.exists():
        check_same_run(read_manifest(output).get("options", {}), identity, output)
    write_manifest(output, identity, [], None)
    keys = list(question_keys((q.identifier, q.raw_text) for q in questions))
    existing = read_answers(output)
    remaining = [q for key, q in zip(keys, questions, strict=True) if key not in existing]
    failures = []
    if remaining:
        model = HFBaseline(folder)
        for question in tqdm(remaining, desc=f"answering with {folder.name}", unit=" answers"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # They concern the other model.
                    text = model.answer(question.prompt)
            except (UserError, ImageError, RuntimeError, ValueError) as error:
                failures.append(f"question {question.identifier}: {error}")
                continue
            append_jsonl(output, format_answer(question, text, folder.name))
    sort_answers(output, keys)
    return failures


def run_key(folder: Path, questions: Sequence[Question]) -> dict[str, str]:
    """The identity of a baseline's answers: the model's folder and a hash of the questions."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.identifier, question.raw_text, question.image]).encode())
    return {"baseline": str(folder.resolve()), "questions": digest.hexdigest()}
