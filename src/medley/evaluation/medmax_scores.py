"""MedMax's scores: of words, of judges' replies, of likeness; by task, as its result files have
them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medley.errors import UserError
from medley.evaluation.judge import note_of
from medley.evaluation.judge_scores import Pair, by_group, parse_pair, parse_pair_as_llava_med
from medley.evaluation.matching import is_yes_or_no, yes_or_no
from medley.evaluation.medmax_suite import (
    CAPTIONING,
    CHAT,
    GENERATION,
    MIXED,
    SOURCES,
    Row,
    chat_reference,
)  # fmt: skip
from medley.evaluation.science_qa import parsed_letter
from medley.utils.chat_client import RequestFailed

JUDGED = ("open", MIXED, CHAT)
LIKENESS, RELATIVE = "similarity of pictures", "relative to the reference (judge)"
_VERDICT = re.compile(r"correctness\W*([01])(?!\d|\.\d*[1-9])", re.IGNORECASE)


def closed_is_right(gold: str, given: str, as_published: bool) -> bool:
    """Published: the gold answer, letter for letter, somewhere in the given one, the other one
    nowhere ("normal" is a no). Ours: as a word."""
    if not as_published:
        wanted = is_yes_or_no(gold)
        return wanted is not None and yes_or_no(given) == wanted
    said = given.lower()
    if gold not in ("yes", "no"):
        return False
    other = "no" if gold == "yes" else "yes"
    return gold in said and other not in said


def choice_is_right(gold: str, given: str, as_published: bool) -> bool:
    """Published: the whole answer, its case aside, is the gold letter. Ours: the letter that it
    names."""
    if as_published:
        return given.upper().strip() == gold
    return parsed_letter(given) == gold.strip().upper()


def verdict(reply: str, as_published: bool) -> float | None:
    """1 or 0 as a judge says it; None where it says neither, or (not as published) both."""
    if as_published:
        said = [number for number in (1, 0) if f"Correctness: {number}" in reply]
        return float(said[0]) if said else None
    found = set(_VERDICT.findall(reply))
    return float(found.pop()) if len(found) == 1 else None


def accuracy(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error, std(ddof=1) / sqrt(n): nan for too few."""
    n = len(values)
    if not n:
        return {"accuracy": math.nan, "std_err": math.nan}
    spread = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return {"accuracy": float(np.mean(values)), "std_err": spread}


def pair_of(reply: str, as_published: bool) -> Pair | None:
    if not as_published:
        return parse_pair(reply)
    try:
        return parse_pair_as_llava_med(reply.split("\n")[0].strip() or reply.strip())
    except UserError:
        return None


# --- a run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """An answer: its words, the files of its pictures, or why there is none."""

    text: str
    pictures: tuple[str, ...] = ()
    error: str = ""

    @property
    def drawn(self) -> str | None:
        return self.pictures[0] if self.pictures else None


class Scores:
    """Scores of rows by their numbers, with a note where one is missing."""

    def __init__(
        self, rows: Sequence[Row], given: dict[int, Prediction], as_published: bool = False
    ) -> None:
        self.rows, self.given, self.as_published = rows, given, as_published
        self.by_row: dict[int, dict[str, float]] = {row.number: {} for row in rows}
        self.notes = {row.number: given[row.number].error for row in rows}
        self.pairs: dict[int, Pair] = {}
        self._groups = {row.number: row.group for row in rows}
        rules: dict[str, Callable[[str, str, bool], bool]] = {
            "closed": closed_is_right, "mcq": choice_is_right,
        }  # fmt: skip
        for row in self.answered(*rules):
            right = float(rules[row.group](row.answer, given[row.number].text, as_published))
            self.by_row[row.number] |= {"right": right, "accuracy": right}

    def answered(self, *groups: str) -> list[Row]:
        """Rows of these tasks that have an answer."""
        return [r for r in self.rows if r.group in groups and not self.given[r.number].error]

    def with_pictures(self) -> list[Row]:
        """Rows with pictures to compare. One that should have drawn and did not gets a note;
        MedMax leaves it out of the mean, and so do we, where the note shows it."""
        found = []
        for row in self.answered(CAPTIONING, GENERATION, MIXED):
            if row.task != CAPTIONING and self.given[row.number].drawn is None:
                self.notes[row.number] = self.notes[row.number] or "no picture was drawn"
            elif row.task != MIXED or row.image is not None:
                found.append(row)
        return found

    def readable(self, number: int, reply: str) -> bool:
        """Whether a reply says what is asked of its row."""
        if self._groups[number] == "open":
            return verdict(reply, self.as_published) is not None
        return pair_of(reply, self.as_published) is not None

    def take_reply(self, number: int, reply: str | RequestFailed) -> bool:
        """Keeps what a judge says of a row; whether it could be read."""
        is_read = isinstance(reply, str) and self._read(number, reply)
        self.notes[number] = note_of(reply, is_read) or self.notes[number]
        return is_read

    def _read(self, number: int, reply: str) -> bool:
        if self._groups[number] == "open":
            said = verdict(reply, self.as_published)
            if said is not None:
                self.by_row[number] |= {"right": said, "accuracy (judge)": said}
            return said is not None
        pair = pair_of(reply, self.as_published)
        if pair is not None:
            self.pairs[number] = pair
            if pair[0]:
                self.by_row[number][RELATIVE] = pair[1] / pair[0]
        return pair is not None

    # As MedMax's files have them.

    def results(self) -> dict[str, Any]:
        """By task; one that nothing was scored of is left out."""
        found = {}
        for name, rows in self._by_name().items():
            build = {CAPTIONING: self._similar, GENERATION: self._similar, MIXED: self._mixed,
                     CHAT: self._chat}.get(rows[0].group, self._questions)  # fmt: skip
            if own := build(rows):
                found[name] = own
        return found

    def logs(self) -> dict[str, list[dict[str, Any]]]:
        """By task, every row that was answered."""
        return {
            name: [self._log(row) for row in rows if not self.given[row.number].error]
            for name, rows in self._by_name().items()
        }

    def _by_name(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.name, []).append(row)
        return found

    def _values(self, rows: Sequence[Row], begins: str) -> list[float]:
        return [
            value for row in rows for name, value in self.by_row[row.number].items()
            if name.startswith(begins)
        ]  # fmt: skip

    def _questions(self, rows: Sequence[Row]) -> dict[str, Any]:
        right = self._values(rows, "right")
        return accuracy(right) if right else {}

    def _similar(self, rows: Sequence[Row]) -> dict[str, Any]:
        short = "captioning" if rows[0].task == CAPTIONING else "generation"
        found = {}
        for source in SOURCES:
            values = self._values([row for row in rows if row.kind == source], LIKENESS)
            if values:
                mean = accuracy(values)
                found[source] = {f"{short}_similarity": mean["accuracy"],
                                 f"{short}_stderr": mean["std_err"]}  # fmt: skip
        return found

    def _mixed(self, rows: Sequence[Row]) -> dict[str, Any]:
        words, pictures = self._values(rows, RELATIVE), self._values(rows, LIKENESS)
        if not words and not pictures:
            return {}
        return {
            "text_score": 100 * accuracy(words)["accuracy"], "num_text": len(words),
            "image_score": accuracy(pictures)["accuracy"] if pictures else 0,
            "num_images": len(pictures),
        }  # fmt: skip

    def _chat(self, rows: Sequence[Row]) -> dict[str, Any]:
        pairs = [
            ({**chat_reference(row.answer), "type": row.kind}, self.pairs[row.number])
            for row in rows if row.number in self.pairs
        ]  # fmt: skip
        return {name: s.published() for name, s in by_group(pairs, "overall").items()}

    def _log(self, row: Row) -> dict[str, Any]:
        given = self.given[row.number]
        common = {"question": row.prompt, "image_path": row.image, "answer": row.answer,
                  "generated_text": given.text}  # fmt: skip
        if row.group == row.kind:
            right = self.by_row[row.number].get("right")
            return common | {"is_correct": None if right is None else right == 1}
        return common | {"images": list(given.pictures), "scores": self.by_row[row.number]}


# --- result files -----------------------------------------------------------------------------


def merged(before: Any, new: dict[str, Any]) -> dict[str, Any]:
    """A result file's content with other tasks' results kept."""
    return {**(before if isinstance(before, dict) else {}), **new}
