"""LLaVA-Med's two published scorers of visual questions, bug for bug.

Substrings count as words there ("normal" as no), and "exact match" is a precision.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from medley.errors import UserError
from medley.evaluation.cases import Example
from medley.evaluation.metrics import bleu, exact_match, f1, word_recall
from medley.evaluation.questions import CLOSED, OPEN
from medley.evaluation.vqa_normalize import normalise

Compat = Literal["run_eval", "run_eval_batch"]
_WEIGHTS = {
    "bleu_score": (0.25, 0.25, 0.25, 0.25), "bleu_score_1": (1, 0, 0, 0),
    "bleu_score_2": (0, 1, 0, 0), "bleu_score_3": (0, 0, 1, 0),
}  # fmt: skip


def nearest_candidate(answer: str, candidates: Sequence[str]) -> str:
    """The first of the normalised candidates that are most alike, also where none is alike at all.

    Raises UserError for none of them.
    """
    if not candidates:
        raise UserError(
            "the candidates are empty: run_eval needs the open answers of the train set"
        )
    return max(candidates, key=lambda text: word_recall(answer, text))


def normalised(candidates: Sequence[Any]) -> list[str]:
    """Candidates as `nearest_candidate` compares them, each once: only the first of equals can win."""
    return list(dict.fromkeys(normalise(str(c).lower(), True) for c in candidates))


def published_scores(
    cases: Sequence[Example], compat: Compat, candidates: Sequence[Any] | None
) -> dict[str, float]:
    """LLaVA-Med's table in percent, without the rows of a class that has no question, by which the
    published code divides. It knows OPEN and CLOSED alone: other kinds of a record are left out.

    Raises UserError where candidates are needed.
    """
    texts = None if candidates is None else normalised(candidates)
    sums: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for case in (case for case in cases if is_known(case)):
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
                if texts is None:
                    raise UserError("--compat run_eval needs --candidate, a file of open answers")
                sums["open accuracy"] += float(nearest_candidate(again[0], texts) == again[1])
            else:
                sums["open accuracy"] += gold in answer
        elif case.kind == CLOSED:
            counts[CLOSED] += 1
            says = "yes" in answer or "no" in answer
            right = gold in answer
            sums["yes/no accuracy"] += (says and right) if compat == "run_eval" else right
            sums["recall_closed"] += f1(normalise(answer, True), normalise(gold, True))[2]
    opens = ["exact match score", "f1 score", "precision", "recall", *_WEIGHTS, "open accuracy"]
    table = {name: 100 * sums[name] / counts[OPEN] for name in opens if counts[OPEN]}
    if counts[CLOSED] or compat == "run_eval":
        table["yes/no accuracy"] = 100 * sums["yes/no accuracy"] / max(counts[CLOSED], 1)
    if counts[CLOSED] and compat == "run_eval_batch":
        table["recall_closed"] = 100 * sums["recall_closed"] / counts[CLOSED]
    return table


def is_known(case: Example) -> bool:
    """Whether the published code scores a case: by its record's own word, if it has one."""
    said = case.fields.get("answer_type", case.kind)
    return str(said).strip().upper() in (OPEN, CLOSED)


def published_table(scores: dict[str, float]) -> str:
    """The table that LLaVA-Med prints."""
    try:
        from tabulate import tabulate  # type: ignore[import-untyped]  # has none
    except ImportError as error:
        raise UserError(
            "the published table needs tabulate: pip install 'medley-mm[evaluate]'"
        ) from error
    rows = [[name, value] for name, value in scores.items()]
    return str(tabulate(rows, headers=["Metric", "Performance"]))
