"""MedMax's scores: of texts, of a judge's replies and of similarities, in its result format."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medley.errors import UserError
from medley.evaluation.choice_letters import find_letter, listed_choices
from medley.evaluation.examples import Example, ScoredExample
from medley.evaluation.judge import failure_note
from medley.evaluation.judge_scores import (
    Pair,
    parse_pair,
    parse_pair_as_llava_med,
    summarize_groups,
)
from medley.evaluation.medmax_suite import (
    CAPTIONING,
    CHAT,
    GENERATION,
    MIXED,
    SOURCES,
    MedmaxRecord,
    chat_reference,
    gold_text,
)
from medley.evaluation.yes_no import find_yes_no, gold_yes_no
from medley.utils.chat_client import RequestFailed

JUDGED = ("open", MIXED, CHAT)
IMAGE_SIMILARITY, RELATIVE = "image similarity", "relative to the reference (judge)"
_VERDICT = re.compile(r"correctness\W*([01])(?!\d|\.\d*[1-9])", re.IGNORECASE)


def is_closed_correct(gold: str, answer: str, as_published: bool) -> bool:
    """Our own: the same yes or no as a word.

    Published: the answer contains the gold answer as a substring and not the other one, so
    "normal" counts as no.
    """
    if not as_published:
        gold_choice = gold_yes_no(gold)
        return gold_choice is not None and find_yes_no(answer) == gold_choice
    if gold not in ("yes", "no"):
        return False
    text = answer.lower()
    other = "no" if gold == "yes" else "yes"
    return gold in text and other not in text


def is_choice_correct(gold: str, answer: str, as_published: bool, question: str = "") -> bool:
    """Our own: the letter of the answer, or the text of its choice in the question.

    Published: the complete answer is the gold letter.
    """
    if as_published:
        return answer.upper().strip() == gold
    return find_letter(answer, listed_choices(question)) == gold.strip().upper()


def parse_verdict(reply: str, as_published: bool) -> float | None:
    """A judge's verdict, 1 or 0; None without one, or (not as published) with both."""
    if as_published:
        published = [number for number in (1, 0) if f"Correctness: {number}" in reply]
        return float(published[0]) if published else None
    verdicts = set(_VERDICT.findall(reply))
    return float(verdicts.pop()) if len(verdicts) == 1 else None


def parse_judge_pair(reply: str, as_published: bool) -> Pair | None:
    if not as_published:
        return parse_pair(reply)
    try:
        return parse_pair_as_llava_med(reply.split("\n")[0].strip() or reply.strip())
    except UserError:
        return None


def mean_and_stderr(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error, std(ddof=1) / sqrt(n); NaN for too few values."""
    n = len(values)
    if not n:
        return {"accuracy": math.nan, "std_err": math.nan}
    stderr = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return {"accuracy": float(np.mean(values)), "std_err": stderr}


# --- a run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneratedAnswer:
    """A model's answer: its text and the files of its images, or the error that prevented it."""

    text: str
    images: tuple[str, ...] = ()
    error: str = ""

    @property
    def image(self) -> str | None:
        """The first image, which is the one that is scored."""
        return self.images[0] if self.images else None


class MedmaxScores:
    """The scores of records by their numbers, and notes about missing scores."""

    def __init__(
        self,
        records: Sequence[MedmaxRecord],
        answers: dict[int, GeneratedAnswer],
        as_published: bool = False,
    ) -> None:
        self.records, self.answers, self.as_published = records, answers, as_published
        self.by_number: dict[int, dict[str, float]] = {r.number: {} for r in records}
        self.notes = {r.number: answers[r.number].error for r in records}
        self.pairs: dict[int, Pair] = {}
        self._groups = {r.number: r.group for r in records}
        for record in self.answered("closed", "mcq"):
            gold, answer = record.answer, answers[record.number].text
            if record.group == "closed":
                correct = float(is_closed_correct(gold, answer, as_published))
            else:
                correct = float(is_choice_correct(gold, answer, as_published, record.prompt))
            self.by_number[record.number] |= {"correct": correct, "accuracy": correct}

    def answered(self, *groups: str) -> list[MedmaxRecord]:
        """The records of some groups that have an answer."""
        return [r for r in self.records if r.group in groups and not self.answers[r.number].error]

    def with_images(self) -> list[MedmaxRecord]:
        """The records whose images are compared.

        A record whose answer lacks the required image gets a note. As in MedMax, it is left out
        of the mean.
        """
        compared = []
        for record in self.answered(CAPTIONING, GENERATION, MIXED):
            number = record.number
            if record.task != CAPTIONING and self.answers[number].image is None:
                self.notes[number] = self.notes[number] or "No image was generated."
            elif record.task != MIXED or record.image is not None:
                compared.append(record)
        return compared

    def is_parsable(self, number: int, reply: str) -> bool:
        """Whether a judge's reply has the score that its record needs."""
        if self._groups[number] == "open":
            return parse_verdict(reply, self.as_published) is not None
        return parse_judge_pair(reply, self.as_published) is not None

    def add_reply(self, number: int, reply: str | RequestFailed) -> bool:
        """Adds a judge's reply; returns whether it was parsed."""
        is_parsed = isinstance(reply, str) and self._parse_reply(number, reply)
        self.notes[number] = failure_note(reply, is_parsed) or self.notes[number]
        return is_parsed

    def _parse_reply(self, number: int, reply: str) -> bool:
        if self._groups[number] == "open":
            verdict = parse_verdict(reply, self.as_published)
            if verdict is not None:
                self.by_number[number] |= {"correct": verdict, "accuracy (judge)": verdict}
            return verdict is not None
        pair = parse_judge_pair(reply, self.as_published)
        if pair is not None:
            self.pairs[number] = pair
            if pair[0]:
                self.by_number[number][RELATIVE] = pair[1] / pair[0]
        return pair is not None

    def to_examples(self) -> list[ScoredExample]:
        """The records with their scores, for a report."""
        return [self._to_example(record) for record in self.records]

    def _to_example(self, record: MedmaxRecord) -> ScoredExample:
        answer = self.answers[record.number]
        is_vqa = record.group == record.kind
        kind = record.name if is_vqa else f"{record.task}: {record.kind}"
        example = Example(
            record.number, record.prompt, gold_text(record), answer.text, kind, record.prompt_image
        )
        scores, note = self.by_number[record.number], self.notes[record.number]
        return ScoredExample(example, scores, note, answer.image)

    # MedMax's files

    def results(self) -> dict[str, Any]:
        """The result file by task, without tasks that have no score."""
        results = {}
        for name, records in self._by_name().items():
            build = {CAPTIONING: self._similarity_result, GENERATION: self._similarity_result,
                     MIXED: self._mixed_result, CHAT: self._chat_result,
                     }.get(records[0].group, self._vqa_result)  # fmt: skip
            if result := build(records):
                results[name] = result
        return results

    def logs(self) -> dict[str, list[dict[str, Any]]]:
        """The log file by task, with every record that has an answer."""
        return {
            name: [self._log(record) for record in records if not self.answers[record.number].error]
            for name, records in self._by_name().items()
        }

    def _by_name(self) -> dict[str, list[MedmaxRecord]]:
        by_name: dict[str, list[MedmaxRecord]] = {}
        for record in self.records:
            by_name.setdefault(record.name, []).append(record)
        return by_name

    def _values(self, records: Sequence[MedmaxRecord], prefix: str) -> list[float]:
        return [
            value for record in records for name, value in self.by_number[record.number].items()
            if name.startswith(prefix)
        ]  # fmt: skip

    def _vqa_result(self, records: Sequence[MedmaxRecord]) -> dict[str, Any]:
        correct = self._values(records, "correct")
        return mean_and_stderr(correct) if correct else {}

    def _similarity_result(self, records: Sequence[MedmaxRecord]) -> dict[str, Any]:
        prefix = "captioning" if records[0].task == CAPTIONING else "generation"
        result = {}
        for source in SOURCES:
            values = self._values([r for r in records if r.kind == source], IMAGE_SIMILARITY)
            if values:
                mean = mean_and_stderr(values)
                result[source] = {f"{prefix}_similarity": mean["accuracy"],
                                  f"{prefix}_stderr": mean["std_err"]}  # fmt: skip
        return result

    def _mixed_result(self, records: Sequence[MedmaxRecord]) -> dict[str, Any]:
        texts = self._values(records, RELATIVE)
        images = self._values(records, IMAGE_SIMILARITY)
        if not texts and not images:
            return {}
        return {
            "text_score": 100 * mean_and_stderr(texts)["accuracy"], "num_text": len(texts),
            "image_score": mean_and_stderr(images)["accuracy"] if images else 0,
            "num_images": len(images),
        }  # fmt: skip

    def _chat_result(self, records: Sequence[MedmaxRecord]) -> dict[str, Any]:
        pairs = [
            ({**chat_reference(record.answer), "type": record.kind}, self.pairs[record.number])
            for record in records if record.number in self.pairs
        ]  # fmt: skip
        groups = summarize_groups(pairs, "overall")
        return {name: summary.to_llava_med() for name, summary in groups.items()}

    def _log(self, record: MedmaxRecord) -> dict[str, Any]:
        answer = self.answers[record.number]
        common = {"question": record.prompt, "image_path": record.image, "answer": record.answer,
                  "generated_text": answer.text}  # fmt: skip
        scores = self.by_number[record.number]
        if record.group == record.kind:
            correct = scores.get("correct")
            return common | {"is_correct": None if correct is None else correct == 1}
        return common | {"images": list(answer.images), "scores": scores}


def merge_results(before: Any, new: dict[str, Any]) -> dict[str, Any]:
    """The content of a result file, with the earlier results of other tasks."""
    return {**(before if isinstance(before, dict) else {}), **new}
