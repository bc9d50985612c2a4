"""Metrics of classification by scikit-learn and torchmetrics, thresholds, bootstrap intervals.

A metric is a number, or the reason why it is undefined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medley.errors import UserError
from medley.evaluation.classification import Task
from medley.utils.extras import require_extra

Criterion = Literal["youden", "accuracy", "f1"]
Metrics = dict[str, float | str]
BINS = 10  # of the calibration error and the reliability diagram
NO_PROBABILITIES = "the answers have no probabilities"
PROBABILITY_METRICS = ("AUROC", "average precision", "Brier score", "ECE")


def require_packages() -> None:
    for module in ("sklearn", "torchmetrics"):
        require_extra(module, "evaluate", "evaluate classification")


# --- thresholds ---------------------------------------------------------------------------


def choose_threshold(task: Task, index: int, criterion: Criterion) -> float:
    """The probability of class `index` from which on it is the answer, chosen on a validation task.

    Among the thresholds between the answers' probabilities, the best one by Youden's J
    (sensitivity + specificity - 1), by accuracy or by F1; of equal ones the middle one. Raises
    UserError if the task lacks probabilities, or examples with or without the class.
    """
    from sklearn.metrics import roc_curve  # type: ignore[import-untyped]

    where = f"--val_pred: {task.name}: " if task.name else "--val_pred: "
    if not task.scored.any():
        raise UserError(f"{where}The answers have no probabilities, which a threshold needs.")
    truth = (task.gold == index)[task.scored]
    values = task.probabilities[task.scored, index]
    if truth.all() or not truth.any():
        missing = "other than" if truth.all() else "of"
        raise UserError(
            f"{where}The validation split has no example {missing} {task.classes[index]!r}, which "
            "a threshold needs."
        )
    false_rate, true_rate, thresholds = roc_curve(truth, values, drop_intermediate=False)
    positives, negatives = truth.sum(), (~truth).sum()
    hits, false_hits = true_rate * positives, false_rate * negatives
    quality = {
        "youden": true_rate - false_rate,
        "accuracy": (hits + negatives - false_hits) / len(truth),
        "f1": 2 * hits / (hits + false_hits + positives),
    }[criterion]
    best = np.flatnonzero(np.isclose(quality, quality.max(), rtol=0, atol=1e-12))
    chosen = int(best[len(best) // 2])
    # Halfway to the next lower probability, since other answers lie between the two.
    upper = 1.0 if np.isinf(thresholds[chosen]) else float(thresholds[chosen])
    lower = float(thresholds[chosen + 1]) if chosen + 1 < len(thresholds) else 0.0
    if np.isinf(thresholds[chosen]) and lower >= 1.0:
        return float(np.nextafter(1.0, 2.0))  # no answer is positive
    middle = (upper + lower) / 2
    return middle if middle > lower else upper


def decide(task: Task, thresholds: Mapping[int, float] | None) -> NDArray[np.int64]:
    """The decided class of each answer (N); -1 for neither.

    With a positive class and its threshold, the threshold decides between the two classes; else
    the most probable class is the decision.
    """
    if task.positive is None or not thresholds:
        return task.predicted
    is_positive = task.probabilities[:, task.positive] >= thresholds[task.positive]
    decided = np.where(is_positive, task.positive, 1 - task.positive)
    return np.where(task.scored, decided, task.predicted)


# --- metrics ------------------------------------------------------------------------------


def compute_metrics(task: Task, thresholds: Mapping[int, float] | None = None) -> Metrics:
    """All metrics of a task.

    Accuracy, balanced accuracy, F1, sensitivity and specificity are about all questions; the others
    about the answers with probabilities. With more than two classes, F1, AUROC and average
    precision are means over the classes, each against the rest.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    decided = decide(task, thresholds)
    _, recalls, f1, _ = precision_recall_fscore_support(
        task.gold, decided, labels=range(len(task.classes)), average=None, zero_division=np.nan
    )
    metrics: Metrics = {
        "accuracy": float(accuracy_score(task.gold, decided)),
        "balanced accuracy": float(np.nanmean(recalls)),
    }
    if task.positive is None:
        # A class without examples that no answer names has 0, as in scikit-learn's mean.
        return metrics | {"F1": float(np.nan_to_num(f1).mean())} | _probability_metrics(task)
    positive, negative = task.positive, 1 - task.positive
    has_positive = bool((task.gold == positive).any())
    metrics["F1"] = float(f1[positive]) if has_positive else _no_example(task, positive)
    for name, index in (("sensitivity", positive), ("specificity", negative)):
        recall = float(recalls[index])
        metrics[name] = _no_example(task, index) if np.isnan(recall) else recall
    return metrics | _probability_metrics(task)


def _no_example(task: Task, index: int) -> str:
    return f"no example of {task.classes[index]!r}"


def _probability_metrics(task: Task) -> Metrics:
    if not task.scored.any():
        return dict.fromkeys(PROBABILITY_METRICS, NO_PROBABILITIES)
    scored = task if task.scored.all() else task.take(task.scored)
    if task.positive is not None:
        return rank_metrics(scored, task.positive) | _calibration_metrics(scored)
    ranks = [rank_metrics(scored, index) for index in range(len(task.classes))]
    return {
        name: mean_of([own[name] for own in ranks]) for name in PROBABILITY_METRICS[:2]
    } | _calibration_metrics(scored)


def mean_of(values: Sequence[float | str]) -> float | str:
    """The mean of the defined values, else the first reason."""
    defined = [value for value in values if not isinstance(value, str)]
    return float(np.mean(defined)) if defined else values[0]


def rank_metrics(task: Task, index: int) -> Metrics:
    """AUROC and average precision of a class against the rest, by the answers' probabilities."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth, values = task.gold == index, task.probabilities[:, index]
    if not truth.any():
        return dict.fromkeys(PROBABILITY_METRICS[:2], _no_example(task, index))
    precision = float(average_precision_score(truth, values))
    if truth.all():
        other = f"no example other than {task.classes[index]!r}"
        return {"AUROC": other, "average precision": precision}
    return {"AUROC": float(roc_auc_score(truth, values)), "average precision": precision}


def _calibration_metrics(task: Task) -> Metrics:
    """The Brier score, and the expected calibration error in equal bins.

    Of two classes, both are about the probability of the positive one; of several, the error is
    about the most probable class (Guo et al. 2017).
    """
    import torch
    from sklearn.metrics import brier_score_loss
    from torchmetrics.functional import classification as functional

    gold = torch.from_numpy(task.gold)
    if task.positive is not None:
        truth = task.gold == task.positive
        values = np.ascontiguousarray(task.probabilities[:, task.positive])
        brier = brier_score_loss(truth, values, pos_label=True, labels=[False, True])
        error = functional.binary_calibration_error(
            torch.from_numpy(values), (gold == task.positive).long(), BINS, validate_args=False
        )
    else:
        count = len(task.classes)
        brier = brier_score_loss(task.gold, task.probabilities, labels=range(count))
        error = functional.multiclass_calibration_error(
            torch.from_numpy(task.probabilities), gold, count, BINS, validate_args=False
        )
    return {"Brier score": float(brier), "ECE": float(error)}


def class_metrics(task: Task, index: int, thresholds: Mapping[int, float] | None = None) -> Metrics:
    """Metrics of one of several classes against the rest.

    Sensitivity and specificity are about the class's own threshold, else about the decisions.
    """
    from sklearn.metrics import f1_score, recall_score

    truth = task.gold == index
    decided = task.predicted == index
    if thresholds:
        decided = np.where(task.scored, task.probabilities[:, index] >= thresholds[index], decided)
    metrics: Metrics = {}
    other = f"no example other than {task.classes[index]!r}"
    for name, value, reason in (
        ("sensitivity", True, _no_example(task, index)), ("specificity", False, other),
    ):  # fmt: skip
        has_any = bool((truth == value).any())
        recall = recall_score(truth, decided, pos_label=value, zero_division=0.0)
        metrics[name] = float(recall) if has_any else reason
    f1 = f1_score(truth, decided, zero_division=0.0)
    metrics["F1"] = float(f1) if truth.any() else _no_example(task, index)
    if not task.scored.any():
        return metrics | dict.fromkeys(PROBABILITY_METRICS[:2], NO_PROBABILITIES)
    return metrics | rank_metrics(task.take(task.scored), index)


# --- intervals ----------------------------------------------------------------------------


Scores = dict[str, dict[str, Any]]  # metric -> value, interval and n, or why it is undefined


def bootstrap(
    tasks: Sequence[Task],
    thresholds: Mapping[str, Mapping[int, float]],
    resamples: int,
    seed: int,
) -> tuple[Scores, list[Scores]]:
    """The means of the tasks' metrics and those of each task, with 95% percentile intervals.

    Whole clusters (patients or images) are resampled, the same ones in all tasks. Resamples in
    which a metric is undefined do not count for it.

    Args:
        tasks: the tasks
        thresholds: name of a task -> class -> threshold
        resamples: number of resamples
        seed: seed of the resamples
    """
    from sklearn import config_context  # type: ignore[import-untyped]

    names = np.unique(np.concatenate([task.clusters for task in tasks]))
    clusters = [np.searchsorted(names, task.clusters) for task in tasks]
    random = np.random.default_rng(seed)
    values = [compute_metrics(task, thresholds.get(task.name)) for task in tasks]
    samples: list[list[Metrics]] = []  # resample -> metrics of each task that has questions
    for _ in tqdm(range(resamples), desc="resampling", leave=False):
        counts = np.bincount(random.integers(0, len(names), len(names)), minlength=len(names))
        with config_context(assume_finite=True, skip_parameter_validation=True):
            samples.append([
                _resampled_metrics(task, counts[own], thresholds.get(task.name))
                for task, own in zip(tasks, clusters, strict=True)
            ])  # fmt: skip
    single = [
        _with_intervals([task], values[index], [sample[index] for sample in samples])
        for index, task in enumerate(tasks)
    ]
    if len(tasks) == 1:
        return single[0], single
    means = [_mean_metrics(own) for own in (values, *samples)]
    return _with_intervals(tasks, means[0], means[1:]), single


def _resampled_metrics(
    task: Task, counts: NDArray[np.int64], thresholds: Mapping[int, float] | None
) -> Metrics:
    """The metrics of a task with each question repeated; empty without questions."""
    indices = np.repeat(np.arange(len(task)), counts)
    return compute_metrics(task.take(indices), thresholds) if len(indices) else {}


def _mean_metrics(own: Sequence[Metrics]) -> Metrics:
    names = dict.fromkeys(name for metrics in own for name in metrics)
    return {name: mean_of([m[name] for m in own if name in m]) for name in names}


def _with_intervals(tasks: Sequence[Task], values: Metrics, samples: Sequence[Metrics]) -> Scores:
    result = {}
    for name, value in values.items():
        own = [one for sample in samples if not isinstance(one := sample.get(name, ""), str)]
        result[name] = _interval(tasks, name, value, own)
    return result


def _interval(
    tasks: Sequence[Task], name: str, value: float | str, samples: Sequence[float]
) -> dict[str, Any]:
    needs_probabilities = name in PROBABILITY_METRICS
    n = sum(int(task.scored.sum()) if needs_probabilities else len(task) for task in tasks)
    if isinstance(value, str):
        return {"value": None, "undefined": value, "n": n}
    low, high = np.quantile(samples, [0.025, 0.975]) if samples else (None, None)
    return {
        "value": value, "low": None if low is None else float(low),
        "high": None if high is None else float(high), "n": n, "resamples": len(samples),
    }  # fmt: skip
