"""MedMax's evaluation suite: its tasks, its records and its prompts."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medley.data.document import ContentPart, ImagePart
from medley.data.vocabulary import IMAGE
from medley.datasets.base import CAPTION_PROMPT, RecordError, resolve_image_path
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.evaluation.records import is_list_of
from medley.evaluation.science_qa import LETTERS
from medley.evaluation.yes_no import gold_yes_no
from medley.utils.files import check_unicode

Processor = Literal["sft", "chameleon", "default"]
CAPTIONING, GENERATION, MIXED, CHAT = (
    "image_captioning", "image_generation", "mm_out", "visual_chat",
)  # fmt: skip
SOURCES = ("pmc_oa", "quilt", "report")  # of captions and of images
# The VQA tasks in MedMax's order.
QUESTIONS = (
    ("vqa_rad", "closed"), ("slake", "closed"), ("pathvqa", "closed"), ("quilt_vqa", "closed"),
    ("vqa_rad", "open"), ("slake", "open"), ("pathvqa", "open"), ("quilt_vqa", "open"),
    ("pmc_vqa", "mcq"), ("omnimed_vqa", "mcq"), ("path_mmu", "mcq"), ("probmed", "closed"),
)  # fmt: skip
VQA_GROUPS = ("closed", "open", "mcq")
GROUPS = (*VQA_GROUPS, CAPTIONING, GENERATION, MIXED, CHAT)
# MedMax's prompt for every detailed description.
DESCRIBE = "Analyze the image in a comprehensive and detailed manner."
# MedMax's instruction to Chameleon before a question, by question type.
_INSTRUCTIONS = {
    "closed": "Answer the question based on this image and respond 'yes' or 'no'.\n",
    "mcq": "Answer the question based on this image and respond 'A', 'B', 'C', or 'D'.\n",
    "open": "Answer the question based on this image.\n",
}
_MIXED_INSTRUCTION = "Answer the question with one picture."  # MedMax's text  # alias
_DETAILED = "detailed_description"
_MAX_LITERAL = 1 << 20  # characters


@dataclass(frozen=True)
class MedmaxRecord:
    """A record of MedMax's evaluation data.

    Attributes:
        number: position in the file, from 0
        task: its task_name
        kind: its question_type
        prompt: its prompt
        answer: its gold answer
        image: path of the image in the file, of the question or of the gold answer
        image_folder: folder that the path is relative to
    """

    number: int
    task: str
    kind: str
    prompt: str
    answer: Any
    image: str | None
    image_folder: Path | None = None

    @property
    def group(self) -> str:
        """The task of the command line: one of GROUPS."""
        return self.kind if self.task not in GROUPS else self.task

    @property
    def name(self) -> str:
        """The key in MedMax's result file."""
        return f"{self.task}_{self.kind}" if self.group == self.kind else self.task

    @property
    def image_path(self) -> str | None:
        """The resolved path. Raises RecordError for a path outside of the folder."""
        return None if self.image is None else resolve_image_path(self.image, self.image_folder)

    @property
    def prompt_image(self) -> str | None:
        """The image that belongs to the prompt, not to the gold answer."""
        return None if self.task in (GENERATION, MIXED) else self.image_path


def read_records(
    path: Path, groups: Collection[str], limit: int | None, image_folder: Path
) -> list[MedmaxRecord]:
    """The records of some groups, at most `limit` of each.

    Raises UserError for an invalid record, also of another group, and if no record remains.
    """
    records: list[MedmaxRecord] = []
    counts = dict.fromkeys(GROUPS, 0)
    number = -1
    for number, (where, _, raw) in enumerate(records_of(path)):
        try:
            if isinstance(raw, RecordError):
                raise raw
            record = parse_record(number, raw, image_folder)
            check_unicode(where, raw)
            check_gold(record)
            _ = record.image_path  # raises for a path outside of the folder
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if record.group in groups and counts[record.group] != limit:
            counts[record.group] += 1
            records.append(record)
    if not records:
        raise UserError(
            f"{path}: None of the {number + 1} records belongs to the tasks "
            f"{', '.join(sorted(groups))}."
        )
    return records


def parse_record(number: int, raw: Any, image_folder: Path | None = None) -> MedmaxRecord:
    """Raises UserError for a record that belongs to none of MedMax's tasks."""
    if not isinstance(raw, dict):
        raise UserError("Expected an object.")
    for key in ("task_name", "question_type"):
        if not isinstance(raw.get(key), str):
            raise UserError(f"{key} must be a string (got {raw.get(key)!r}).")
    task, kind = raw["task_name"], raw["question_type"]
    if task not in GROUPS and kind not in VQA_GROUPS:
        raise UserError(
            f"question_type of {task!r} is invalid (got {kind!r}, expected closed, open or mcq; or "
            f"task_name {', '.join(GROUPS[3:])})."
        )
    if task in (CAPTIONING, GENERATION) and kind not in SOURCES:
        raise UserError(
            f"question_type of {task} is invalid (got {kind!r}, expected {', '.join(SOURCES)})."
        )
    image = raw.get("image_path")
    if not isinstance(image, str | None):
        raise UserError(f"image_path must be a path (got {image!r}).")
    if not image and task not in (GENERATION, MIXED):
        raise UserError(f"A record of {task} needs an image (image_path).")
    prompt = raw.get("prompt")
    if not isinstance(prompt, str) and task != CAPTIONING:
        raise UserError(f"prompt must be a string (got {prompt!r}).")
    return MedmaxRecord(
        number, task, kind, str(prompt or ""), raw.get("answer"), image or None, image_folder
    )


def check_gold(record: MedmaxRecord) -> None:
    """Raises UserError for a gold answer that cannot be compared with."""
    answer = record.answer
    if record.task == CHAT:
        chat_reference(answer)
    if record.group not in VQA_GROUPS:
        return
    if not isinstance(answer, str):
        raise UserError(f"answer must be a string (got {answer!r}).")
    if record.kind == "closed" and gold_yes_no(answer) is None:
        raise UserError(f"answer must be yes or no (got {answer!r}).")
    if record.kind == "mcq" and answer.strip().upper() not in tuple(LETTERS):
        raise UserError(f"answer must be a letter (got {answer!r}).")


def prompt_for(
    processor: Processor, record: MedmaxRecord, image_part: ImagePart | None
) -> list[ContentPart]:
    """The prompt of a record in MedMax's layout.

    The image of a gold answer is not part of the prompt. Only `sft` prompts end with an
    end-of-turn token, which is not part of the result.
    """
    if record.task == CHAT:
        return _chat_prompt(record, image_part)
    in_prompt = image_part is not None and record.task not in (GENERATION, MIXED)
    image: list[ContentPart] = [image_part] if image_part and in_prompt else []
    if record.task == CAPTIONING:
        return [*image, CAPTION_PROMPT if processor != "default" else record.prompt]
    if processor != "chameleon" or record.task == GENERATION:
        return [*image, record.prompt]
    if record.task == MIXED:
        return [f"{record.prompt} {_MIXED_INSTRUCTION}"]
    instruction = _INSTRUCTIONS.get(record.kind, "")
    return [*image, f"{instruction}Question: {record.prompt.strip()}\nAnswer:"]


def _chat_prompt(record: MedmaxRecord, image_part: ImagePart | None) -> list[ContentPart]:
    """The image at the position of its placeholder, or first."""
    prompt = record.prompt.strip()
    image_last = prompt.endswith(IMAGE) and not prompt.startswith(IMAGE)
    text = DESCRIBE if record.kind == _DETAILED else chat_question(record)
    image: list[ContentPart] = [image_part] if image_part else []
    return [text, *image] if image_last else [*image, text]


def chat_question(record: MedmaxRecord) -> str:
    """The prompt of visual_chat without `<image>`."""
    return record.prompt.replace(IMAGE, "").strip()


def chat_reference(answer: Any) -> dict[str, Any]:
    """The figure and the reference answer of a visual_chat record.

    They are an object, its JSON, or a Python literal as in MedMax's data, which is parsed and
    never executed. Raises UserError for any other value.
    """
    value = answer
    if isinstance(answer, str) and len(answer) <= _MAX_LITERAL:
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(answer)
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                value = None
    keys = ("gpt4_answer", "fig_label", "fig_caption")
    if not isinstance(value, dict) or not all(isinstance(value.get(k), str) for k in keys):
        raise UserError(f"The answer of visual_chat lacks {', '.join(keys)} (got {answer!r:.80}).")
    mentions, domain = value.get("in_text_mention"), value.get("domain")
    if mentions is not None and not is_list_of(mentions, str | dict):
        raise UserError(f"in_text_mention must be a list of strings (got {mentions!r:.80}).")
    if not isinstance(domain, dict | None):
        raise UserError(f"domain must be an object (got {domain!r:.80}).")
    return value


def gold_text(record: MedmaxRecord) -> str:
    """The text of the gold answer."""
    if record.task == CHAT:
        return str(chat_reference(record.answer)["gpt4_answer"])
    return str(record.answer or "")
