"""How well words agree: measures of one answer, of texts that are normalised."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from medley.errors import UserError
from medley.evaluation.vqa_normalize import counted


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


def word_recall(answer: str, candidate: str) -> float:
    """Share of a candidate's distinct words that were given."""
    own = set(candidate.split())
    return len(own.intersection(answer.split())) / len(own) if own else 0.0


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
