"""A judge's replies to scores: LLaVA's and LLaVA-Med's ways to read and to sum them up."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from medley.errors import UserError

# The first of these that is true is a question's domain, in LLaVA-Med's order.
DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
_HIGHEST = 10.0
_SCORE = r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?"
# Two scores and nothing else, but for a word before them and marks around.
_BARE = re.compile(
    rf"(?:scores?|ratings?)?\s*[:=]?\s*[(\[]?\s*{_SCORE}(?:\s*[,;|&]\s*|\s+and\s+|\s+){_SCORE}"
    r"\s*[)\]]?\s*[.!]?", re.IGNORECASE,
)  # fmt: skip
_LABELLED = re.compile(rf"\b[A-Za-z]+\s*([12])\s*[:=]\s*{_SCORE}(?![\w/]|\.\d)")
_EMPHASIS = str.maketrans("", "", "*_#`>")
_LINES = 3  # of a reply, in which the scores stand

Pair = tuple[float, float]  # of the reference, and of the model


def parse_pair(reply: str) -> Pair | None:
    """The two scores at the beginning of a reply: bare in one of its first lines that hold a digit,
    or labelled `Assistant 1: 8`, `Assistant 2: 9`. None for anything else, and beyond 10."""
    bare = [text.translate(_EMPHASIS).strip() for text in reply.splitlines()]
    lines = [text for text in bare if text][:_LINES]
    labelled = dict(_LABELLED.findall("\n".join(lines)))
    found = next((text for text in lines if re.search(r"\d", text)), "")
    if (both := _BARE.fullmatch(found)) is not None:
        pair = float(both[1]), float(both[2])
    elif set(labelled) == {"1", "2"}:
        pair = float(labelled["1"]), float(labelled["2"])
    else:
        return None
    return pair if max(pair) <= _HIGHEST else None


def parse_pair_as_llava(reply: str) -> list[float]:
    """LLaVA's reading: commas as blanks, exactly two words in the first line; else [-1, -1], which
    its sums then count as scores."""
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        return [float(words[0]), float(words[1])] if len(words) == 2 else [-1, -1]
    except ValueError:
        return [-1, -1]


def parse_pair_as_llava_med(reply: str) -> Pair:
    """LLaVA-Med's reading. Raises UserError where the published code stops."""
    words = reply.split("\n")[0].split(" ")
    try:
        reference, model = (float(word) for word in words)
        if not math.isfinite(reference + model):
            raise ValueError("no finite number")
    except ValueError as error:
        raise UserError(
            f"a judge's reply does not begin with two scores: {reply[:60]!r}"
        ) from error
    return reference, model


@dataclass(frozen=True)
class Summary:
    """Mean scores of a group, and the mean of the model's in percent of the reference's, question
    by question (LLaVA-Med's way)."""

    reference: float
    model: float
    of_ratios: float
    n: int

    def published(self) -> dict[str, float]:
        """By LLaVA-Med's names."""
        return {
            "gpt4_score": self.reference, "pred_score": self.model,
            "pred_relative_score": self.of_ratios, "data_size": self.n,
        }  # fmt: skip

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Summary:
        """Raises UserError for no pairs. A reference of 0 has no share, which is left out."""
        if not pairs:
            raise UserError("no scores to sum up")
        reference = sum(pair[0] for pair in pairs) / len(pairs)
        model = sum(pair[1] for pair in pairs) / len(pairs)
        ratios = [b / a for a, b in pairs if a]
        share = 100 * sum(ratios) / len(ratios) if ratios else math.nan
        return cls(reference, model, share, len(pairs))


def domain_of(row: dict[str, Any]) -> str | None:
    """LLaVA-Med's domain of a question: the first that is true, in a fixed order."""
    there = row.get("domain")
    if not isinstance(there, dict):
        return None
    return next((name for name in DOMAINS if there.get(name)), None)


def by_group(rows: Iterable[tuple[dict[str, Any], Pair]], whole: str) -> dict[str, Summary]:
    """Summaries by type, of all (under the name `whole`) and by domain, in the order they come."""
    groups: dict[str, list[Pair]] = {}
    for row, pair in rows:
        kind = row.get("type")
        for name in (kind if kind != whole else None, whole, domain_of(row)):
            if isinstance(name, str):
                groups.setdefault(name, []).append(pair)
    return {name: Summary.of(pairs) for name, pairs in groups.items()}


def llava_lines(rows: Iterable[dict[str, Any]]) -> list[str]:
    """LLaVA's table of one review file: category, the model in percent of the reference, and both
    means times ten. Raises UserError for a row without scores, or a mean reference of 0."""
    groups: dict[str, list[Sequence[float]]] = {"all": []}
    for row in rows:
        pair = row.get("tuple", row.get("score"))
        if not isinstance(pair, list) or [type(p) in (int, float) for p in pair] != [True, True]:
            raise UserError(f"a review without a pair of scores: {row!r:.200}")
        groups["all"].append(pair)
        if "category" in row:
            groups.setdefault(str(row["category"]), []).append(pair)
    if not groups["all"]:
        raise UserError("no reviews to sum up")
    lines = []
    for name in sorted(groups):
        means = [round(sum(p[i] for p in groups[name]) / len(groups[name]), 3) for i in (0, 1)]
        if not means[0]:
            raise UserError(
                f"{name}: the reference's mean score is 0, the share of it is no number"
            )
        share, first, second = means[1] / means[0] * 100, means[0] * 10, means[1] * 10
        lines.append(f"{name} {round(share, 1)} {round(first, 1)} {round(second, 1)}")
    return lines
