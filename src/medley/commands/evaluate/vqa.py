"""`medley evaluate vqa`: answers to visual questions -> scores, ours and the published ones."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medley.commands.model_options import QuestionOptions, check_output, check_seed
from medley.errors import PartialFailure, UserError
from medley.evaluation.cases import Example, ScoredExample
from medley.evaluation.comparison import compare_runs, comparison_table
from medley.evaluation.predictions import answers_by, paired, read_candidates
from medley.evaluation.questions import Question
from medley.evaluation.reference_scorers import Compat, is_known, published_scores, published_table
from medley.evaluation.report import (
    Cell,
    Table,
    confusion_table,
    examples_path,
    groups_tables,
    measures_table,
    report_path,
    text_table,
    write_report,
)
from medley.evaluation.vqa import confusion, majority_baseline, own_scores, random_baseline, score
from medley.utils.cli_options import resolved
from medley.utils.files import atomic_file, path_hash
from medley.utils.manifest import write_manifest

RESULTS = "eval_results_med_datasets.jsonl"  # as LLaVA-Med calls it
_PUBLISHED = "As published ({}), in percent"


@dataclass(frozen=True, kw_only=True)
class VqaOptions(QuestionOptions):
    """Scores answers to visual questions.

    Args:
        gt: questions with right answers; with --pred_folder it may be a folder of several,
            NAME.json or NAME/test.json
        pred: the answer file, JSONL of question_id and text
        pred_folder: folder of answer files, each of which is scored
        target_test_type: how the names of these files end, before .jsonl
        output: JSON file of the scores, cases and a page beside it; a folder for --pred_folder
        candidate: open answers of the train set, for run_eval
        compat: LLaVA-Med's published scorers, bug for bug, beside our own
        baseline: folder of an image-text model of transformers, which answers the same questions
        skip_missing: leave questions without an answer out; else they are wrong
        seed: seed of the intervals
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
            raise UserError("name one of --pred, an answer file, and --pred_folder")
        if self.pred_folder is not None and self.baseline is not None:
            raise UserError("--baseline answers the questions of one file: --pred")
        check_seed(self.seed)
        if self.pred is not None:
            check_output(self.output, self.pred, self.gt, self.candidate)
        if "run_eval" in (self.compat or []) and self.candidate is None:
            raise UserError("--compat run_eval needs --candidate, a file of open answers")


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
    """Scores an answer file and writes all that is known of it; gives the JSON's content."""
    cases, missing = paired(questions, pred, options.skip_missing)
    scored = [score(case) for case in cases]
    values = scores_of(options, cases, scored) | {"missing answers": missing}
    untold = sum(question.kind is None for question in questions)
    unknown = sum(not is_known(case) for case in cases)
    notes = [f"{pred.name}: {len(cases)} answers to the questions of {gold.name}."]
    if missing:
        what = "left out" if options.skip_missing else "counted as wrong"
        notes.append(f"{missing} questions have no answer: {what}")
    if untold:
        notes.append(
            f"{untold} questions have no answer_type: yes and no count as closed, the rest as open"
        )
    if unknown and options.compat:
        notes.append(
            f"{unknown} answers are neither OPEN nor CLOSED: the published scorers skip them"
        )
    compared = []
    if options.baseline is not None:
        compared = [compare(options, options.baseline, questions, scored, values, output)]
    tables = tables_of(values) + compared
    write_report(output, f"Answers to {gold.name}", values, tables, scored, notes)
    inputs = [file for file in (gold, pred) if file.is_file()]
    write_manifest(output, resolved(options), inputs, None, questions_hash=path_hash(gold))
    print(text_table(values["scores"]["all"]))
    for name, own in values["baselines"].items():
        print(f"\n{name}:\n{text_table(measures(own['scores']))}")
    for name in options.compat or []:
        print(f"\n{name}, as published (percent):\n{published_table(values[name])}")
    print("\n".join(notes[1:]))
    wrong = sum(one.is_right is False for one in scored)
    print(f"{output}: {wrong} wrong answers; {report_path(output)} shows some, all answers are in "
          f"{examples_path(output)}")  # fmt: skip
    if failed := values.get("baseline", {}).get("not answered"):
        raise PartialFailure(
            f"{len(failed)} questions were not answered by --baseline: {failed[0]}"
        )
    return values


def scores_of(
    options: VqaOptions, cases: Sequence[Example], scored: Sequence[ScoredExample]
) -> dict[str, Any]:
    """Our scores, the published ones, and what both give to somebody who does not look."""
    candidates = None if options.candidate is None else read_candidates(options.candidate)

    def published(of: Sequence[Example]) -> dict[str, Any]:
        return {name: published_scores(of, name, candidates) for name in options.compat or []}

    blind = {
        "always the commonest": majority_baseline(cases),
        "drawn at random": random_baseline(cases, options.seed),
    }
    return {
        "evaluation": "vqa", "scores": own_scores(scored, options.seed), **published(cases),
        "confusion": confusion(cases),
        "baselines": {
            name: {"scores": own_scores([score(case) for case in own], options.seed)["all"],
                   **published(own)}
            for name, own in blind.items()
        },
    }  # fmt: skip


def measures(scores: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in scores.items() if isinstance(value, dict)}


def tables_of(values: dict[str, Any]) -> list[Table]:
    groups, blind = values["scores"], values["baselines"]
    said = "The last columns answer without looking: they are what a score has to be above."
    tables = [
        measures_table("All questions", groups["all"], {n: b["scores"] for n, b in blind.items()},
                       said)
    ]  # fmt: skip
    for name in ("run_eval", "run_eval_batch"):
        if name in values:
            rows = [
                [Cell(row), Cell(f"{value:.4f}"), *(Cell(f"{b[name][row]:.4f}") for b in
                 blind.values())] for row, value in values[name].items()
            ]  # fmt: skip
            tables.append(Table(_PUBLISHED.format(name), ("", "this file", *blind), rows))
    if values["confusion"]:
        tables.append(confusion_table(values["confusion"]))
    return tables + groups_tables(groups)


# --- many answer files ------------------------------------------------------------------------


def score_folder(options: VqaOptions, folder: Path) -> None:
    """Scores every answer file below a folder; the results as LLaVA-Med writes them."""
    suffix = f"{options.target_test_type}.jsonl"
    files = sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())
    if not files:
        raise UserError(f"{folder}: no file in it whose name ends with {suffix}")
    golds = golds_of(options.gt)
    chosen = [(file, gold_of(file.relative_to(folder), golds)) for file in files]
    questions = {name: options.questions_in(golds[name]) for name in {name for _, name in chosen}}
    lines, failed = [], []
    for file, name in chosen:  # all of them were found before the first is scored
        output = options.output / file.relative_to(folder).with_suffix(".json")
        print(f"\n======== {name}: {file}")
        try:
            values = score_file(options, questions[name], golds[name], file, output)
        except UserError as error:
            print(error)
            failed.append(f"{file}: {error}")
            continue
        tables = [published_table(values[compat]) for compat in options.compat or []]
        text = "\n".join(tables) or text_table(values["scores"]["all"])
        row = {"dataset": name, "pred_file": str(file), "results": text}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    with atomic_file(options.output / RESULTS) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    print(f"{options.output / RESULTS}: {len(lines)} answer files")
    if failed:
        raise PartialFailure(
            f"{len(failed)} of {len(files)} answer files have no score: {failed[0]}"
        )


def golds_of(path: Path) -> dict[str, Path]:
    """Name of a data set -> its questions."""
    if path.is_file():
        return {path.parent.resolve().name if path.stem == "test" else path.stem: path}
    found = {file.parent.name: file for file in sorted(path.glob("*/test.json"))}
    found |= {file.stem: file for file in sorted(path.glob("*.json"))}
    if not found:
        raise UserError(f"{path}: neither a file, nor a folder of NAME.json or NAME/test.json")
    return found


def gold_of(file: Path, golds: dict[str, Path]) -> str:
    """The data set that an answer file's path below its folder names, as a whole word, in its own
    name first; the only one, if there is one. Raises UserError where none or several fit."""
    if len(golds) == 1:
        return next(iter(golds))
    named: list[str] = []
    for part in (file.name, *reversed(file.parent.parts)):
        found = [name for name in golds if _names(part, name)]
        named = [n for n in found if not any(n != m and _names(m, n) for m in found)]
        if named:
            break
    if len(named) != 1:
        raise UserError(
            f"{file}: its path names {', '.join(named) or 'none'} of the data sets "
            f"{', '.join(golds)}, expected one"
        )
    return named[0]


def _names(text: str, name: str) -> bool:
    word = rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"
    return re.search(word, text, re.IGNORECASE) is not None


# --- another model beside it ------------------------------------------------------------------


def compare(
    options: VqaOptions,
    baseline: Path,
    questions: Sequence[Question],
    scored: Sequence[ScoredExample],
    values: dict[str, Any],
    output: Path,
) -> Table:
    """Has another model answer the same questions, and says by how much they differ."""
    from medley.evaluation.baseline import write_answers  # brings transformers' image-text models

    file = output.with_name(f"{output.name}.baseline.jsonl")
    failed = write_answers(baseline, questions, file)
    if not answers_by(file):
        raise UserError(f"--baseline {baseline}: not one question was answered: {failed[0]}")
    own = [score(case) for case in paired(questions, file, skip_missing=True)[0]]
    values["baseline"] = {
        "path": str(baseline),
        "scores": own_scores(own, options.seed)["all"],
        "differences": (found := compare_runs(own, scored, options.seed)),
        "not answered": failed,
    }
    print(f"{baseline}:\n{text_table(measures(values['baseline']['scores']))}\n")
    return comparison_table(f"Beside {baseline.name}", found, (baseline.name, "this file"))
