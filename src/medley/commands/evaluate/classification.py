"""`medley evaluate classification`: scores answers with choices as a classification.

    medley evaluate classification --gt test.jsonl --format documents --pred answers.jsonl \\
        --val_gt val.jsonl --val_pred val_answers.jsonl --output scores.json --group_by sex

Answers with the field `choices` have probabilities (docs/formats.md). Answers with text alone are
scored by accuracy, F1, sensitivity and specificity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medley.commands.model_options import QuestionOptions, check_output, check_seed
from medley.errors import UserError
from medley.evaluation.classification import Task, build_tasks, cluster_name
from medley.evaluation.classification_metrics import (
    Criterion,
    bootstrap,
    choose_threshold,
    class_metrics,
    decide,
    require_packages,
)
from medley.evaluation.classification_report import (
    confusion_counts,
    format_scores,
    group_masks,
    plain_values,
    plots_of,
    scored_examples,
    scores_table,
    wide_table,
)
from medley.evaluation.predictions import pair_predictions
from medley.evaluation.report import (
    Table,
    confusion_table,
    examples_path,
    report_path,
    write_report,
)
from medley.utils.cli_options import resolved
from medley.utils.files import path_hash
from medley.utils.manifest import write_manifest

Thresholds = dict[str, dict[int, float]]  # task -> class -> threshold


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(QuestionOptions):
    """Scores answers with choices as a classification.

    Args:
        gt: questions with gold answers
        pred: answer file, JSONL with question_id and text, and choices for probabilities
        output: JSON file of the scores; examples and an HTML report are written beside it
        val_gt: questions of the validation split, which chooses the thresholds
        val_pred: answer file of the validation split
        threshold_by: what the threshold maximizes on the validation split
        positive: the positive class of two; yes unless given, else the last choice
        group_by: fields of the records whose values are scored on their own
        skip_missing: leave out questions without an answer; otherwise they count as wrong
        resamples: number of bootstrap resamples of the confidence intervals
        seed: seed of the bootstrap
    """

    gt: Path
    pred: Path
    output: Path
    val_gt: Path | None = None
    val_pred: Path | None = None
    threshold_by: Criterion = "youden"
    positive: str | None = None
    group_by: list[str] | None = None
    skip_missing: bool = False
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.val_gt is None) != (self.val_pred is None):
            raise UserError("Set both --val_gt and --val_pred, or neither.")
        if self.resamples < 1:
            raise UserError(f"--resamples is {self.resamples}, expected 1 or more.")
        check_seed(self.seed)
        check_output(self.output, self.gt, self.pred, self.val_gt, self.val_pred)
        require_packages()


def classification(options: ClassificationOptions) -> None:
    questions = options.questions_in(options.gt)
    predictions = pair_predictions(questions, options.pred)
    if not any(predictions):
        raise UserError(f"{options.pred}: The file answers none of the questions.")
    tasks = build_tasks(questions, predictions, options.positive, options.skip_missing)
    thresholds = validation_thresholds(options, tasks)
    overall, single = bootstrap(tasks, thresholds, options.resamples, options.seed)
    results = [
        {**describe_task(task, thresholds.get(task.name)), "scores": scores}
        for task, scores in zip(tasks, single, strict=True)
    ]
    groups = score_groups(options, tasks, thresholds)
    missing = sum(prediction is None for prediction in predictions)
    notes = [f"{options.pred.name}: {len(questions) - missing} answers to the questions of "
             f"{options.gt.name}. Intervals resample {cluster_name(questions)}."]  # fmt: skip
    notes += describe(options, tasks, thresholds, missing)
    values: dict[str, Any] = {
        "evaluation": "classification", "scores": overall, "tasks": results, "groups": groups,
        "majority accuracy": majority_accuracy(tasks), "missing answers": missing,
        "resampled": cluster_name(questions), "notes": notes[1:],
    }  # fmt: skip
    examples = [one for t in tasks for one in scored_examples(t, thresholds.get(t.name))]
    plots = [plot for task in tasks for plot in plots_of(task, thresholds.get(task.name))]
    title = f"Classification: {options.gt.name}"
    tables = report_tables(results, overall, groups)
    write_report(options.output, title, values, tables, examples, notes, plots=plots)
    inputs = [options.gt, options.pred, options.val_gt, options.val_pred]
    files = [path for path in inputs if path is not None and path.is_file()]
    write_manifest(
        options.output, resolved(options), files, None, questions_hash=path_hash(options.gt)
    )
    print(format_scores(overall))
    print("\n".join(notes[1:]))
    print(
        f"{sum(one.is_correct is False for one in examples)} wrong answers. Scores: "
        f"{options.output}. All examples: {examples_path(options.output)}. HTML report: "
        f"{report_path(options.output)}."
    )


# --- scores -------------------------------------------------------------------------------


def validation_thresholds(options: ClassificationOptions, tasks: Sequence[Task]) -> Thresholds:
    """The thresholds that the validation split chooses; empty without one.

    Raises UserError if its tasks are not those of the test split, or if it has no probabilities.
    """
    if options.val_gt is None or options.val_pred is None:
        return {}
    questions = options.questions_in(options.val_gt)
    paired = pair_predictions(questions, options.val_pred)
    known = {
        task.name: task for task in build_tasks(questions, paired, options.positive, True)
    }  # fmt: skip
    thresholds: Thresholds = {}
    for task in tasks:
        own = known.get(task.name)
        if own is None or sorted(own.classes) != sorted(task.classes):
            name = f" about {task.name}" if task.name else ""
            raise UserError(
                f"--val_gt {options.val_gt}: The questions{name} are not those of {options.gt} "
                f"(expected the choices {', '.join(task.classes)})."
            )
        indices = range(len(task.classes)) if task.positive is None else [task.positive]
        thresholds[task.name] = {
            index: choose_threshold(
                own, own.classes.index(task.classes[index]), options.threshold_by
            )
            for index in indices
        }
    return thresholds


def majority_accuracy(tasks: Sequence[Task]) -> float:
    """The accuracy of always answering the most frequent class of each task."""
    counts = [Counter(task.gold.tolist()).most_common(1)[0][1] for task in tasks]
    return sum(counts) / sum(map(len, tasks))


def describe_task(task: Task, thresholds: Mapping[int, float] | None) -> dict[str, Any]:
    """The counts, thresholds, single classes and confusion matrix of a task, as JSON values."""
    counts = Counter(task.gold.tolist())
    decided = decide(task, thresholds)
    by_class = {}
    if task.positive is None:
        by_class = {
            name: plain_values(class_metrics(task, index, thresholds), len(task))
            for index, name in enumerate(task.classes)
        }
    return {
        "finding": task.name, "classes": list(task.classes),
        "positive": None if task.positive is None else task.classes[task.positive],
        "n": len(task), "examples": {n: counts[i] for i, n in enumerate(task.classes)},
        "answers with probabilities": int(task.scored.sum()),
        "answers with none of the classes, or with several": int((decided < 0).sum()),
        "thresholds": {task.classes[index]: t for index, t in (thresholds or {}).items()},
        "by class": by_class,
        "confusion": confusion_counts(task, thresholds),
    }  # fmt: skip


def score_groups(
    options: ClassificationOptions, tasks: Sequence[Task], thresholds: Thresholds
) -> dict[str, dict[str, Any]]:
    """`FIELD: VALUE` -> scores."""
    groups = {}
    for field in options.group_by or []:
        for name, masks in group_masks(tasks, field).items():
            own = [t.take(mask) for t, mask in zip(tasks, masks, strict=True) if mask.any()]
            scores, _ = bootstrap(own, thresholds, options.resamples, options.seed)
            groups[f"{field}: {name}"] = {"n": sum(map(len, own)), "scores": scores}
    return groups


# --- report -------------------------------------------------------------------------------


def describe(
    options: ClassificationOptions, tasks: Sequence[Task], thresholds: Thresholds, missing: int
) -> list[str]:
    """Sentences on what the scores are about, and on what they lack."""
    notes = []
    if missing:
        treatment = "are left out" if options.skip_missing else "count as wrong"
        notes.append(
            f"{missing} questions have no answer and {treatment}. AUROC, average precision and "
            "calibration are about the answers with probabilities."
        )
    total, scored = sum(map(len, tasks)), sum(int(task.scored.sum()) for task in tasks)
    if not scored:
        notes.append(
            "The answers have no probabilities, so that AUROC, average precision and calibration "
            "are undefined. They need the field choices in the answer file."
        )
    elif scored < total - (0 if options.skip_missing else missing):
        notes.append(f"Only {scored} of {total} answers have probabilities; the others are text.")
    if thresholds:
        listed = "; ".join(
            f"{task.name + ', ' if task.name else ''}{task.classes[index]} from {value:.4f}"
            for task in tasks for index, value in thresholds[task.name].items()
        )  # fmt: skip
        notes.append(
            f"Thresholds by {options.threshold_by} on the validation split {options.val_gt}: "
            f"{listed}."
        )
    else:
        decision = "most probable choice" if scored else "class in the answer's text"
        notes.append(f"Decisions: the {decision}, without a validation split.")
    unclear = sum(int((decide(task, thresholds.get(task.name)) < 0).sum()) for task in tasks)
    if unclear > (0 if options.skip_missing else missing):
        notes.append(
            f"{unclear} answers are missing, or have none of the classes or several; they count as "
            "wrong."
        )
    notes.append(
        "Image-blind baseline: always the most frequent class, accuracy "
        f"{majority_accuracy(tasks):.3f}."
    )
    if thresholds and any(task.positive is None for task in tasks):
        notes.append("With several classes, the decision is still the most probable choice.")
    positives = {t.classes[t.positive] for t in tasks if t.positive is not None}
    if positives:
        notes.append(f"Positive class: {', '.join(sorted(positives))}.")
    for task in tasks:
        where = f"{task.name}: " if task.name else ""
        for index, name in enumerate(task.classes):
            if not (task.gold == index).any():
                notes.append(f"{where}No example of {name!r}: its AUROC is undefined.")
    return notes


def report_tables(
    results: Sequence[Mapping[str, Any]],
    overall: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Any]],
) -> list[Table]:
    text = "With 95% intervals of a bootstrap."
    if len(results) > 1:
        tables = [
            scores_table("Mean over the findings", overall, text),
            wide_table("By finding", {own["finding"]: own["scores"] for own in results}),
        ]
    else:
        tables = [scores_table("All questions", overall, text)]
    for own in results:
        suffix = f": {own['finding']}" if own["finding"] else ""
        if own["by class"]:
            at = "threshold of each class" if own["thresholds"] else "most probable choice"
            note = f"Sensitivity, specificity and F1 are about the {at}."
            tables.append(wide_table(f"Each class against the rest{suffix}", own["by class"], note))
        tables.append(confusion_table(own["confusion"], f"Confusion matrix{suffix}"))
    for field in dict.fromkeys(name.partition(": ")[0] for name in groups):
        rows = {
            f"{name.partition(': ')[2]} (n {own['n']})": own["scores"]
            for name, own in groups.items() if name.startswith(f"{field}: ")
        }  # fmt: skip
        tables.append(wide_table(f"By {field}", rows))
    return tables
