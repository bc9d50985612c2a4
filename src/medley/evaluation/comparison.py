"""Comparison of two runs over the same questions: differences and their significance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from medley.errors import UserError
from medley.evaluation.confidence import paired_difference
from medley.evaluation.examples import ScoredExample
from medley.evaluation.report import Cell, Table

Key = tuple[str, str, str, int]


def compare_runs(
    a: Sequence[ScoredExample], b: Sequence[ScoredExample], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Metric -> both means and b - a, in percent, with a 95% interval and a p value.

    The interval is that of a paired bootstrap over images. Questions that only one run answered or
    scored are left out and counted. Raises UserError if the runs share no question or no metric.
    """
    first, second = by_key(a), by_key(b)
    common = [key for key in first if key in second]
    if not common:
        raise UserError("The two runs share no question.")
    metrics = sorted(
        {name for key in common for name in first[key].scores.keys() & second[key].scores.keys()}
        - {"correct"}
    )
    result = {}
    for metric in metrics:
        keys = [k for k in common if metric in first[k].scores and metric in second[k].scores]
        a_values = [first[key].scores[metric] for key in keys]
        b_values = [second[key].scores[metric] for key in keys]
        # A question without an image is a cluster of its own.
        clusters: list[Hashable] = [first[key].example.image or key for key in keys]
        difference = paired_difference(a_values, b_values, clusters, seed)
        result[metric] = {
            "a": 100 * sum(a_values) / len(keys), "b": 100 * sum(b_values) / len(keys),
            "difference": difference.interval.as_percent(), "p": difference.p, "n": len(keys),
            "left out": len(first.keys() | second.keys()) - len(keys),
        }  # fmt: skip
    if not result:
        raise UserError(
            "The two runs share no metric. Compare two runs of the same kind of evaluation."
        )
    return result


def by_key(scored: Iterable[ScoredExample]) -> dict[Key, ScoredExample]:
    """(kind, id, question, number of identical ones before) -> example."""
    seen: Counter[tuple[str, str, str]] = Counter()
    result = {}
    for one in scored:
        name = (one.example.kind, str(one.example.identifier), one.example.question)
        result[(*name, seen[name])] = one
        seen[name] += 1
    return result


def changed_examples(a: Iterable[ScoredExample], b: Iterable[ScoredExample]) -> list[ScoredExample]:
    """The examples of b that are correct where a is wrong, or wrong where a is correct."""
    before = by_key(a)
    changed = []
    for key, one in by_key(b).items():
        other = before.get(key)
        if other is None or one.is_correct is None or other.is_correct in (None, one.is_correct):
            continue
        note = f"A's answer: {other.example.answer or '(empty)'}"
        changed.append(ScoredExample(one.example, one.scores, note, one.generated_image))
    return changed


def comparison_table(
    title: str, comparison: Mapping[str, Mapping[str, Any]], names: tuple[str, str]
) -> Table:
    """One row for each metric of `compare_runs`."""
    rows = [
        [Cell(metric), Cell(f"{values['a']:.1f}"), Cell(f"{values['b']:.1f}"),
         Cell(format_difference(values["difference"])), Cell(format_p(values["p"])),
         Cell(str(values["n"]))]
        for metric, values in comparison.items()
    ]  # fmt: skip
    text = (
        "In percent, with 95% intervals of a paired bootstrap and p of a sign-flip test. The "
        "questions about one image are resampled together."
    )
    return Table(title, ("", *names, "difference", "p", "n"), rows, text)


def format_comparison(comparison: Mapping[str, Mapping[str, Any]]) -> str:
    """The same table for a terminal."""
    lines = [f"{'':32}         A         B   difference              p"]
    lines += [
        f"{metric:32} {values['a']:9.1f} {values['b']:9.1f}   "
        f"{format_difference(values['difference']):22} {format_p(values['p'])}"
        for metric, values in comparison.items()
    ]
    return "\n".join(lines)


def format_difference(value: Mapping[str, float]) -> str:
    return f"{value['percent']:+.1f} ({value['low']:+.1f} to {value['high']:+.1f})"


def format_p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}"
