"""LLaVA-Med's two published VQA scorers, reproduced exactly, including their bugs.

They match substrings, so "normal" counts as "no", and their "exact match" is a precision.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from medley.errors import UserError
from medley.evaluation.examples import Example
from medley.evaluation.metrics import bleu, exact_match, f1, word_recall
from medley.evaluation.questions import CLOSED, OPEN
from medley.evaluation.vqa_normalize import normalize_text
from medley.utils.extras import require_extra

Compat = Literal["run_eval", "run_eval_batch"]
BLEU_WEIGHTS = {
    "bleu_score": (0.25, 0.25, 0.25, 0.25), "bleu_score_1": (1, 0, 0, 0),
    "bleu_score_2": (0, 1, 0, 0), "bleu_score_3": (0, 0, 1, 0),
}  # fmt: skip


def require_packages() -> None:
    """Raises UserError if a package that the published scorers need is missing."""
    require_extra("nltk", "evaluate", "--compat")
    require_extra("tabulate", "evaluate", "--compat")


def nearest_candidate(answer: str, candidates: Sequence[str]) -> str:
    """The first normalized candidate with the highest word recall, also if that recall is 0.

    Raises UserError without candidates.
    """
    if not candidates:
        raise UserError(
            "--candidate: The list is empty. run_eval needs the open answers of the training set."
        )
    return max(candidates, key=lambda candidate: word_recall(answer, candidate))


def normalize_candidates(candidates: Sequence[Any]) -> list[str]:
    """Candidates as `nearest_candidate` compares them, without duplicates: the first one wins."""
    return list(dict.fromkeys(normalize_text(str(c).lower(), True) for c in candidates))


def published_scores(
    examples: Sequence[Example], compat: Compat, candidates: Sequence[Any] | None
) -> dict[str, float]:
    """LLaVA-Med's table, in percent.

    The published code divides by zero if a question type has no question; its rows are left out
    here. Examples whose record has a type other than OPEN and CLOSED are ignored. Raises UserError
    if the candidates are missing.
    """
    normalized = None if candidates is None else normalize_candidates(candidates)
    sums: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for example in filter(has_published_kind, examples):
        answer, gold = (normalize_text(t.lower(), True) for t in (example.answer, example.gold))
        if example.kind == OPEN:
            counts[OPEN] += 1
            # The published metrics normalize the normalized texts again.
            answer_twice, gold_twice = (normalize_text(text, True) for text in (answer, gold))
            sums["exact match score"] += exact_match(answer_twice, gold_twice)
            values = f1(answer_twice, gold_twice)
            for name, value in zip(("f1 score", "precision", "recall"), values, strict=True):
                sums[name] += value
            for name, weights in BLEU_WEIGHTS.items():
                sums[name] += bleu(answer, gold, weights)
            if compat == "run_eval":
                if normalized is None:
                    raise UserError(
                        "--compat run_eval needs --candidate, a file with the open answers of the "
                        "training set."
                    )
                nearest = nearest_candidate(answer_twice, normalized)
                sums["open accuracy"] += float(nearest == gold_twice)
            else:
                sums["open accuracy"] += gold in answer
        elif example.kind == CLOSED:
            counts[CLOSED] += 1
            has_yes_no = "yes" in answer or "no" in answer
            correct = gold in answer
            sums["yes/no accuracy"] += (has_yes_no and correct) if compat == "run_eval" else correct
            recall = f1(normalize_text(answer, True), normalize_text(gold, True))[2]
            sums["recall_closed"] += recall
    open_names = ["exact match score", "f1 score", "precision", "recall", *BLEU_WEIGHTS,
                  "open accuracy"]  # fmt: skip
    table = {name: 100 * sums[name] / counts[OPEN] for name in open_names if counts[OPEN]}
    if counts[CLOSED] or compat == "run_eval":
        table["yes/no accuracy"] = 100 * sums["yes/no accuracy"] / max(counts[CLOSED], 1)
    if counts[CLOSED] and compat == "run_eval_batch":
        table["recall_closed"] = 100 * sums["recall_closed"] / counts[CLOSED]
    return table


def has_published_kind(example: Example) -> bool:
    """Whether the published code scores an example: its record's own type is OPEN or CLOSED."""
    kind = example.fields.get("answer_type", example.kind)
    return str(kind).strip().upper() in (OPEN, CLOSED)


def published_table(scores: Mapping[str, float]) -> str:
    """The table that LLaVA-Med prints."""
    require_extra("tabulate", "evaluate", "--compat")
    from tabulate import tabulate  # type: ignore[import-untyped]

    rows = [[name, value] for name, value in scores.items()]
    return str(tabulate(rows, headers=["Metric", "Performance"]))
