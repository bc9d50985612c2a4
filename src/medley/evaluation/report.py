"""One JSON, one list of cases and one HTML page for every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from medley.evaluation.cases import ScoredExample, sample_examples, write_scored
from medley.evaluation.confidence import interval_of
from medley.images.preprocess import ImageError, open_image
from medley.utils.files import atomic_file, write_json
from medley.utils.html import data_url, render

GALLERY = 48  # answers that a page shows
LONGEST = 2000  # characters of a text on a page
THUMBNAIL = 256  # pixels of the longer side


@dataclass(frozen=True)
class Cell:
    """Text; `bar` draws an interval (percent, low, high), `share` (0 to 1) a shade."""

    text: str
    bar: Mapping[str, float] | None = None
    share: float | None = None


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text: str = ""


def examples_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.cases.jsonl")


def write_report(
    output: Path,
    title: str,
    values: dict[str, Any],
    tables: Sequence[Table],
    cases: Sequence[ScoredExample],
    notes: Sequence[str] = (),
    gallery: int = GALLERY,
) -> None:
    """Writes OUTPUT (JSON), OUTPUT.cases.jsonl with every answer and its scores,
    OUTPUT.wrong.jsonl with those that are wrong, and OUTPUT.html.

    The page stands alone: its pictures are inside, as thumbnails.
    """
    write_scored(examples_path(output), cases)
    wrong = [one for one in cases if one.is_right is False]
    write_scored(output.with_name(f"{output.name}.wrong.jsonl"), wrong)
    shown = sample_examples(cases, gallery)
    text = render(
        "evaluation.html", title, notes=notes, tables=tables, cards=[_card(one) for one in shown],
        count=len(cases), both=any(one.is_right is False for one in cases),
    )  # fmt: skip
    with atomic_file(report_path(output)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(output, values)  # last: where it stands, the others do, too


def report_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.html")


def _card(one: ScoredExample) -> dict[str, Any]:
    case = one.case
    pictures = [_shown(case.image, "the question's picture")] if case.image else []
    pictures += [_shown(one.drawn, "the picture that was drawn")] if one.drawn else []
    scores = {name: value for name, value in one.scores.items() if name != "right"}
    return {
        "identifier": case.identifier, "kind": case.kind, "question": _cut(case.question),
        "gold": _cut(case.gold), "answer": _cut(case.answer), "right": one.is_right,
        "scores": scores, "note": one.note, "pictures": pictures,
    }  # fmt: skip


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text)} characters)"


def _shown(path: str, alt: str) -> dict[str, str | None]:
    try:
        return {"data": _thumbnail(path), "alt": alt}
    except (ImageError, OSError) as error:
        return {"data": None, "alt": f"{alt} cannot be shown: {error}"}


@lru_cache(GALLERY)
def _thumbnail(path: str) -> str:
    return data_url(open_image(path), THUMBNAIL)


# --- tables -------------------------------------------------------------------------------------


def measures_table(
    title: str,
    scores: Mapping[str, Any],
    beside: Mapping[str, Mapping[str, Any]] | None = None,
    text: str = "",
) -> Table:
    """Measures with their intervals; `beside` has those of others (baselines), a column each."""
    beside = beside or {}
    rows = [
        [Cell(name), Cell(f"{value['percent']:.1f}"), Cell(between(value), _within(value)),
         Cell(between(value)), Cell(f"{value['n']}"),
         *(Cell(f"{own[name]['percent']:.1f}" if name in own else "") for own in beside.values())]
        for name, value in scores.items() if is_measure(value)
    ]  # fmt: skip
    return Table(title, ("", "percent", "", "95 % interval", "n", *beside), rows, text)


def measures_of(cases: Sequence[ScoredExample], seed: int = 0) -> dict[str, dict[str, float]]:
    """Measure -> percent, interval and n, over the cases that have it."""
    names = sorted({name for one in cases for name in one.scores if name != "right"})
    return {
        name: interval_of([s.scores[name] for s in cases if name in s.scores], seed).percent()
        for name in names
    }


def kinds_table(title: str, cases: Sequence[ScoredExample], seed: int = 0) -> Table:
    """Kinds of cases in rows, measures in columns."""
    whole = measures_of(cases, seed)
    rows = []
    for kind in dict.fromkeys(one.case.kind for one in cases):
        own = measures_of([one for one in cases if one.case.kind == kind], seed)
        rows.append([Cell(kind or "(none)"), *(Cell(_short(own.get(name))) for name in whole)])
    return Table(title, ("", *whole), rows)


def groups_tables(groups: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """`field: value` -> scores, a table for each field: its values in rows, measures in columns."""
    fields = dict.fromkeys(name.partition(": ")[0] for name in groups if ": " in name)
    tables = []
    for field in fields:
        own = {n.partition(": ")[2]: g for n, g in groups.items() if n.startswith(f"{field}: ")}
        names = sorted({n for group in own.values() for n, v in group.items() if is_measure(v)})
        rows = [
            [Cell(value or "(nothing)"), Cell(str(group["n"]))]
            + [Cell(_short(group.get(name))) for name in names]
            for value, group in own.items()
        ]
        tables.append(Table(f"By {field}", ("", "n", *names), rows))
    return tables


def confusion_table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    columns = list(next(iter(counts.values())))
    rows = []
    for gold, own in counts.items():
        total = max(1, sum(own.values()))
        cells = [Cell(str(own[name]), share=own[name] / total) for name in columns]
        rows.append([Cell(gold), *cells])
    said = "Rows: the right answer. Columns: the given one."
    return Table("Closed questions: right and given answers", ("", *columns), rows, said)


def _within(value: Mapping[str, float]) -> dict[str, float]:
    """Where a bar is drawn: some measures go beyond 0 and 100."""
    return {name: min(100.0, max(0.0, value[name])) for name in ("percent", "low", "high")}


def is_measure(value: Any) -> bool:
    return isinstance(value, dict) and "percent" in value


def between(value: Mapping[str, float]) -> str:
    return f"{value['low']:.1f} to {value['high']:.1f}"


def _short(value: Mapping[str, float] | None) -> str:
    return "" if value is None else f"{value['percent']:.1f} ({between(value)}), n {value['n']}"


def text_table(scores: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    width = max([32, *map(len, scores)])
    lines = [f"{'':{width}}   percent   95 % interval      n"]
    for name, value in scores.items():
        if is_measure(value):
            lines.append(
                f"{name:{width}} {value['percent']:9.1f}   {between(value):15} {value['n']:6}"
            )
        elif not isinstance(value, dict):
            lines.append(f"{name:{width}} {value:>34}")
    return "\n".join(lines)
