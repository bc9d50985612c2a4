"""Scores of visual questions: LLaVA-Med's two published scorers, and ours.

The published ones are kept bug for bug behind `--compat`: substrings count as words there ("normal"
as no), "exact match" is a precision, and a class without a question divides by zero (an error here,
with the reason). Ours compares words, says what it compared, and gives intervals.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from medley.errors import UserError
from medley.evaluation.intervals import Interval, mean_interval, share_interval
from medley.evaluation.words import counted, normalise

Compat = Literal["none", "run_eval", "run_eval_batch"]
_WEIGHTS = {
    "bleu_score": (0.25, 0.25, 0.25, 0.25), "bleu_score_1": (1, 0, 0, 0),
    "bleu_score_2": (0, 1, 0, 0), "bleu_score_3": (0, 0, 1, 0),
}  # fmt: skip
OPEN, CLOSED = "OPEN", "CLOSED"


@dataclass(frozen=True)
class Case:
    """A question with its right answer and the one that was given; `fields` of its record."""

    identifier: Any
    question: str
    gold: str
    answer: str
    kind: str
    image: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


# --- measures of one answer, of texts that are normalised ---------------------------------------


def exact_match(answer: str, gold: str) -> float:
    """Distinct words of the gold answer that were given, over all words that were: the published
    "exact match", which is a precision. 0 for an empty answer."""
    said = counted(answer)
    return sum(1 for word in counted(gold) if word in said) / said.total() if said else 0.0


def f1(answer: str, gold: str) -> tuple[float, float, float]:
    """F1, precision and recall over words; counts of the answer are right where the gold answer has
    the word at all. All are 0 where nothing agrees."""
    said, wanted = counted(answer), counted(gold)
    right = sum(count for word, count in said.items() if word in wanted)
    wrong = said.total() - right
    missed = sum(count for word, count in wanted.items() if word not in said)
    if not right:
        return 0.0, 0.0, 0.0
    precision, recall = right / (right + wrong), right / (right + missed)
    return 2 * precision * recall / (precision + recall), precision, recall


def likeness(answer: str, candidate: str) -> float:
    """Share of a candidate's distinct words that were given."""
    own, said = counted(candidate), counted(answer)
    return sum(1 for word in own if word in said) / len(own) if own else 0.0


def likeliest(answer: str, candidates: Sequence[Any]) -> str:
    """The first of the candidates that are most alike, also where none is alike at all."""
    if not candidates:
        raise UserError(
            "the candidates are empty: run_eval needs the open answers of the train set"
        )
    texts = [normalise(str(candidate).lower(), True) for candidate in candidates]
    return max(texts, key=lambda text: likeness(answer, text))


def bleu(answer: str, gold: str, weights: tuple[float, ...]) -> float:
    """BLEU of one sentence by nltk, unsmoothed."""
    score = _nltk()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that n-grams without a match give nearly nothing
        return float(score([gold.split()], answer.split(), weights=weights))


@cache
def _nltk() -> Callable[..., Any]:
    try:
        from nltk.translate.bleu_score import (  # type: ignore[import-untyped]  # has none
            sentence_bleu,
        )
    except ImportError as error:
        raise UserError("BLEU needs nltk: pip install 'medley-mm[evaluate]'") from error
    found: Callable[..., Any] = sentence_bleu
    return found


# --- the published scorers ----------------------------------------------------------------------


def published_scores(
    cases: Sequence[Case], compat: Compat, candidates: Sequence[Any] | None
) -> dict[str, float]:
    """LLaVA-Med's table in percent. Raises UserError where the published code would divide by zero,
    or needs candidates."""
    sums: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for case in cases:
        answer, gold = (normalise(text.lower(), True) for text in (case.answer, case.gold))
        if case.kind == OPEN:
            counts[OPEN] += 1
            # The published measures normalise what is normalised already.
            again = [normalise(text, True) for text in (answer, gold)]
            sums["exact match score"] += exact_match(*again)
            scores = f1(*again)
            for name, value in zip(("f1 score", "precision", "recall"), scores, strict=True):
                sums[name] += value
            for name, weights in _WEIGHTS.items():
                sums[name] += bleu(answer, gold, weights)
            if compat == "run_eval":
                if candidates is None:
                    raise UserError("--compat run_eval needs --candidate, a file of open answers")
                sums["open accuracy"] += float(likeliest(again[0], candidates) == again[1])
            else:
                sums["open accuracy"] += gold in answer
        elif case.kind == CLOSED:
            counts[CLOSED] += 1
            says = "yes" in answer or "no" in answer
            right = gold in answer
            sums["yes/no accuracy"] += (says and right) if compat == "run_eval" else right
            sums["recall_closed"] += f1(normalise(answer, True), normalise(gold, True))[2]
    for kind in (OPEN, CLOSED):
        if not counts[kind] and not (kind == CLOSED and compat == "run_eval"):
            raise UserError(f"no question is {kind}: the published scorer divides by zero there")
    opens = ["exact match score", "f1 score", "precision", "recall", *_WEIGHTS, "open accuracy"]
    table = {name: 100 * sums[name] / counts[OPEN] for name in opens}
    table["yes/no accuracy"] = 100 * sums["yes/no accuracy"] / max(counts[CLOSED], 1)
    if compat == "run_eval_batch":
        table["recall_closed"] = 100 * sums["recall_closed"] / counts[CLOSED]
    return table


# --- ours ---------------------------------------------------------------------------------------

_YES = re.compile(r"\byes\b|是|^对|有", re.IGNORECASE)
_NO = re.compile(r"\bno\b|不是|否|没有|^不", re.IGNORECASE)


def yes_or_no(text: str) -> str | None:
    """`yes` or `no`, as whole words (Chinese, too); None for neither or both."""
    without_no = _NO.sub(" ", text)
    yes, no = _YES.search(without_no) is not None, _NO.search(text) is not None
    if yes == no:
        return None
    return "yes" if yes else "no"


def is_right(case: Case) -> bool:
    """Whether a closed question has the right answer: the same yes or no, or the gold words, in
    their order, among those that were given. An open one, whether its words are the gold ones."""
    gold, answer = normalise(case.gold.lower()), normalise(case.answer.lower())
    if case.kind == CLOSED:
        wanted = yes_or_no(gold)
        if wanted is not None and len(gold.split()) == 1:
            return yes_or_no(answer) == wanted
        return bool(gold) and f" {gold} " in f" {answer} "
    return gold == answer


def recall(case: Case) -> float:
    return f1(normalise(case.answer.lower()), normalise(case.gold.lower()))[2]


def f1_of(case: Case) -> float:
    return f1(normalise(case.answer.lower()), normalise(case.gold.lower()))[0]


def own_scores(cases: Sequence[Case], seed: int = 0) -> dict[str, Any]:
    """Accuracies, recall and F1 in percent, each with n and a 95 % interval (Wilson's for shares, a
    bootstrap's for means), of all questions and of each group of their records."""
    groups: dict[str, dict[str, Any]] = {"all": _scores_of(cases, seed)}
    for name in grouping_fields(cases):
        for value in sorted({str(case.fields.get(name, "")) for case in cases}):
            own = [case for case in cases if str(case.fields.get(name, "")) == value]
            groups[f"{name}: {value}"] = _scores_of(own, seed)
    return groups


def _scores_of(cases: Sequence[Case], seed: int) -> dict[str, Any]:
    closed = [case for case in cases if case.kind == CLOSED]
    opened = [case for case in cases if case.kind != CLOSED]
    found: dict[str, Interval] = {}
    if closed:
        found["closed accuracy"] = share_interval(sum(map(is_right, closed)), len(closed))
        found["closed: always the commonest"] = share_interval(*commonest(closed))
    if opened:
        found["open exact match"] = share_interval(sum(map(is_right, opened)), len(opened))
        found["open recall"] = mean_interval([recall(case) for case in opened], seed)
        found["open f1"] = mean_interval([f1_of(case) for case in opened], seed)
        found["open: always the commonest"] = share_interval(*commonest(opened))
    unclear = sum(yes_or_no(c.answer) is None for c in closed if yes_or_no(c.gold) is not None)
    return {
        "n": len(cases), "closed": len(closed), "open": len(opened),
        "closed answers that are neither yes nor no, or both": unclear,
        **{name: interval.percent() for name, interval in found.items()},
    }  # fmt: skip


def commonest(cases: Sequence[Case]) -> tuple[int, int]:
    """How many answers are right for somebody who always gives the commonest one."""
    golds = Counter(normalise(case.gold.lower()) for case in cases)
    return max(golds.values()), len(cases)


def grouping_fields(cases: Sequence[Case]) -> list[str]:
    """Values of the records that tell groups apart: a few different texts, in most records."""
    names = Counter(n for case in cases for n, v in case.fields.items() if isinstance(v, str))
    return [
        name for name, count in sorted(names.items())
        if name not in ("id", "image", "source", "task", "answer_type", "split")
        and count > len(cases) / 2
        and 2 <= len({str(case.fields.get(name, "")) for case in cases}) <= 40
    ]  # fmt: skip
