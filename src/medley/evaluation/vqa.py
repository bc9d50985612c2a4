"""Our own VQA scores: word-level comparison, with sample sizes, intervals and baselines.

LLaVA-Med's published scores are in `reference_scorers.py`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from medley.evaluation.choice_letters import find_letter, listed_choices, valid_letters
from medley.evaluation.examples import Example, ScoredExample
from medley.evaluation.matching import (
    answer_text,
    contains_words,
    same_answer,
    split_words,
)
from medley.evaluation.metrics import f1
from medley.evaluation.questions import CLOSED
from medley.evaluation.reference_scorers import Compat, published_scores
from medley.evaluation.report import (
    Cell,
    Table,
    aggregate_scores,
    confusion_table,
    groups_tables,
    is_metric,
    metrics_table,
)
from medley.evaluation.yes_no import (
    find_gold_verb,
    find_normality,
    find_yes_no,
    gold_normality,
    gold_yes_no,
)

_MAX_GROUPS = 40  # distinct values of a field that examples are grouped by
UNCLEAR = "neither"  # an answer that has none of the choices, or several
MAJORITY, RANDOM = "majority baseline", "random baseline"


def parse_choice(example: Example) -> tuple[str, str] | None:
    """(gold, answered) of a closed question about yes and no or letters; None for any other.

    An answer with none of the choices, or with several, gives `neither`. The rules are in
    docs/evaluation-rules.md.
    """
    if example.kind != CLOSED:
        return None
    gold, choices = example.gold.strip().rstrip("."), known_choices(example)
    if len(gold) == 1 and gold in valid_letters(choices):
        return gold, find_letter(example.answer, choices) or UNCLEAR
    if (normality := gold_normality(gold)) is not None:
        return normality, find_normality(example.answer, example.question) or UNCLEAR
    gold_choice = gold_yes_no(gold)
    if gold_choice is None:
        return None
    answered = find_yes_no(example.answer) or find_gold_verb(example.answer, gold)
    return gold_choice, answered or UNCLEAR


def known_choices(example: Example) -> tuple[str, ...]:
    """The choices of a question: of its record, else listed in its text; empty if unknown."""
    choices = example.fields.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
        return tuple(choices)
    return listed_choices(example.question)


def is_correct(example: Example) -> bool:
    """Whether an answer is correct.

    For a closed question: the same letter, the same yes or no, or an answer that contains the gold
    words in sequence. For an open question: the same words.
    """
    if (choice := parse_choice(example)) is not None:
        return choice[0] == choice[1]
    if example.kind != CLOSED:
        return same_answer(example.answer, example.gold)
    if contains_words(example.answer, example.gold):
        return True
    choices = known_choices(example)
    same = [same_answer(choice, example.gold) for choice in choices]
    letter = find_letter(example.answer, choices)
    return letter is not None and sum(same) == 1 and letter == ascii_uppercase[same.index(True)]


def score_example(example: Example) -> ScoredExample:
    correct = float(is_correct(example))
    if example.kind == CLOSED:
        return ScoredExample(example, {"correct": correct, "closed accuracy": correct})
    words, gold_words = split_words(answer_text(example.answer)), split_words(example.gold)
    f1_score, _, recall = f1(" ".join(words), " ".join(gold_words))
    scores = {
        "correct": correct, "open exact match": correct, "open recall": recall, "open f1": f1_score,
    }  # fmt: skip
    return ScoredExample(example, scores)


def score_groups(scored: Sequence[ScoredExample], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Accuracies, recall and F1 in percent, each with n and a 95% interval.

    The groups are `all` and `FIELD: VALUE` for the values of the records' fields.
    """
    groups = {"all": _score_group(scored, seed)}
    for field in grouping_fields([one.example for one in scored]):
        for value in sorted({str(one.example.fields.get(field, "")) for one in scored}):
            own = [one for one in scored if str(one.example.fields.get(field, "")) == value]
            groups[f"{field}: {value}"] = _score_group(own, seed)
    return groups


def _score_group(scored: Sequence[ScoredExample], seed: int) -> dict[str, Any]:
    closed = sum(one.example.kind == CLOSED for one in scored)
    choices = [parse_choice(one.example) for one in scored]
    unclear = sum(choice is not None and choice[1] == UNCLEAR for choice in choices)
    return {
        "n": len(scored), "closed": closed, "open": len(scored) - closed,
        "closed answers with none of the choices, or with several": unclear,
        **aggregate_scores(scored, seed),
    }  # fmt: skip


def grouping_fields(examples: Sequence[Example]) -> list[str]:
    """Text fields that most records have and whose few different values form groups."""
    counts = Counter(
        name for e in examples for name, value in e.fields.items() if isinstance(value, str)
    )
    return [
        name for name, count in sorted(counts.items())
        if name not in ("source", "split", "task", "answer_type")
        and count > len(examples) / 2
        and 2 <= len({str(e.fields.get(name, "")) for e in examples}) <= _MAX_GROUPS
    ]  # fmt: skip


def confusion_matrix(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """Gold choice -> answered choice -> count, over the closed questions with choices."""
    pairs = Counter(choice for e in examples if (choice := parse_choice(e)) is not None)
    columns = sorted({answered for _, answered in pairs} | {gold for gold, _ in pairs})
    return {
        gold: {answered: pairs[gold, answered] for answered in columns}
        for gold in sorted({gold for gold, _ in pairs})
    }


# --- image-blind baselines ----------------------------------------------------------------------


def majority_baseline(examples: Sequence[Example]) -> list[Example]:
    """The same questions, each with the most frequent gold answer of its kind."""
    counts: dict[str, Counter[str]] = {}
    spelling: dict[str, str] = {}  # the first spelling of each answer in the file
    for example in examples:
        gold = example.gold.strip()
        counts.setdefault(example.kind, Counter())[gold.lower()] += 1
        spelling.setdefault(gold.lower(), gold)
    majority = {kind: spelling[own.most_common(1)[0][0]] for kind, own in counts.items()}
    return [replace(example, answer=majority[example.kind]) for example in examples]


def random_baseline(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same questions, each with a randomly sampled gold answer of its kind."""
    golds: dict[str, list[str]] = {}
    for example in examples:
        golds.setdefault(example.kind, []).append(example.gold)
    choice = random.Random(seed).choice
    return [replace(example, answer=choice(golds[example.kind])) for example in examples]


# --- all scores of an answer file ---------------------------------------------------------------


def compute_scores(
    scored: Sequence[ScoredExample],
    compat: Sequence[Compat] = (),
    candidates: Sequence[Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Our scores and the published ones, for the answers and for image-blind baselines."""
    examples = [one.example for one in scored]

    def published(own: Sequence[Example]) -> dict[str, Any]:
        return {name: published_scores(own, name, candidates) for name in compat}

    baselines = {
        MAJORITY: majority_baseline(examples), RANDOM: random_baseline(examples, seed),
    }  # fmt: skip
    return {
        "evaluation": "vqa", "scores": score_groups(scored, seed), **published(examples),
        "confusion": confusion_matrix(examples),
        "baselines": {
            name: {"scores": score_groups([score_example(e) for e in own], seed)["all"],
                   **published(own)}
            for name, own in baselines.items()
        },
    }  # fmt: skip


def only_metrics(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores without counts."""
    return {name: value for name, value in scores.items() if is_metric(value)}


def report_tables(values: Mapping[str, Any]) -> list[Table]:
    """The tables of `compute_scores`."""
    groups, baselines = values["scores"], values["baselines"]
    columns = {name: own["scores"] for name, own in baselines.items()}
    text = "The last columns are image-blind baselines. A useful score is above them."
    tables = [metrics_table("All questions", groups["all"], columns, text)]
    for name in ("run_eval", "run_eval_batch"):
        if name in values:
            rows = [
                [Cell(metric), Cell(f"{value:.4f}"),
                 *(Cell(f"{own[name][metric]:.4f}") for own in baselines.values())]
                for metric, value in values[name].items()
            ]  # fmt: skip
            title = f"Published scores ({name}), in percent"
            tables.append(Table(title, ("", "this file", *baselines), rows))
    if values["confusion"]:
        tables.append(confusion_table(values["confusion"]))
    return tables + groups_tables(groups)
