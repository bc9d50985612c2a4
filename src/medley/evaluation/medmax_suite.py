"""MedMax's evaluation: its tasks, how it asks, and how it scores."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from typing import Any, Literal

from medley.data.document import ContentPart, ImagePart
from medley.data.vocabulary import IMAGE
from medley.datasets.base import CAPTION_PROMPT
from medley.errors import UserError
from medley.evaluation.judge_prompts import is_list_of
from medley.evaluation.matching import is_yes_or_no
from medley.evaluation.science_qa import LETTERS

Processor = Literal["sft", "chameleon", "default"]
CAPTIONING, GENERATION, MIXED, CHAT = (
    "image_captioning", "image_generation", "mm_out", "visual_chat",
)  # fmt: skip
SOURCES = ("pmc_oa", "quilt", "report")  # of captions and of pictures
# Visual questions in MedMax's order.
QUESTIONS = (
    ("vqa_rad", "closed"), ("slake", "closed"), ("pathvqa", "closed"), ("quilt_vqa", "closed"),
    ("vqa_rad", "open"), ("slake", "open"), ("pathvqa", "open"), ("quilt_vqa", "open"),
    ("pmc_vqa", "mcq"), ("omnimed_vqa", "mcq"), ("path_mmu", "mcq"), ("probmed", "closed"),
)  # fmt: skip
TASKS = ("closed", "open", "mcq", CAPTIONING, GENERATION, MIXED, CHAT)
DESCRIBE = "Analyze the image in a comprehensive and detailed manner."  # MedMax's, for every one
# Chameleon's words before a question, by its kind, as MedMax has them.
_LEADS = {
    "closed": "Answer the question based on this image and respond 'yes' or 'no'.\n",
    "mcq": "Answer the question based on this image and respond 'A', 'B', 'C', or 'D'.\n",
    "open": "Answer the question based on this image.\n",
}
_DETAILED = "detailed_description"
_LONGEST_LITERAL = 1 << 20  # characters


@dataclass(frozen=True)
class Row:
    """A line of MedMax's evaluation data; `number` is its place in the file."""

    number: int
    task: str
    kind: str
    prompt: str
    answer: Any
    image: str | None

    @property
    def group(self) -> str:
        """What it is counted under: one of TASKS."""
        return self.kind if self.task not in TASKS else self.task

    @property
    def name(self) -> str:
        """What MedMax's result file calls it."""
        return f"{self.task}_{self.kind}" if self.group == self.kind else self.task


def row_of(number: int, record: Any) -> Row:
    """Raises UserError for a record that is none of MedMax's tasks."""
    if not isinstance(record, dict):
        raise UserError("expected an object")
    for name in ("task_name", "question_type"):
        if not isinstance(record.get(name), str):
            raise UserError(f"{name} is {record.get(name)!r}, expected text")
    task, kind = record["task_name"], record["question_type"]
    if task not in TASKS and kind not in TASKS[:3]:
        raise UserError(
            f"question_type is {kind!r} of {task!r}: expected closed, open or mcq, or a task of "
            f"{', '.join(TASKS[3:])}"
        )
    if task in (CAPTIONING, GENERATION) and kind not in SOURCES:
        raise UserError(f"question_type is {kind!r} of {task}, expected {', '.join(SOURCES)}")
    image = record.get("image_path")
    if not isinstance(image, str | None):
        raise UserError(f"image_path is {image!r}, expected a path")
    if not image and task not in (GENERATION, MIXED):
        raise UserError(f"{task} without a picture (image_path)")
    prompt = record.get("prompt")
    if not isinstance(prompt, str) and task != CAPTIONING:
        raise UserError(f"prompt is {prompt!r}, expected text")
    return Row(number, task, kind, str(prompt or ""), record.get("answer"), image or None)


def prompt_for(processor: Processor, row: Row, picture: ImagePart | None) -> list[ContentPart]:
    """What a row asks, as MedMax lays it out. A turn ends behind it only for `sft`; a picture that
    a row names as its right answer is not shown."""
    if row.task == CHAT:
        return _chat_prompt(row, picture)
    shown: list[ContentPart] = [picture] if picture and row.task not in (GENERATION, MIXED) else []
    if row.task == CAPTIONING:
        return [*shown, CAPTION_PROMPT if processor != "default" else row.prompt]
    if processor != "chameleon" or row.task == GENERATION:
        return [*shown, row.prompt]
    if row.task == MIXED:
        return [f"{row.prompt} Answer the question with one picture."]
    return [*shown, f"{_LEADS.get(row.kind, '')}Question: {row.prompt.strip()}\nAnswer:"]


def _chat_prompt(row: Row, picture: ImagePart | None) -> list[ContentPart]:
    """The picture where its mark stands, or first."""
    words = row.prompt.replace(IMAGE, "").strip()
    behind = row.prompt.strip().endswith(IMAGE) and not row.prompt.strip().startswith(IMAGE)
    text = DESCRIBE if row.kind == _DETAILED else words
    shown: list[ContentPart] = [picture] if picture else []
    return [text, *shown] if behind else [*shown, text]


def chat_reference(answer: Any) -> dict[str, Any]:
    """What a line of visual_chat knows of its picture and the right answer: an object, its JSON,
    or, as MedMax has it, a Python literal (read as a literal, never run).

    Raises UserError for anything else.
    """
    found = answer
    if isinstance(answer, str) and len(answer) <= _LONGEST_LITERAL:
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            try:
                found = ast.literal_eval(answer)
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                found = None
    names = ("gpt4_answer", "fig_label", "fig_caption")
    if not isinstance(found, dict) or not all(isinstance(found.get(n), str) for n in names):
        raise UserError(f"the answer of visual_chat has no {', '.join(names)}: {answer!r:.80}")
    mentions, domain = found.get("in_text_mention"), found.get("domain")
    if mentions is not None and not is_list_of(mentions, str | dict):
        raise UserError(f"in_text_mention is {mentions!r:.80}, expected a list of texts")
    if not isinstance(domain, dict | None):
        raise UserError(f"domain is {domain!r:.80}, expected an object")
    return found


def gold_fault(row: Row) -> str | None:
    """Why a right answer cannot be compared with; None where it can."""
    if not isinstance(row.answer, str):
        return f"its answer is {row.answer!r}, expected text"
    if row.kind == "closed" and is_yes_or_no(row.answer) is None:
        return f"its answer is {row.answer!r}, expected yes or no"
    if row.kind == "mcq" and row.answer.strip().upper() not in tuple(LETTERS):
        return f"its answer is {row.answer!r}, expected a letter"
    return None


def gold_text(row: Row) -> str:
    """The right answer in words."""
    return chat_reference(row.answer)["gpt4_answer"] if row.task == CHAT else str(row.answer or "")
