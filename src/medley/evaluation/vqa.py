"""Our scores of visual questions: words are compared as words, every figure has its n and interval.

LLaVA-Med's published ones are in `published.py`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from medley.evaluation.cases import Example, ScoredExample
from medley.evaluation.matching import (
    contains_words,
    is_yes_or_no,
    same_answer,
    words_of,
    yes_or_no,
)
from medley.evaluation.metrics import f1
from medley.evaluation.questions import CLOSED
from medley.evaluation.report import measures_of
from medley.evaluation.science_qa import FAILED, LETTERS, parsed_letter

_MOST_VALUES = 40  # of a record's value that tells groups apart
UNCLEAR = "neither"  # of the answers that can be right, or several


def choice_of(case: Example) -> tuple[str, str] | None:
    """(right, given) of a closed question that offers yes and no, or letters; `neither` for an
    answer that names none of them, or several. None for any other question."""
    if case.kind != CLOSED:
        return None
    gold = case.gold.strip().rstrip(".")
    if len(gold) == 1 and gold in LETTERS:
        given = parsed_letter(case.answer)
        return gold, given if given != FAILED else UNCLEAR
    wanted = is_yes_or_no(gold)
    return None if wanted is None else (wanted, yes_or_no(case.answer) or UNCLEAR)


def is_right(case: Example) -> bool:
    """Whether a closed question has the right answer: the same letter, the same yes or no, or the
    gold words, in their order, among those that were given. An open one, whether its words are the
    gold ones."""
    if (choice := choice_of(case)) is not None:
        return choice[0] == choice[1]
    same = contains_words if case.kind == CLOSED else same_answer
    return same(case.answer, case.gold)


def score(case: Example) -> ScoredExample:
    right = float(is_right(case))
    if case.kind == CLOSED:
        return ScoredExample(case, {"right": right, "closed accuracy": right})
    value, _, recall = f1(" ".join(words_of(case.answer)), " ".join(words_of(case.gold)))
    return ScoredExample(
        case, {"right": right, "open exact match": right, "open recall": recall, "open f1": value}
    )


def own_scores(cases: Sequence[ScoredExample], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Accuracies, recall and F1 in percent, each with n and a 95 % interval, of all questions and
    of each group of their records."""
    groups = {"all": _scores_of(cases, seed)}
    for name in grouping_fields([one.case for one in cases]):
        for value in sorted({str(one.case.fields.get(name, "")) for one in cases}):
            own = [one for one in cases if str(one.case.fields.get(name, "")) == value]
            groups[f"{name}: {value}"] = _scores_of(own, seed)
    return groups


def _scores_of(cases: Sequence[ScoredExample], seed: int) -> dict[str, Any]:
    closed = sum(one.case.kind == CLOSED for one in cases)
    choices = [choice_of(one.case) for one in cases]
    unclear = sum(choice is not None and choice[1] == UNCLEAR for choice in choices)
    return {
        "n": len(cases), "closed": closed, "open": len(cases) - closed,
        "closed answers that name none of the choices, or several": unclear,
        **measures_of(cases, seed),
    }  # fmt: skip


def grouping_fields(cases: Sequence[Example]) -> list[str]:
    """Values of the records that tell groups apart: a few different texts, in most records."""
    names = Counter(n for case in cases for n, v in case.fields.items() if isinstance(v, str))
    return [
        name for name, count in sorted(names.items())
        if name not in ("source", "split", "task", "answer_type")
        and count > len(cases) / 2
        and 2 <= len({str(case.fields.get(name, "")) for case in cases}) <= _MOST_VALUES
    ]  # fmt: skip


def confusion(cases: Sequence[Example]) -> dict[str, dict[str, int]]:
    """Right answer -> given answer -> how often, of the closed questions that offer choices."""
    pairs = Counter(choice for case in cases if (choice := choice_of(case)) is not None)
    columns = sorted({given for _, given in pairs} | {gold for gold, _ in pairs})
    return {
        gold: {given: pairs[gold, given] for given in columns}
        for gold in sorted({gold for gold, _ in pairs})
    }


# --- what somebody scores who does not look -----------------------------------------------------


def majority_baseline(cases: Sequence[Example]) -> list[Example]:
    """The same questions, each answered with the commonest right answer of its kind."""
    golds: dict[str, Counter[str]] = {}
    written: dict[str, str] = {}  # as it stands in the file, for one that is written in two ways
    for case in cases:
        gold = case.gold.strip()
        golds.setdefault(case.kind, Counter())[gold.lower()] += 1
        written.setdefault(gold.lower(), gold)
    usual = {kind: written[counts.most_common(1)[0][0]] for kind, counts in golds.items()}
    return [replace(case, answer=usual[case.kind]) for case in cases]


def random_baseline(cases: Sequence[Example], seed: int) -> list[Example]:
    """The same questions, each answered with a right answer of its kind that was drawn."""
    golds: dict[str, list[str]] = {}
    for case in cases:
        golds.setdefault(case.kind, []).append(case.gold)
    choice = random.Random(seed).choice
    return [replace(case, answer=choice(golds[case.kind])) for case in cases]
