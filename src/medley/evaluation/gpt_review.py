"""Scores and files of a judge's reviews, in the layouts of LLaVA and LLaVA-Med."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medley.datasets.base import RecordError, resolve_image_path
from medley.errors import UserError
from medley.evaluation import judge_scores
from medley.evaluation.examples import Example, ScoredExample
from medley.evaluation.judge import JudgeStats, failure_note
from medley.evaluation.judge_prompts import JudgeItem, Layout, format_review
from medley.evaluation.judge_scores import MAX_SCORE, Pair, Summary
from medley.evaluation.report import Cell, Table
from medley.utils.chat_client import RequestFailed
from medley.utils.jsonl import write_jsonl


@dataclass(frozen=True)
class Reviews:
    """The judge's replies and similarities of answers, by the positions of the items.

    Attributes:
        layout: layout of the review file
        as_published: parse replies as the layout's own program does
        items: the pairs of answers
        replies: replies of the judge; empty without a judge
        similarities: similarity of each answer to its reference; empty without a sentence model
        sentence_model: name of the sentence model
    """

    layout: Layout
    as_published: bool
    items: Sequence[JudgeItem]
    replies: Mapping[int, str | RequestFailed]
    similarities: Sequence[float] = ()
    sentence_model: str = ""

    @property
    def pairs(self) -> dict[int, Pair | None]:
        """The scores of each reply, None where it cannot be parsed."""
        return {
            number: parse_review(self.layout, self.as_published, reply)
            for number, reply in self.replies.items() if isinstance(reply, str)
        }  # fmt: skip

    def stats(self) -> JudgeStats:
        pairs = self.pairs
        return JudgeStats.from_replies(
            self.replies, {number: pairs.get(number) is not None for number in self.replies}
        )

    def to_examples(self, image_folder: Path | None) -> list[ScoredExample]:
        """The items with all scores. An image outside of `image_folder` is left out."""
        pairs = self.pairs
        metric = f"similarity to the reference ({self.sentence_model}; not a judge's score)"
        scored = []
        for number, item in enumerate(self.items):
            scores = {metric: self.similarities[number]} if self.similarities else {}
            pair = pairs.get(number)
            if pair is not None:
                scores |= {
                    "reference's points": pair[0] / MAX_SCORE,
                    "model's points": pair[1] / MAX_SCORE,
                }
                if pair[0]:
                    scores["model relative to the reference"] = pair[1] / pair[0]
            reply = self.replies.get(number)
            note = "" if reply is None else failure_note(reply, pair is not None)
            example = Example(
                item.identifier, item.question, item.reference, item.answer, item.category,
                _image_path(item, image_folder),
            )  # fmt: skip
            scored.append(ScoredExample(example, scores, note))
        return scored

    def summaries(self) -> dict[str, Summary]:
        """LLaVA-Med's groups: by type (LLaVA's category), of all questions, and by domain."""
        rows = [
            ({**self.items[number].record, "type": self.items[number].category or None}, pair)
            for number, pair in self.pairs.items() if pair is not None
        ]  # fmt: skip
        return judge_scores.summarize_groups(rows, "overall")

    def write(self, path: Path) -> None:
        """Writes the published layout's review file."""
        pairs = self.pairs
        rows = []
        for number, item in enumerate(self.items):
            reply = self.replies[number]
            text = reply.strip() if isinstance(reply, str) else None
            pair = pairs.get(number)
            if pair is None and text is not None and self.as_published:
                pair = (-1, -1)  # as LLaVA's program writes it
            rows.append(format_review(self.layout, number + 1, item, text, pair))
        write_jsonl(path, rows)


def parse_review(layout: Layout, as_published: bool, reply: str) -> Pair | None:
    """The two scores of a reply; None if it cannot be parsed."""
    if not as_published:
        return judge_scores.parse_pair(reply)
    if layout == "llava_med":
        try:
            return judge_scores.parse_pair_as_llava_med(reply)
        except UserError:
            return None
    first, second = judge_scores.parse_pair_as_llava(reply)
    return (first, second) if min(first, second) >= 0 else None


def _image_path(item: JudgeItem, image_folder: Path | None) -> str | None:
    try:
        return resolve_image_path(item.image, image_folder) if item.image else None
    except RecordError:
        return None


def summaries_table(summaries: Mapping[str, Summary]) -> Table:
    rows = [
        [Cell(name), Cell(f"{s.reference:.2f}"), Cell(f"{s.model:.2f}"), Cell(f"{s.relative:.1f}"),
         Cell(str(s.n))]
        for name, s in summaries.items()
    ]  # fmt: skip
    columns = ("", "reference", "model", "relative (percent)", "n")
    return Table("LLaVA-Med's summary", columns, rows)
