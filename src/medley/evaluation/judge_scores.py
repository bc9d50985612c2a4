"""Scores in a judge's replies: parsed and summarized our way, LLaVA's way or LLaVA-Med's way."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medley.errors import UserError
from medley.evaluation.records import LocatedRecord

# LLaVA-Med's domains in its order: a question belongs to the first one that is true.
DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
MAX_SCORE = 10.0
REPLY_KEYS = ("gpt_eval", "result", "content")  # of LLaVA-Med v1.5, LLaVA-Med v1.0 and LLaVA
SCORE_KEYS = ("tuple", "score")  # pairs in LLaVA's reviews, some of which have no key above
_SCORE = r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?"
# A line with two scores and nothing else, except for "Scores:" before them and brackets.
_TWO_SCORES = re.compile(
    rf"(?:scores?|ratings?)?\s*[:=]?\s*[(\[]?\s*{_SCORE}(?:\s*[,;|&]\s*|\s+and\s+|\s+){_SCORE}"
    r"\s*[)\]]?\s*[.!]?", re.IGNORECASE,
)  # fmt: skip
_LABELED_SCORE = re.compile(rf"\b[A-Za-z]+\s*([12])\s*[:=]\s*{_SCORE}(?![\w/]|\.\d)")
_EMPHASIS = str.maketrans("", "", "*_#`>")
_SEARCHED_LINES = 3  # of a reply

Pair = tuple[float, float]  # scores of the reference and of the model


def parse_pair(reply: str) -> Pair | None:
    """The two scores at the beginning of a reply; None without two scores up to 10.

    They are the only content of the first line with a digit, or labeled (`Assistant 1: 8`,
    `Assistant 2: 9`).
    """
    stripped = [line.translate(_EMPHASIS).strip() for line in reply.splitlines()]
    lines = [line for line in stripped if line][:_SEARCHED_LINES]
    labeled = dict(_LABELED_SCORE.findall("\n".join(lines)))
    first_with_digit = next((line for line in lines if re.search(r"\d", line)), "")
    if (match := _TWO_SCORES.fullmatch(first_with_digit)) is not None:
        pair = float(match[1]), float(match[2])
    elif set(labeled) == {"1", "2"}:
        pair = float(labeled["1"]), float(labeled["2"])
    else:
        return None
    return pair if max(pair) <= MAX_SCORE else None


def parse_pair_as_llava(reply: str) -> list[float]:
    """LLaVA's parser: the first line has exactly two words, else [-1, -1].

    Commas count as spaces. LLaVA's summary counts the -1 as scores.
    """
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        return [float(words[0]), float(words[1])] if len(words) == 2 else [-1, -1]
    except ValueError:
        return [-1, -1]


def parse_pair_as_llava_med(reply: str) -> Pair:
    """LLaVA-Med's parser. Raises UserError where the published code crashes."""
    words = reply.split("\n")[0].split(" ")
    try:
        reference, model = (float(word) for word in words)
        if not math.isfinite(reference + model):
            raise ValueError("NaN or infinite")
    except ValueError as error:
        raise UserError(
            f"The judge's reply must begin with two scores (got {reply[:60]!r})."
        ) from error
    return reference, model


@dataclass(frozen=True)
class Summary:
    """Mean scores of a group of questions.

    Attributes:
        reference: mean score of the reference
        model: mean score of the model
        relative: mean over the questions of model / reference, in percent, as LLaVA-Med has it
        n: number of questions
    """

    reference: float
    model: float
    relative: float
    n: int

    def to_llava_med(self) -> dict[str, float]:
        """The summary with LLaVA-Med's keys."""
        return {
            "gpt4_score": self.reference, "pred_score": self.model,
            "pred_relative_score": self.relative, "data_size": self.n,
        }  # fmt: skip

    @classmethod
    def from_pairs(cls, pairs: Sequence[Pair]) -> Summary:
        """Raises UserError without pairs. A reference score of 0 has no ratio and is left out."""
        if not pairs:
            raise UserError("The group has no scores.")
        reference = sum(pair[0] for pair in pairs) / len(pairs)
        model = sum(pair[1] for pair in pairs) / len(pairs)
        ratios = [b / a for a, b in pairs if a]
        relative = 100 * sum(ratios) / len(ratios) if ratios else math.nan
        return cls(reference, model, relative, len(pairs))


def question_domain(row: dict[str, Any]) -> str | None:
    """LLaVA-Med's domain of a question: the first one that is true, in a fixed order."""
    domains = row.get("domain")
    if not isinstance(domains, dict):
        return None
    return next((name for name in DOMAINS if domains.get(name)), None)


def summarize_groups(
    rows: Iterable[tuple[dict[str, Any], Pair]], total_name: str
) -> dict[str, Summary]:
    """Summaries by type, of all questions (as `total_name`) and by domain, as they occur."""
    groups: dict[str, list[Pair]] = {}
    for row, pair in rows:
        kind = row.get("type")
        for name in (kind if kind != total_name else None, total_name, question_domain(row)):
            if isinstance(name, str):
                groups.setdefault(name, []).append(pair)
    return {name: Summary.from_pairs(pairs) for name, pairs in groups.items()}


def format_groups(groups: Mapping[str, Summary]) -> str:
    """A table of summaries for a terminal."""
    lines = [f"{'':24} reference    model   relative      n"]
    lines += [
        f"{name:24} {s.reference:9.2f} {s.model:8.2f} {s.relative:9.1f}% {s.n:6}"
        for name, s in groups.items()
    ]
    return "\n".join(lines)


def parse_reviews(
    reviews: Iterable[LocatedRecord], as_llava_med: bool
) -> tuple[list[tuple[dict[str, Any], Pair]], list[str]]:
    """(review, scores) for each parsed reply, and a description of each reply without scores.

    A review without a reply field has its pair of scores, as LLaVA's reviews do. Raises UserError
    for a review with neither, and with `as_llava_med` for one without a reply that LLaVA-Med's
    parser accepts.
    """
    parse = parse_pair_as_llava_med if as_llava_med else parse_pair
    parsed: list[tuple[dict[str, Any], Pair]] = []
    unparsed: list[str] = []
    for where, review in reviews:
        key = next((key for key in REPLY_KEYS if key in review), None)
        reply = review[key] if key else None
        if key is None and not as_llava_med and any(name in review for name in SCORE_KEYS):
            pair, shown = pair_of_review(where, review)
        elif key is None or not isinstance(reply, str | None):
            raise UserError(
                f"{where}: The judge's reply is missing or not a string (expected one of the keys "
                f"{', '.join(REPLY_KEYS)}"
                f"{'' if as_llava_med else ', or scores in ' + ' or '.join(SCORE_KEYS)})."
            )
        else:
            pair = None if reply is None else parse(reply)
            shown = "no reply" if reply is None else repr(reply[:80])
        if pair is None:
            unparsed.append(f"{where}: {shown}")
        else:
            parsed.append(({"type": review.get("category"), **review}, pair))
    return parsed, unparsed


def pair_of_review(where: str, review: dict[str, Any]) -> tuple[Pair | None, str]:
    """The scores of a review in LLaVA's layout, and their text.

    None for LLaVA's [-1, -1], which means that the reply has no scores, and for null. Raises
    UserError for anything else that is not two scores from 0 to 10.
    """
    key = next(name for name in SCORE_KEYS if name in review)
    value = review[key]
    if value is None or value == [-1, -1]:
        return None, f"{key} {value!r}"
    is_pair = isinstance(value, list) and [type(x) in (int, float) for x in value] == [True, True]
    if not is_pair or not all(0 <= x <= MAX_SCORE for x in value):
        raise UserError(
            f"{where}: {key} is invalid (got {value!r:.80}, expected two numbers from 0 to 10)."
        )
    return (float(value[0]), float(value[1])), f"{key} {value!r}"


def llava_table(reviews: Iterable[dict[str, Any]]) -> list[str]:
    """LLaVA's table of a review file.

    A line has the category, the model's mean in percent of the reference's, and both means times
    ten. Raises UserError for a review without scores, or a mean reference score of 0.
    """
    groups: dict[str, list[Sequence[float]]] = {"all": []}
    for review in reviews:
        pair = review.get("tuple", review.get("score"))
        if not isinstance(pair, list) or [type(p) in (int, float) for p in pair] != [True, True]:
            raise UserError(f"A review has no pair of scores (got {review!r:.200}).")
        groups["all"].append(pair)
        if "category" in review:
            groups.setdefault(str(review["category"]), []).append(pair)
    if not groups["all"]:
        raise UserError("The file contains no reviews with scores.")
    lines = []
    for name in sorted(groups):
        means = [round(sum(p[i] for p in groups[name]) / len(groups[name]), 3) for i in (0, 1)]
        if not means[0]:
            raise UserError(
                f"{name}: The reference's mean score is 0, so the relative score is undefined."
            )
        relative, first, second = means[1] / means[0] * 100, means[0] * 10, means[1] * 10
        lines.append(f"{name} {round(relative, 1)} {round(first, 1)} {round(second, 1)}")
    return lines
