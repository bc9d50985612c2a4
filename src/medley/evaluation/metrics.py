"""Word-overlap metrics of one answer. The texts are normalized already."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from medley.evaluation.vqa_normalize import count_words
from medley.utils.extras import require_extra


def exact_match(answer: str, gold: str) -> float:
    """The published "exact match", which is a precision; 0 for an empty answer.

    It is the number of distinct gold words in the answer over the number of words in the answer.
    """
    words = count_words(answer)
    return sum(1 for word in count_words(gold) if word in words) / words.total() if words else 0.0


def f1(answer: str, gold: str) -> tuple[float, float, float]:
    """F1, precision and recall over words; all are 0 without a common word.

    Every occurrence in the answer of a word that the gold answer has counts as correct.
    """
    words, gold_words = count_words(answer), count_words(gold)
    correct = sum(count for word, count in words.items() if word in gold_words)
    wrong = words.total() - correct
    missed = sum(count for word, count in gold_words.items() if word not in words)
    if not correct:
        return 0.0, 0.0, 0.0
    precision, recall = correct / (correct + wrong), correct / (correct + missed)
    return 2 * precision * recall / (precision + recall), precision, recall


def word_recall(answer: str, candidate: str) -> float:
    """The fraction of a candidate's distinct words that the answer has."""
    words = set(candidate.split())
    return len(words.intersection(answer.split())) / len(words) if words else 0.0


def bleu(answer: str, gold: str, weights: tuple[float, ...]) -> float:
    """nltk's sentence BLEU without smoothing."""
    sentence_bleu = _import_sentence_bleu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns if an n-gram order has no match.
        return float(sentence_bleu([gold.split()], answer.split(), weights=weights))


@cache
def _import_sentence_bleu() -> Callable[..., Any]:
    require_extra("nltk", "evaluate", "BLEU")
    from nltk.translate.bleu_score import sentence_bleu  # type: ignore[import-untyped]

    function: Callable[..., Any] = sentence_bleu
    return function
