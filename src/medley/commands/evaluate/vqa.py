"""`medley evaluate vqa`: scores answers to visual questions, our way and as published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medley.commands.model_options import QuestionOptions, check_output, check_seed
from medley.errors import PartialFailure, UserError
from medley.evaluation.comparison import compare_runs, comparison_table
from medley.evaluation.examples import ScoredExample
from medley.evaluation.predictions import (
    dataset_of,
    find_question_files,
    match_predictions,
    read_candidates,
    read_predictions,
)
from medley.evaluation.questions import Question
from medley.evaluation.reference_scorers import (
    Compat,
    has_published_kind,
    published_table,
    require_packages,
)
from medley.evaluation.report import (
    Table,
    examples_path,
    format_scores,
    report_path,
    write_report,
)
from medley.evaluation.vqa import (
    compute_scores,
    only_metrics,
    report_tables,
    score_example,
    score_groups,
)
from medley.utils.cli_options import resolved
from medley.utils.files import path_hash
from medley.utils.jsonl import write_jsonl
from medley.utils.manifest import write_manifest

RESULTS_FILE = "eval_results_med_datasets.jsonl"  # LLaVA-Med's name


@dataclass(frozen=True, kw_only=True)
class VqaOptions(QuestionOptions):
    """Scores answers to visual questions.

    Args:
        gt: questions with gold answers; with --pred_folder also a folder of NAME.json or
            NAME/test.json files
        pred: answer file, JSONL with question_id and text
        pred_folder: folder of answer files, which are scored one by one
        target_test_type: ending of the names of these answer files, without .jsonl
        output: JSON file of the scores; examples and an HTML report are written beside it. With
            --pred_folder a folder
        candidate: open answers of the training set, for run_eval
        compat: also compute LLaVA-Med's published scores, including their bugs
        baseline: folder of an image-text model of transformers that answers the same questions
        skip_missing: leave out questions without an answer; otherwise they count as wrong
        seed: seed of the confidence intervals
    """

    gt: Path
    output: Path
    pred: Path | None = None
    pred_folder: Path | None = None
    target_test_type: str = "test-answer-file"
    candidate: Path | None = None
    compat: list[Compat] | None = None
    baseline: Path | None = None
    skip_missing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.pred is None) == (self.pred_folder is None):
            raise UserError("Set either --pred (an answer file) or --pred_folder.")
        if self.pred_folder is not None and self.baseline is not None:
            raise UserError("--baseline requires --pred and cannot be used with --pred_folder.")
        check_seed(self.seed)
        if self.pred is not None:
            check_output(self.output, self.pred, self.gt, self.candidate)
        if self.compat:
            require_packages()
            if "run_eval" in self.compat and self.candidate is None:
                raise UserError(
                    "--compat run_eval needs --candidate, a file with the open answers of the "
                    "training set."
                )


def vqa(options: VqaOptions) -> None:
    if options.pred_folder is not None:
        score_folder(options, options.pred_folder)
        return
    assert options.pred is not None
    questions = options.questions_in(options.gt)
    score_file(options, questions, options.gt, options.pred, options.output)


def score_file(
    options: VqaOptions, questions: Sequence[Question], gold: Path, pred: Path, output: Path
) -> dict[str, Any]:
    """Scores an answer file and writes all outputs; returns the content of the JSON file."""
    examples, missing = match_predictions(questions, pred, options.skip_missing)
    scored = [score_example(example) for example in examples]
    candidates = None if options.candidate is None else read_candidates(options.candidate)
    values = compute_scores(scored, options.compat or (), candidates, options.seed)
    values["missing answers"] = missing
    notes = [f"{pred.name}: {len(examples)} answers to the questions of {gold.name}."]
    if missing:
        treatment = "are left out" if options.skip_missing else "count as wrong"
        notes.append(f"{missing} questions have no answer and {treatment}.")
    if without_kind := sum(question.kind is None for question in questions):
        notes.append(
            f"{without_kind} questions have no answer_type: gold answers yes and no count as "
            "closed, all others as open."
        )
    unpublished = sum(not has_published_kind(example) for example in examples)
    if unpublished and options.compat:
        notes.append(
            f"{unpublished} answers are neither OPEN nor CLOSED: the published scorers ignore them."
        )
    comparisons = []
    if options.baseline is not None:
        comparisons = [
            compare_with_baseline(options, options.baseline, questions, scored, values, output)
        ]
    tables = report_tables(values) + comparisons
    write_report(output, f"Answers to {gold.name}", values, tables, scored, notes)
    inputs = [file for file in (gold, pred) if file.is_file()]
    write_manifest(output, resolved(options), inputs, None, questions_hash=path_hash(gold))
    print(format_scores(values["scores"]["all"]))
    for name, own in values["baselines"].items():
        print(f"\n{name}:\n{format_scores(only_metrics(own['scores']))}")
    for name in options.compat or []:
        print(f"\nPublished scores ({name}), in percent:\n{published_table(values[name])}")
    print("\n".join(notes[1:]))
    wrong = sum(one.is_correct is False for one in scored)
    print(
        f"{wrong} wrong answers. Scores: {output}. All examples: {examples_path(output)}. "
        f"HTML report: {report_path(output)}."
    )
    if failures := values.get("baseline", {}).get("not answered"):
        raise PartialFailure(
            f"--baseline: {len(failures)} questions failed; the first: {failures[0]}"
        )
    return values


def score_folder(options: VqaOptions, folder: Path) -> None:
    """Scores every answer file below a folder and writes LLaVA-Med's file of results."""
    suffix = f"{options.target_test_type}.jsonl"
    files = sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())
    if not files:
        raise UserError(f"{folder}: The folder contains no file whose name ends with {suffix}.")
    question_files = find_question_files(options.gt)
    # All datasets are determined and read before the first file is scored.
    datasets = {file: dataset_of(file.relative_to(folder), question_files) for file in files}
    questions = {
        name: options.questions_in(question_files[name]) for name in set(datasets.values())
    }
    rows, failures = [], []
    for file, name in datasets.items():
        output = options.output / file.relative_to(folder).with_suffix(".json")
        print(f"\n======== {name}: {file}")
        try:
            values = score_file(options, questions[name], question_files[name], file, output)
        except UserError as error:
            print(error)
            failures.append(f"{file}: {error}")
            continue
        tables = [published_table(values[compat]) for compat in options.compat or []]
        text = "\n".join(tables) or format_scores(values["scores"]["all"])
        rows.append({"dataset": name, "pred_file": str(file), "results": text})
    write_jsonl(options.output / RESULTS_FILE, rows)
    print(f"{options.output / RESULTS_FILE}: {len(rows)} answer files")
    if failures:
        raise PartialFailure(
            f"{len(failures)} of {len(files)} answer files could not be scored; the first: "
            f"{failures[0]}"
        )


def compare_with_baseline(
    options: VqaOptions,
    baseline: Path,
    questions: Sequence[Question],
    scored: Sequence[ScoredExample],
    values: dict[str, Any],
    output: Path,
) -> Table:
    """Has another model answer the same questions, adds its scores to `values`, and compares."""
    from medley.evaluation.baseline import write_answers  # imports transformers' models

    file = output.with_name(f"{output.name}.baseline.jsonl")
    failures = write_answers(baseline, questions, file)
    if not read_predictions(file):
        raise UserError(f"--baseline {baseline}: All questions failed; the first: {failures[0]}")
    examples, _ = match_predictions(questions, file, skip_missing=True)
    baseline_scored = [score_example(example) for example in examples]
    comparison = compare_runs(baseline_scored, scored, options.seed)
    baseline_scores = score_groups(baseline_scored, options.seed)["all"]
    values["baseline"] = {
        "path": str(baseline), "scores": baseline_scores, "differences": comparison,
        "not answered": failures,
    }  # fmt: skip
    print(f"{baseline}:\n{format_scores(only_metrics(baseline_scores))}\n")
    title = f"Comparison with {baseline.name}"
    return comparison_table(title, comparison, (baseline.name, "this file"))
