"""The output files of every evaluation: scores (JSON), scored examples (JSONL), HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from medley.evaluation.confidence import confidence_interval
from medley.evaluation.examples import ScoredExample, sample_examples, write_scored
from medley.images.preprocess import ImageError, open_image
from medley.utils.files import atomic_file, write_json
from medley.utils.html import data_url, render

GALLERY = 48  # examples in an HTML report
MAX_TEXT = 2000  # characters of a text in an HTML report
THUMBNAIL = 256  # pixels of an image's longer side


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, and either an interval bar or a shade.

    `interval` has percent, low and high; `shade` is from 0 to 1.
    """

    text: str
    interval: Mapping[str, float] | None = None
    shade: float | None = None


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text: str = ""


@dataclass(frozen=True)
class Curve:
    """Points (x, y), each from 0 to 1, joined by a line; `marked` draws the points as well."""

    name: str
    points: Sequence[tuple[float, float]]
    marked: bool = False


@dataclass(frozen=True)
class Plot:
    """Curves on axes from 0 to 1, over a dashed diagonal."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    text: str = ""


def examples_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.examples.jsonl")


def find_examples(output: Path) -> Path:
    """The scored examples of an evaluation, also under the deprecated name."""
    deprecated = output.with_name(f"{output.name}.cases.jsonl")  # alias
    present = examples_path(output)
    return deprecated if deprecated.exists() and not present.exists() else present


def report_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.html")


def write_report(
    output: Path,
    title: str,
    values: dict[str, Any],
    tables: Sequence[Table],
    scored: Sequence[ScoredExample],
    notes: Sequence[str] = (),
    gallery: int = GALLERY,
    plots: Sequence[Plot] = (),
) -> None:
    """Writes the files of an evaluation.

    OUTPUT (JSON) has `values`, OUTPUT.examples.jsonl all examples with their scores,
    OUTPUT.wrong.jsonl the wrong ones, and OUTPUT.html is a self-contained report with thumbnails.
    """
    write_scored(examples_path(output), scored)
    wrong = [one for one in scored if one.is_correct is False]
    write_scored(output.with_name(f"{output.name}.wrong.jsonl"), wrong)
    cards = [_card(one) for one in sample_examples(scored, gallery)]
    text = render(
        "evaluation.html", title, notes=notes, tables=tables, plots=plots, cards=cards,
        count=len(scored), has_wrong=bool(wrong),
    )  # fmt: skip
    with atomic_file(report_path(output)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(output, values)  # last, so that the other files exist if this one does


def _card(scored: ScoredExample) -> dict[str, Any]:
    example, generated = scored.example, scored.generated_image
    images = [_image(example.image, "image of the question")] if example.image else []
    images += [_image(generated, "generated image")] if generated else []
    return {
        "identifier": example.identifier, "kind": example.kind, "images": images,
        "question": _shorten(example.question), "gold": _shorten(example.gold),
        "answer": _shorten(example.answer), "correct": scored.is_correct, "note": scored.note,
        "scores": {name: value for name, value in scored.scores.items() if name != "correct"},
    }  # fmt: skip


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text)} characters)"


def _image(path: str, alt: str) -> dict[str, str | None]:
    try:
        return {"data": _thumbnail(path), "alt": alt}
    except (ImageError, OSError) as error:
        return {"data": None, "alt": f"The {alt} cannot be shown: {error}"}


@lru_cache(GALLERY)
def _thumbnail(path: str) -> str:
    return data_url(open_image(path), THUMBNAIL)


# --- tables -------------------------------------------------------------------------------------


def aggregate_scores(scored: Sequence[ScoredExample], seed: int = 0) -> dict[str, dict[str, float]]:
    """Metric -> percent, 95% interval and n, over the examples that have it."""
    names = sorted({name for one in scored for name in one.scores if name != "correct"})
    return {
        name: confidence_interval(
            [one.scores[name] for one in scored if name in one.scores], seed
        ).as_percent()
        for name in names
    }


def metrics_table(
    title: str,
    scores: Mapping[str, Any],
    others: Mapping[str, Mapping[str, Any]] | None = None,
    text: str = "",
) -> Table:
    """Metrics with their intervals; `others` are scores to compare with, one column each."""
    others = others or {}
    rows = [
        [Cell(name), Cell(f"{value['percent']:.1f}"),
         Cell(format_interval(value), _clip_to_percent(value)), Cell(format_interval(value)),
         Cell(f"{value['n']}"),
         *(Cell(f"{own[name]['percent']:.1f}" if name in own else "") for own in others.values())]
        for name, value in scores.items() if is_metric(value)
    ]  # fmt: skip
    return Table(title, ("", "percent", "", "95% interval", "n", *others), rows, text)


def kinds_table(title: str, scored: Sequence[ScoredExample], seed: int = 0) -> Table:
    """One row for each kind of example, one column for each metric."""
    names = list(aggregate_scores(scored, seed))
    rows = []
    for kind in dict.fromkeys(one.example.kind for one in scored):
        scores = aggregate_scores([one for one in scored if one.example.kind == kind], seed)
        rows.append([Cell(kind or "(none)"), *(Cell(_format_cell(scores.get(n))) for n in names)])
    return Table(title, ("", *names), rows)


def groups_tables(groups: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """`FIELD: VALUE` -> scores; one table for each field, with its values as rows."""
    fields = dict.fromkeys(name.partition(": ")[0] for name in groups if ": " in name)
    tables = []
    for field in fields:
        own = {n.partition(": ")[2]: g for n, g in groups.items() if n.startswith(f"{field}: ")}
        names = sorted({n for group in own.values() for n, v in group.items() if is_metric(v)})
        rows = [
            [Cell(value or "(empty)"), Cell(str(group["n"]))]
            + [Cell(_format_cell(group.get(name))) for name in names]
            for value, group in own.items()
        ]
        tables.append(Table(f"By {field}", ("", "n", *names), rows))
    return tables


def confusion_table(
    counts: Mapping[str, Mapping[str, int]], title: str = "Confusion matrix of closed questions"
) -> Table:
    columns = list(next(iter(counts.values())))
    rows = []
    for gold, own in counts.items():
        total = max(1, sum(own.values()))
        cells = [Cell(str(own[name]), shade=own[name] / total) for name in columns]
        rows.append([Cell(gold), *cells])
    text = "Rows: gold answer. Columns: model's answer."
    return Table(title, ("", *columns), rows, text)


def _clip_to_percent(value: Mapping[str, float]) -> dict[str, float]:
    """The ends of an interval bar: some metrics exceed 0% to 100%."""
    return {name: min(100.0, max(0.0, value[name])) for name in ("percent", "low", "high")}


def is_metric(value: Any) -> bool:
    return isinstance(value, dict) and "percent" in value


def format_interval(value: Mapping[str, float]) -> str:
    return f"{value['low']:.1f} to {value['high']:.1f}"


def _format_cell(value: Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    return f"{value['percent']:.1f} ({format_interval(value)}), n {value['n']}"


def format_scores(scores: Mapping[str, Any]) -> str:
    """A table of scores for a terminal."""
    width = max([32, *map(len, scores)])
    lines = [f"{'':{width}}   percent   95% interval       n"]
    for name, value in scores.items():
        if is_metric(value):
            interval = format_interval(value)
            lines.append(f"{name:{width}} {value['percent']:9.1f}   {interval:15} {value['n']:6}")
        elif not isinstance(value, dict):
            lines.append(f"{name:{width}} {value:>34}")
    return "\n".join(lines)
