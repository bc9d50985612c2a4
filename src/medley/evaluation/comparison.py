"""Two runs over the same questions: how much they differ, and how sure that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from medley.errors import UserError
from medley.evaluation.cases import ScoredExample
from medley.evaluation.confidence import paired_difference
from medley.evaluation.report import Cell, Table

Key = tuple[str, str, str, int]


def compare_runs(
    a: Sequence[ScoredExample], b: Sequence[ScoredExample], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """By measure: both means and b - a, in percent, with a 95 % interval of a paired bootstrap over
    pictures. Questions that only one run has, or scored, are left out and counted.

    Raises UserError where the runs have no question in common.
    """
    first, second = by_key(a), by_key(b)
    common = [key for key in first if key in second]
    if not common:
        raise UserError("the two runs have no question in common")
    names = sorted(
        {name for key in common for name in first[key].scores.keys() & second[key].scores.keys()}
        - {"right"}
    )
    found = {}
    for name in names:
        keys = [k for k in common if name in first[k].scores and name in second[k].scores]
        one = [first[key].scores[name] for key in keys]
        other = [second[key].scores[name] for key in keys]
        # Without a picture a question stands for itself.
        clusters: list[Hashable] = [first[key].case.image or key for key in keys]
        difference = paired_difference(one, other, clusters, seed)
        found[name] = {
            "a": 100 * sum(one) / len(one), "b": 100 * sum(other) / len(other),
            "difference": difference.interval.percent(), "p": difference.p, "n": len(keys),
            "left out": len(first.keys() | second.keys()) - len(keys),
        }  # fmt: skip
    if not found:
        raise UserError("the two runs have no measure in common: are they of the same evaluation?")
    return found


def by_key(cases: Iterable[ScoredExample]) -> dict[Key, ScoredExample]:
    """Kind, id, question, and how often all that stood there before."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found = {}
    for one in cases:
        name = (one.case.kind, str(one.case.identifier), one.case.question)
        found[(*name, seen[name])] = one
        seen[name] += 1
    return found


def p_text(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}"


def comparison_table(title: str, found: dict[str, dict[str, Any]], names: tuple[str, str]) -> Table:
    rows = []
    for name, own in found.items():
        value = own["difference"]
        between = f"{value['percent']:+.1f} ({value['low']:+.1f} to {value['high']:+.1f})"
        rows.append([
            Cell(name), Cell(f"{own['a']:.1f}"), Cell(f"{own['b']:.1f}"), Cell(between),
            Cell(p_text(own["p"])), Cell(str(own["n"])),
        ])  # fmt: skip
    said = (
        "In percent; 95 % intervals of a paired bootstrap, p by flipped signs; the questions about "
        "one picture go together."
    )
    columns = ("", *names, "difference", "p", "n")
    return Table(title, columns, rows, said)
