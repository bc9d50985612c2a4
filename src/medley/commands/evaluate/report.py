"""`medley evaluate report A B`: two runs of an evaluation, compared question by question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medley.commands.model_options import check_output, check_seed
from medley.errors import UserError
from medley.evaluation.cases import ScoredExample, read_scored
from medley.evaluation.comparison import by_key, compare_runs, comparison_table, p_text
from medley.evaluation.report import examples_path, report_path, write_report
from medley.utils.cli_options import resolved
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class ReportOptions:
    """Compares two runs over the same questions.

    Args:
        runs: the JSON files of two evaluations, A and B
        output: JSON file of the differences, a page beside it
        seed: seed of the bootstrap
    """

    runs: list[Path]
    output: Path
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.runs) != 2:
            raise UserError(f"{len(self.runs)} runs, expected two: medley evaluate report A B")
        check_output(self.output, *self.runs)
        check_seed(self.seed)


def report(options: ReportOptions) -> None:
    a, b = (read_scored(examples_path(run)) for run in options.runs)
    found = compare_runs(a, b, options.seed)
    names = ("A", "B")
    values = {
        "evaluation": "report", "a": str(options.runs[0]), "b": str(options.runs[1]),
        "differences": found,
    }  # fmt: skip
    notes = [f"A: {options.runs[0]}. B: {options.runs[1]}."]
    left = max(own["left out"] for own in found.values())
    if left:
        notes.append(f"{left} questions stand in one of them only: they are left out.")
    changed = changes(a, b)
    table = comparison_table("B against A", found, names)
    write_report(options.output, "Two runs compared", values, [table], changed, notes)
    write_manifest(options.output, resolved(options), options.runs, None)
    print(f"{'':32}         A         B   difference              p")
    for name, own in found.items():
        value = own["difference"]
        between = f"{value['percent']:+.1f} ({value['low']:+.1f} to {value['high']:+.1f})"
        print(f"{name:32} {own['a']:9.1f} {own['b']:9.1f}   {between:22} {p_text(own['p'])}")
    print("\n".join(notes[1:]))
    page = report_path(options.output)
    print(f"{options.output}: {len(changed)} answers became right or wrong; {page} shows some")


def changes(a: list[ScoredExample], b: list[ScoredExample]) -> list[ScoredExample]:
    """B's answers that are right where A's are wrong, or the other way."""
    before = by_key(a)
    found = []
    for key, one in by_key(b).items():
        other = before.get(key)
        if other is None or one.is_right is None or other.is_right in (None, one.is_right):
            continue
        note = f"A answered: {other.case.answer or '(nothing)'}"
        found.append(ScoredExample(one.case, one.scores, note, one.drawn))
    return found
