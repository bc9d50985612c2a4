"""`medley evaluate report A B`: compares two runs of an evaluation question by question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medley.commands.model_options import check_output, check_seed
from medley.errors import UserError
from medley.evaluation.comparison import (
    changed_examples,
    compare_runs,
    comparison_table,
    format_comparison,
)
from medley.evaluation.examples import read_scored
from medley.evaluation.report import find_examples, report_path, write_report
from medley.utils.cli_options import resolved
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class ReportOptions:
    """Compares two runs over the same questions.

    Args:
        runs: the JSON files of two evaluations, A and B
        output: JSON file of the differences; an HTML report is written beside it
        seed: seed of the bootstrap
    """

    runs: list[Path]
    output: Path
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.runs) != 2:
            raise UserError(
                f"Wrong number of runs (got {len(self.runs)}, expected 2): "
                "medley evaluate report A B"
            )
        check_output(self.output, *self.runs)
        check_seed(self.seed)


def report(options: ReportOptions) -> None:
    a, b = (read_scored(find_examples(run)) for run in options.runs)
    comparison = compare_runs(a, b, options.seed)
    values = {
        "evaluation": "report", "a": str(options.runs[0]), "b": str(options.runs[1]),
        "differences": comparison,
    }  # fmt: skip
    notes = [f"A: {options.runs[0]}. B: {options.runs[1]}."]
    if left_out := max(own["left out"] for own in comparison.values()):
        notes.append(f"{left_out} questions are in only one of the runs and are left out.")
    changed = changed_examples(a, b)
    table = comparison_table("B compared with A", comparison, ("A", "B"))
    write_report(options.output, "Comparison of two runs", values, [table], changed, notes)
    write_manifest(options.output, resolved(options), options.runs, None)
    print(format_comparison(comparison))
    print("\n".join(notes[1:]))
    print(
        f"{len(changed)} answers changed between correct and wrong. Differences: {options.output}. "
        f"HTML report: {report_path(options.output)}."
    )
