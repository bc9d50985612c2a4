"""Tables, plots and examples of the report on a classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medley.errors import UserError
from medley.evaluation.classification import UNCLEAR, Task
from medley.evaluation.classification_metrics import BINS, Metrics, decide
from medley.evaluation.examples import ScoredExample
from medley.evaluation.report import Cell, Curve, Plot, Table

_MAX_POINTS = 200  # of a curve
_MAX_CURVES = 12  # of a plot
_MAX_GROUPS = 40  # of a field of texts
_MAX_NUMBERS = 10  # different numbers that are groups of their own
_MAX_SHOWN = 3  # probabilities of an example
MISSING = "(none)"
Values = Mapping[str, Mapping[str, Any]]


# --- tables -------------------------------------------------------------------------------


def scores_table(title: str, scores: Values, text: str = "") -> Table:
    """One row for each metric, with its interval."""
    rows = []
    for name, own in scores.items():
        if own["value"] is None:
            cells = [Cell(name), Cell("undefined"), Cell(""), Cell(own["undefined"])]
        else:
            bar = None if own["low"] is None else {
                "percent": 100 * own["value"], "low": 100 * own["low"], "high": 100 * own["high"],
            }  # fmt: skip
            cells = [Cell(name), Cell(f"{own['value']:.3f}"), Cell(_interval(own), bar),
                     Cell(_interval(own))]  # fmt: skip
        rows.append([*cells, Cell(str(own["n"]))])
    return Table(title, ("", "value", "", "95% interval", "n"), rows, text)


def _interval(own: Mapping[str, Any]) -> str:
    return "" if own["low"] is None else f"{own['low']:.3f} to {own['high']:.3f}"


def wide_table(title: str, rows: Mapping[str, Values], text: str = "") -> Table:
    """One row for each class, finding or group, one column for each metric."""
    names = list(dict.fromkeys(name for own in rows.values() for name in own))
    cells = [
        [Cell(label), *(Cell(_format_cell(own.get(name))) for name in names)]
        for label, own in rows.items()
    ]
    return Table(title, ("", *names), cells, text)


def _format_cell(own: Mapping[str, Any] | None) -> str:
    if own is None:
        return ""
    if own["value"] is None:
        return f"undefined: {own['undefined']}"
    interval = _interval(own)
    return f"{own['value']:.3f}" + (f" ({interval})" if interval else "")


def format_scores(scores: Values) -> str:
    """The metrics for a terminal."""
    lines = [f"{'':24}   value   95% interval         n"]
    for name, own in scores.items():
        if own["value"] is None:
            lines.append(f"{name:24}   undefined: {own['undefined']}")
        else:
            lines.append(f"{name:24} {own['value']:7.3f}   {_interval(own):16} {own['n']:5}")
    return "\n".join(lines)


def plain_values(metrics: Metrics, n: int) -> dict[str, dict[str, Any]]:
    """Metrics without intervals, in the layout of those with intervals."""
    return {
        name: {"value": None, "undefined": value, "n": n} if isinstance(value, str)
        else {"value": value, "low": None, "high": None, "n": n}
        for name, value in metrics.items()
    }  # fmt: skip


def confusion_counts(
    task: Task, thresholds: Mapping[int, float] | None
) -> dict[str, dict[str, int]]:
    """Gold class -> decided class -> count; `neither` only if it occurs."""
    from sklearn.metrics import confusion_matrix  # type: ignore[import-untyped]

    decided = decide(task, thresholds)
    names = [*task.classes, *([UNCLEAR] if (decided < 0).any() else [])]
    labels = [*range(len(task.classes)), -1][: len(names)]
    matrix = confusion_matrix(task.gold, decided, labels=labels)
    return {
        gold: dict(zip(names, map(int, matrix[row]), strict=True))
        for row, gold in enumerate(task.classes)
    }


# --- plots --------------------------------------------------------------------------------


def plots_of(task: Task, thresholds: Mapping[int, float] | None) -> list[Plot]:
    """The ROC curve and the reliability diagram of the answers with probabilities."""
    if not task.scored.any():
        return []
    scored = task.take(task.scored)
    suffix = f": {task.name}" if task.name else ""
    indices = range(len(task.classes)) if task.positive is None else [task.positive]
    curves = [
        Curve(task.classes[index], points)
        for index in indices
        if (points := roc_points(scored.gold == index, scored.probabilities[:, index]))
    ]
    text = "" if len(curves) <= _MAX_CURVES else f"The first {_MAX_CURVES} classes."
    curves = curves[:_MAX_CURVES]
    if curves and task.positive is not None and thresholds:
        curves.append(Curve("threshold", [_operating_point(scored, thresholds)], marked=True))
    roc = Plot(f"ROC curve{suffix}", "1 - specificity", "sensitivity", curves, text)
    if not curves:
        roc = replace(roc, text="Undefined: all examples are of one class.")
    return [roc, _reliability(scored, suffix)]


def roc_points(truth: NDArray[np.bool_], values: NDArray[np.float64]) -> list[tuple[float, float]]:
    """(1 - specificity, sensitivity) by falling threshold; empty for a single class."""
    from sklearn.metrics import roc_curve

    if truth.all() or not truth.any():
        return []
    false_rate, true_rate, _ = roc_curve(truth, values)
    count = min(len(false_rate), _MAX_POINTS)
    kept = np.linspace(0, len(false_rate) - 1, count).round().astype(int)
    return [(float(false_rate[i]), float(true_rate[i])) for i in kept]


def _operating_point(task: Task, thresholds: Mapping[int, float]) -> tuple[float, float]:
    assert task.positive is not None
    decided = decide(task, thresholds) == task.positive
    truth = task.gold == task.positive
    return float(decided[~truth].mean()), float(decided[truth].mean())


def reliability_points(
    truth: NDArray[np.bool_], values: NDArray[np.float64]
) -> list[tuple[float, float]]:
    """(mean probability, fraction of positives) of each bin that has answers."""
    from sklearn.calibration import calibration_curve  # type: ignore[import-untyped]

    fractions, means = calibration_curve(truth, values, n_bins=BINS)
    return [(float(x), float(y)) for x, y in zip(means, fractions, strict=True)]


def _reliability(task: Task, suffix: str) -> Plot:
    if task.positive is not None:
        truth, values = task.gold == task.positive, task.probabilities[:, task.positive]
        name = task.classes[task.positive]
        labels = (f"probability of {name}", f"fraction of {name}")
    else:
        truth, values = task.gold == task.predicted, task.probabilities.max(1)
        name, labels = "most probable class", ("probability", "accuracy")
    counts = np.histogram(values, BINS, (0, 1))[0]
    text = f"Answers in the {BINS} bins of probability: {', '.join(map(str, counts))}."
    curve = Curve(name, reliability_points(truth, values), marked=True)
    return Plot(f"Reliability diagram{suffix}", *labels, [curve], text)


# --- examples and groups ------------------------------------------------------------------


def scored_examples(task: Task, thresholds: Mapping[int, float] | None) -> list[ScoredExample]:
    """The examples with the decided class and the highest probabilities as the answer."""
    scored = []
    for row, decided in enumerate(decide(task, thresholds)):
        correct = float(decided == task.gold[row])
        example, scores = task.examples[row], {"correct": correct, "accuracy": correct}
        if task.scored[row]:
            values = task.probabilities[row]
            best = sorted(range(len(values)), key=lambda index: -values[index])[:_MAX_SHOWN]
            listed = ", ".join(f"{task.classes[index]} {values[index]:.3f}" for index in best)
            example = replace(example, answer=f"{task.classes[decided]} ({listed})")
            scores["probability of the gold answer"] = float(values[task.gold[row]])
        scored.append(ScoredExample(example, scores))
    return scored


def group_masks(tasks: Sequence[Task], field: str) -> dict[str, list[NDArray[np.bool_]]]:
    """Value of a field -> which questions of each task have it.

    Numbers of many different values are grouped by quartiles. Raises UserError for a field that no
    record has, and for one of too many texts.
    """
    values = [[e.fields.get(field) for e in task.examples] for task in tasks]
    present = [v for own in values for v in own if v is not None and str(v).strip()]
    if not present:
        known = sorted({name for task in tasks for e in task.examples for name in e.fields})
        raise UserError(
            f"--group_by {field}: No record has this field (got {', '.join(known) or 'no fields'})."
        )
    labels = _group_labels(field, present)
    names = [
        [labels.get(str(v).strip(), MISSING) if v is not None else MISSING for v in own]
        for own in values
    ]
    ordered = list(dict.fromkeys(labels.values()))
    ordered += [MISSING] if any(MISSING in own for own in names) else []
    return {name: [np.array([n == name for n in own], bool) for own in names] for name in ordered}


def _group_labels(field: str, present: Sequence[Any]) -> dict[str, str]:
    """Text of a value -> name of its group."""
    texts = list(dict.fromkeys(str(value).strip() for value in present))
    numbers = {text: value for text in texts if (value := _number(text)) is not None}
    if len(numbers) == len(texts) > _MAX_NUMBERS:
        edges = np.quantile([numbers[str(value).strip()] for value in present], [0.25, 0.5, 0.75])
        between = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
        bounds = [f"up to {edges[0]:g}", *between, f"above {edges[2]:g}"]
        ordered = sorted(numbers.items(), key=lambda pair: pair[1])
        return {text: bounds[int(np.searchsorted(edges, value))] for text, value in ordered}
    if len(texts) > _MAX_GROUPS:
        raise UserError(
            f"--group_by {field}: Too many different texts (got {len(texts)}, limit {_MAX_GROUPS})."
        )
    return {text: text for text in sorted(texts)}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
