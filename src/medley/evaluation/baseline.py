"""Any image-text model of transformers answers questions, for comparison."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medley.data.document import Document, ImagePart
from medley.errors import UserError
from medley.evaluation.answer_files import format_answer, question_keys, read_answers, sort_answers
from medley.evaluation.questions import Question
from medley.images.preprocess import ImageError, open_image, to_rgb
from medley.inference.batch import check_same_options
from medley.inference.loading import resolve_device
from medley.utils.jsonl import append_jsonl
from medley.utils.manifest import read_manifest, write_manifest

MAX_NEW_TOKENS = 64


class Baseline:
    """A folder of transformers' AutoModelForImageTextToText with its processor."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        """Raises UserError for a folder that holds no such model. Nothing is downloaded."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not folder.is_dir():
            raise UserError(f"--baseline {folder}: no such folder; it is never downloaded")
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.model = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, dtype="auto"
            )
        except Exception as error:  # whatever a folder of something else leads to
            raise UserError(
                f"--baseline {folder}: no image-text model of transformers ({error})"
            ) from error
        self.device = resolve_device(device)
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def answer(self, prompt: Document) -> str:
        """The greedy answer to one question. Raises UserError for a picture that cannot be read."""
        parts = prompt.turns[0].parts
        images = [to_rgb(_image(part)) for part in parts if isinstance(part, ImagePart)]
        inputs = self.processor(
            text=self._text(parts), images=images or None, return_tensors="pt"
        ).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        found = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        # An encoder and decoder gives the new tokens alone.
        start = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        said = found[0, start:]
        return str(self.processor.decode(said, skip_special_tokens=True)).strip()

    def _text(self, parts: Sequence[Any]) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part}
                for part in parts
            ]
            talk = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(talk, add_generation_prompt=True))
        mark = str(getattr(self.processor, "image_token", "<image>"))
        return "\n".join(mark if isinstance(part, ImagePart) else part for part in parts)


def _image(picture: ImagePart) -> Any:
    if picture.image is not None:
        return picture.image
    if picture.path is None:
        raise UserError("a picture of image codes alone: another model cannot see it")
    return open_image(picture.path)


def write_answers(folder: Path, questions: Sequence[Question], output: Path) -> list[str]:
    """Writes LLaVA's answer file; what stands in it already is not asked again.

    Gives the questions that could not be answered, with why. Raises UserError where the file holds
    another model's answers, or those to other questions.
    """
    identity = run_key(folder, questions)
    if output.exists():
        check_same_options(read_manifest(output).get("options", {}), identity, output)
    write_manifest(output, identity, [], None)
    keys = list(question_keys((q.identifier, q.asked) for q in questions))
    there = read_answers(output)
    left = [(key, q) for key, q in zip(keys, questions, strict=True) if key not in there]
    failed = []
    if left:
        model = Baseline(folder)
        for _, question in tqdm(left, desc=f"asking {folder.name}", unit=" answers"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of a model that is not ours
                    text = model.answer(question.prompt)
            except (UserError, ImageError, RuntimeError, ValueError) as error:
                failed.append(f"question {question.identifier}: {error}")
                continue
            append_jsonl(output, format_answer(question, text, folder.name))
    sort_answers(output, keys)
    return failed


def run_key(folder: Path, questions: Sequence[Question]) -> dict[str, str]:
    """What the answers depend on."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.identifier, question.asked, question.image]).encode())
    return {"baseline": str(folder.resolve()), "questions": digest.hexdigest()}
