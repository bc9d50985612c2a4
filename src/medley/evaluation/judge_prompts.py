"""Two answers side by side, as LLaVA and LLaVA-Med lay them before a judge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from medley.data.vocabulary import IMAGE
from medley.datasets.instructions.captions import context_of
from medley.errors import UserError
from medley.evaluation.judge import PROMPTS
from medley.utils.chat_client import Message

Layout = Literal["llava", "llava_visual", "llava_bench", "llava_med"]
_BENCH = "llava_bench_"  # before a category's name in LLaVA's rules


@dataclass(frozen=True)
class JudgeItem:
    """A question and two answers. `first` is the reference's. `row` is the question's record."""

    identifier: Any
    category: str
    question: str
    first: str
    second: str
    context: str | None = None
    image: str | None = None
    row: dict[str, Any] = field(default_factory=dict)
    answer_ids: tuple[Any, Any] = (None, None)


@dataclass(frozen=True)
class JudgePrompts:
    """What the judge is told: for all, and by category its role for the two and the task."""

    system: str
    by_category: Mapping[str, tuple[str, str]]

    @classmethod
    def read(cls, path: Path | None) -> JudgePrompts:
        """A file of `system` and of categories with role and prompt (LLaVA's rule.json has no
        system); what it lacks is ours. Raises UserError for any other file."""
        usual = _rules(PROMPTS / "review.yaml")
        if path is None:
            return usual
        own = _rules(path)
        return cls(own.system or usual.system, own.by_category)

    def of(self, category: str, falls_back: bool) -> tuple[str, str]:
        """Role and prompt. Raises UserError for a category without any."""
        found = self.by_category.get(category)
        if found is None and falls_back:
            found = self.by_category.get("default")
        if found is None:
            raise UserError(
                f"the rules have no category {category!r}, there is "
                f"{', '.join(self.by_category)} (--rule)"
            )
        return found

    def messages(self, review: JudgeItem, falls_back: bool = True) -> list[Message]:
        role, prompt = self.of(review.category, falls_back)
        blocks = [] if review.context is None else [f"[Context]\n{review.context}\n\n"]
        blocks += [
            f"[Question]\n{review.question}\n\n",
            f"[{role} 1]\n{review.first}\n\n[End of {role} 1]\n\n",
            f"[{role} 2]\n{review.second}\n\n[End of {role} 2]\n\n",
            f"[System]\n{prompt}\n\n",
        ]
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": "".join(blocks)},
        ]


def _rules(path: Path) -> JudgePrompts:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))  # of which JSON is a part
        system = str(found.pop("system", ""))
        return JudgePrompts(
            system, {n: (str(r["role"]), str(r["prompt"])) for n, r in found.items()}
        )
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected categories with role and prompt ({error})") from error


Rows = Sequence[tuple[str, dict[str, Any]]]  # with their places


def reviews_of(
    layout: Layout,
    questions: Rows,
    answers: Sequence[tuple[Path, Rows]],
    contexts: Rows | None,
    as_published: bool,
) -> list[JudgeItem]:
    """Questions with their answers, by id, in the order of the questions.

    LLaVA-Med's questions hold the reference (`gpt4_answer`) themselves, LLaVA's need two answer
    files. `as_published` keeps `<image>` in LLaVA-Med's questions and prints the sentences that
    mention a figure as Python prints a list. Raises UserError for what is missing or there twice.
    """
    wanted = 1 if layout == "llava_med" else 2
    if len(answers) != wanted:
        raise UserError(f"{len(answers)} answer files, {layout} takes {wanted}")
    if contexts is None and layout in ("llava_visual", "llava_bench"):
        raise UserError(f"{layout} needs --context, what is known of the pictures")
    sides = [_by_id(path, rows) for path, rows in answers]
    told = {str(row.get("image")): _context(layout, place, row) for place, row in contexts or []}
    found: list[JudgeItem] = []
    seen: set[str] = set()
    for place, row in questions:
        identifier = _value(place, row, "question_id")
        if str(identifier) in seen:
            raise UserError(f"{place}: a second question with the id {identifier}")
        seen.add(str(identifier))
        own = []
        for (path, _), side in zip(answers, sides, strict=True):
            if str(identifier) not in side:
                raise UserError(f"{path}: no answer to question {identifier} ({place})")
            own.append(side[str(identifier)])
        if layout == "llava_med":
            found.append(_of_llava_med(place, row, own[0], as_published))
            continue
        image = row.get("image")
        context = None
        if layout != "llava":
            if str(image) not in told:
                raise UserError(f"{place}: --context has no picture {image!r}")
            context = told[str(image)]
        category = _text(place, row, "category")
        found.append(JudgeItem(
            identifier, _BENCH + category if layout == "llava_bench" else category,
            _text(place, row, "text"), str(own[0]["text"]), str(own[1]["text"]), context,
            image, row, (_answer_id(own[0]), _answer_id(own[1])),
        ))  # fmt: skip
    if not found:
        raise UserError("no questions to review")
    for (path, _), side in zip(answers, sides, strict=True):
        if strangers := sorted(side.keys() - seen):
            raise UserError(
                f"{path}: {len(strangers)} answers to no question, the first is {strangers[0]}"
            )
    return found


def _answer_id(row: dict[str, Any]) -> Any:
    return row.get("answer_id", row["question_id"])


def _of_llava_med(
    place: str, row: dict[str, Any], answer: dict[str, Any], as_published: bool
) -> JudgeItem:
    question = _text(place, row, "text")
    figure = {"fig_label": _text(place, row, "fig_label"),
              "fig_caption": _text(place, row, "fig_caption"),
              "in_text_mention": row.get("in_text_mention")}  # fmt: skip
    mentions = figure["in_text_mention"]
    if mentions is not None and not is_list_of(mentions, str | dict):
        raise UserError(f"{place}: in_text_mention is {mentions!r:.80}, expected a list of texts")
    if as_published:
        context = (
            f"Figure Caption:\n{figure['fig_label']}: {figure['fig_caption']}\n\n"
            f"Figure Context:\n\t- {figure['in_text_mention']}"
        )
    else:
        question, context = question.replace(IMAGE, "").strip(), context_of(figure, True)
    return JudgeItem(
        row["question_id"], str(row.get("type", "")), question,
        _text(place, row, "gpt4_answer"), str(answer["text"]), context, row.get("image"), row,
        (None, _answer_id(answer)),
    )  # fmt: skip


def _context(layout: Layout, place: str, row: dict[str, Any]) -> str:
    if layout == "llava_bench":
        caption = _value(place, row, "caption")
        if not isinstance(caption, str) and not is_list_of(caption, str):
            raise UserError(
                f"{place}: caption is {caption!r:.80}, expected text or a list of texts"
            )
        return "\n".join(caption) if isinstance(caption, list) else caption
    captions, instances = _value(place, row, "captions"), _value(place, row, "instances")
    if not is_list_of(captions, str):
        raise UserError(f"{place}: captions is {captions!r:.80}, expected a list of texts")
    if not is_list_of(instances, dict) or not all(
        {"category", "bbox"} <= set(i) for i in instances
    ):
        raise UserError(f"{place}: instances are no list of objects with category and bbox")
    return (
        "\n".join(captions) + "\n\n" + "\n".join(f"{i['category']}: {i['bbox']}" for i in instances)
    )


def is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def _by_id(path: Path, rows: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for place, row in rows:
        identifier = str(_value(place, row, "question_id"))
        if not isinstance(_value(place, row, "text"), str):
            raise UserError(f"{place}: its text is {row['text']!r}, expected text")
        if found.setdefault(identifier, row) is not row:
            raise UserError(f"{place}: a second answer to question {identifier}")
    return found


def _text(place: str, row: dict[str, Any], name: str) -> str:
    value = _value(place, row, name)
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} is {value!r:.80}, expected text")
    return value


def _value(place: str, row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise UserError(f"{place}: {name!r} is missing")
    return row[name]


def review_row(
    layout: Layout, number: int, review: JudgeItem, reply: str | None, pair: Sequence[float] | None
) -> dict[str, Any]:
    """A line of the published files of reviews; without a reply its place stays empty."""
    if layout == "llava_med":
        return {
            **review.row, "question": review.row["text"], "ans1": review.first,
            "ans2": review.second, "gpt_eval": reply,
        }  # fmt: skip
    return {
        "id": number, "question_id": review.identifier, "answer1_id": review.answer_ids[0],
        "answer2_id": review.answer_ids[1], "category": review.category, "content": reply,
        "tuple": None if pair is None else list(pair),
    }  # fmt: skip
