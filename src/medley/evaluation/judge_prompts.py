"""Pairs of answers and the judge's prompts about them, in the formats of LLaVA and LLaVA-Med."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from medley.data.vocabulary import IMAGE
from medley.datasets.instructions.captions import figure_context
from medley.errors import UserError
from medley.evaluation.judge import PROMPTS
from medley.evaluation.records import LocatedRecord, is_list_of
from medley.utils.chat_client import Message

Layout = Literal["llava", "llava_visual", "llava_bench", "llava_med"]
_BENCH = "llava_bench_"  # prefix of the category names in LLaVA's rule.json


@dataclass(frozen=True)
class JudgeItem:
    """A question, the reference answer and a model's answer.

    Attributes:
        identifier: the question's id
        category: key of the judge's prompt
        question: text of the question
        reference: the first answer
        answer: the second answer, which is the model's
        context: a text about the image
        image: path of the image
        record: the question's record
        answer_ids: ids of both answers
    """

    identifier: Any
    category: str
    question: str
    reference: str
    answer: str
    context: str | None = None
    image: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    answer_ids: tuple[Any, Any] = (None, None)


@dataclass(frozen=True)
class JudgePrompts:
    """The judge's system prompt and, by category, the answers' role name and the instruction."""

    system: str
    by_category: Mapping[str, tuple[str, str]]

    @classmethod
    def read(cls, path: Path | None) -> JudgePrompts:
        """Reads a file with `system` and, by category, `role` and `prompt`.

        Without a path, or without `system` (as in LLaVA's rule.json), our own prompts are used.
        Raises UserError for any other file.
        """
        default = _read_prompts(PROMPTS / "review.yaml")
        if path is None:
            return default
        prompts = _read_prompts(path)
        return cls(prompts.system or default.system, prompts.by_category)

    def for_category(self, category: str, use_default: bool) -> tuple[str, str]:
        """Role and prompt. Raises UserError for a category without a prompt."""
        prompt = self.by_category.get(category)
        if prompt is None and use_default:
            prompt = self.by_category.get("default")
        if prompt is None:
            raise UserError(
                f"--judge_prompts: The prompts lack the category {category!r} (got "
                f"{', '.join(self.by_category)})."
            )
        return prompt

    def messages(self, item: JudgeItem, use_default: bool = True) -> list[Message]:
        """The messages of a request, in LLaVA's layout."""
        role, prompt = self.for_category(item.category, use_default)
        blocks = [] if item.context is None else [f"[Context]\n{item.context}\n\n"]
        blocks += [
            f"[Question]\n{item.question}\n\n",
            f"[{role} 1]\n{item.reference}\n\n[End of {role} 1]\n\n",
            f"[{role} 2]\n{item.answer}\n\n[End of {role} 2]\n\n",
            f"[System]\n{prompt}\n\n",
        ]
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": "".join(blocks)},
        ]


def _read_prompts(path: Path) -> JudgePrompts:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))  # JSON is valid YAML.
        system = str(content.pop("system", ""))
        return JudgePrompts(
            system, {name: (str(p["role"]), str(p["prompt"])) for name, p in content.items()}
        )
    except FileNotFoundError as error:
        raise UserError(f"{path}: File not found.") from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: Expected categories, each with role and prompt ({error})."
        ) from error


def build_items(
    layout: Layout,
    questions: Sequence[LocatedRecord],
    answers: Sequence[tuple[Path, Sequence[LocatedRecord]]],
    contexts: Sequence[LocatedRecord] | None,
    as_published: bool,
) -> list[JudgeItem]:
    """Questions joined with their answers by id, in the order of the questions.

    LLaVA-Med's questions contain the reference answer (`gpt4_answer`); LLaVA's layouts take the
    answers of the reference and of the model. `as_published` keeps `<image>` in LLaVA-Med's
    questions and formats the sentences about a figure as a Python list. Raises UserError for a
    missing or duplicate record.
    """
    expected_files = 1 if layout == "llava_med" else 2
    if len(answers) != expected_files:
        raise UserError(
            f"--answers: Wrong number of files (got {len(answers)}, {layout} expects "
            f"{expected_files})."
        )
    if contexts is None and layout in ("llava_visual", "llava_bench"):
        raise UserError(f"--layout {layout} needs --context, a file of texts about the images.")
    answers_by_id = [_by_id(rows) for _, rows in answers]
    context_of = {
        str(row.get("image")): _image_context(layout, where, row) for where, row in contexts or []
    }
    items: list[JudgeItem] = []
    seen: set[str] = set()
    for where, row in questions:
        identifier = _get_value(where, row, "question_id")
        if str(identifier) in seen:
            raise UserError(f"{where}: Duplicate question id {identifier}.")
        seen.add(str(identifier))
        pair = []
        for (path, _), by_id in zip(answers, answers_by_id, strict=True):
            if str(identifier) not in by_id:
                raise UserError(f"{path}: Question {identifier} ({where}) has no answer.")
            pair.append(by_id[str(identifier)])
        if layout == "llava_med":
            items.append(_llava_med_item(where, row, pair[0], as_published))
            continue
        image = row.get("image")
        context = None
        if layout != "llava":
            if str(image) not in context_of:
                raise UserError(f"{where}: --context has no record of the image {image!r}.")
            context = context_of[str(image)]
        category = _get_text(where, row, "category")
        items.append(JudgeItem(
            identifier, _BENCH + category if layout == "llava_bench" else category,
            _get_text(where, row, "text"), str(pair[0]["text"]), str(pair[1]["text"]), context,
            image, row, (_answer_id(pair[0]), _answer_id(pair[1])),
        ))  # fmt: skip
    if not items:
        raise UserError("--questions: The file contains no questions.")
    for (path, _), by_id in zip(answers, answers_by_id, strict=True):
        if unknown := sorted(by_id.keys() - seen):
            raise UserError(
                f"{path}: {len(unknown)} answers belong to no question; the first is to "
                f"{unknown[0]}."
            )
    return items


def _by_id(rows: Iterable[LocatedRecord]) -> dict[str, dict[str, Any]]:
    answers: dict[str, dict[str, Any]] = {}
    for where, row in rows:
        identifier = str(_get_value(where, row, "question_id"))
        _get_text(where, row, "text")
        if answers.setdefault(identifier, row) is not row:
            raise UserError(f"{where}: Duplicate answer to question {identifier}.")
    return answers


def _answer_id(row: dict[str, Any]) -> Any:
    return row.get("answer_id", row["question_id"])


def _llava_med_item(
    where: str, row: dict[str, Any], answer: dict[str, Any], as_published: bool
) -> JudgeItem:
    question = _get_text(where, row, "text")
    figure = {"fig_label": _get_text(where, row, "fig_label"),
              "fig_caption": _get_text(where, row, "fig_caption"),
              "in_text_mention": row.get("in_text_mention")}  # fmt: skip
    mentions = figure["in_text_mention"]
    if mentions is not None and not is_list_of(mentions, str | dict):
        raise UserError(
            f"{where}: in_text_mention must be a list of strings (got {mentions!r:.80})."
        )
    if as_published:
        context = (
            f"Figure Caption:\n{figure['fig_label']}: {figure['fig_caption']}\n\n"
            f"Figure Context:\n\t- {figure['in_text_mention']}"
        )
    else:
        question, context = question.replace(IMAGE, "").strip(), figure_context(figure, True)
    return JudgeItem(
        row["question_id"], str(row.get("type", "")), question,
        _get_text(where, row, "gpt4_answer"), str(answer["text"]), context, row.get("image"), row,
        (None, _answer_id(answer)),
    )  # fmt: skip


def _image_context(layout: Layout, where: str, row: dict[str, Any]) -> str:
    """The text about an image: captions, and in LLaVA's visual layout the objects' boxes."""
    if layout == "llava_bench":
        caption = _get_value(where, row, "caption")
        if not isinstance(caption, str) and not is_list_of(caption, str):
            raise UserError(
                f"{where}: caption must be a string or a list of strings (got {caption!r:.80})."
            )
        return "\n".join(caption) if isinstance(caption, list) else caption
    captions = _get_value(where, row, "captions")
    instances = _get_value(where, row, "instances")
    if not is_list_of(captions, str):
        raise UserError(f"{where}: captions must be a list of strings (got {captions!r:.80}).")
    if not is_list_of(instances, dict) or not all(
        {"category", "bbox"} <= set(instance) for instance in instances
    ):
        raise UserError(f"{where}: instances must be a list of objects with category and bbox.")
    boxes = "\n".join(f"{instance['category']}: {instance['bbox']}" for instance in instances)
    return "\n".join(captions) + "\n\n" + boxes


def _get_text(where: str, row: dict[str, Any], key: str) -> str:
    value = _get_value(where, row, key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be a string (got {value!r:.80}).")
    return value


def _get_value(where: str, row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise UserError(f"{where}: {key!r} is missing.")
    return row[key]


def format_review(
    layout: Layout, number: int, item: JudgeItem, reply: str | None, pair: Sequence[float] | None
) -> dict[str, Any]:
    """A row of the published review files. Without a reply, its field is null."""
    if layout == "llava_med":
        return {
            **item.record, "question": item.record["text"], "ans1": item.reference,
            "ans2": item.answer, "gpt_eval": reply,
        }  # fmt: skip
    return {
        "id": number, "question_id": item.identifier, "answer1_id": item.answer_ids[0],
        "answer2_id": item.answer_ids[1], "category": item.category, "content": reply,
        "tuple": None if pair is None else list(pair),
    }  # fmt: skip
