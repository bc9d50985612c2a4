"""`medley evaluate science-qa` and `science-qa-judge`: scores answers to ScienceQA's problems."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from medley.commands.model_options import check_output, check_seed
from medley.evaluation import science_qa, science_qa_judge
from medley.evaluation.judge import PROMPTS, DryRun, JudgeOptions, ask_judge, read_templates
from medley.evaluation.predictions import missing_ids, read_unique_answers
from medley.evaluation.report import format_interval, report_path, write_report
from medley.evaluation.science_qa import ScienceQaScores
from medley.utils.cli_options import Alias, resolved
from medley.utils.files import write_json
from medley.utils.jsonl import write_jsonl
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class ScienceQaOptions:
    """Scores answers to ScienceQA.

    Args:
        base_dir: folder of problems.json and pid_splits.json
        pred: answer file, JSONL with question_id and text
        output: JSON file of the correct and incorrect rows; examples and an HTML report are written
            beside it
        output_result: JSON file of accuracy, results and outputs
        split: split of the answered problems
        compat: llava or llava_med reproduces the published parser of letters; llava_med also leaves
            out problems without an answer, and samples a letter if an answer has none
        image_folder: folder of the problems' images, for the HTML report
        seed: seed of the letters that llava_med samples
    """

    base_dir: Path
    pred: Path
    output: Path
    output_result: Path | None = None
    split: str = "test"
    compat: science_qa.Compat = "none"
    image_folder: Path | None = None
    seed: int = 0


def score_science_qa(options: ScienceQaOptions) -> None:
    check_output(options.output, options.pred, options.output_result)
    check_seed(options.seed)
    problems, wanted = science_qa.read_problems(options.base_dir, options.split)
    answers = read_unique_answers(options.pred)
    scores = science_qa.score_answers(problems, wanted, answers, options.compat, options.seed)
    write_scores(options, problems, scores)
    write_manifest(options.output, resolved(options), [options.pred], None)
    treatment = "left out" if options.compat == "llava_med" else "counted as wrong"
    missing = len(missing_ids(wanted, answers))
    print(f"{missing} problems have no answer ({treatment}), {scores.unparsed} answers no letter")
    if unknown := len(answers.keys() - set(wanted)):
        print(f"{unknown} answers belong to no problem of --split {options.split}: not scored")


def write_scores(
    options: ScienceQaOptions | AdjudicateOptions,
    problems: dict[str, Any],
    scores: ScienceQaScores,
    notes: tuple[str, ...] = (),
    problem_notes: dict[str, str] | None = None,
) -> None:
    """Writes LLaVA's two files and the report, and prints LLaVA's summary."""
    if options.output_result is not None:
        write_json(options.output_result, scores.result)
    examples = scores.to_examples(problems, options.image_folder, problem_notes)
    values = {"correct": scores.correct, "incorrect": scores.incorrect}
    title, tables = f"ScienceQA, {options.split}", scores.tables(problems)
    write_report(options.output, title, values, tables, examples, notes)
    print(scores.summary())
    if scores.result["count"]:
        interval = format_interval(scores.accuracy())
        print(f"95% interval: {interval}. HTML report: {report_path(options.output)}.")


@dataclass(frozen=True, kw_only=True)
class AdjudicateOptions(JudgeOptions):
    """Has a judge decide between two ScienceQA answer files where they differ.

    Args:
        base_dir: folder of problems.json and pid_splits.json
        pred: answer file, JSONL with question_id and text
        other: answers of another model; an answer file, or a result file with outputs
        output: JSON file of the correct and incorrect rows; examples and an HTML report are written
            beside it
        output_result: JSON file of accuracy, results and outputs
        split: split of the answered problems
        image_folder: folder of the problems' images, for the HTML report
        judge_prompts: YAML file with the templates system and question
    """

    aliases: ClassVar = {"prompts": Alias("judge_prompts")}
    base_dir: Path
    pred: Path
    other: Path
    output: Path
    output_result: Path | None = None
    split: str = "test"
    image_folder: Path | None = None
    judge_prompts: Path = PROMPTS / "science_qa.yaml"

    def __post_init__(self) -> None:
        self.check_judge()
        self.judge_client()
        check_output(self.output, self.pred, self.other, self.output_result)


def adjudicate(options: AdjudicateOptions) -> None:
    """Scores the common letter where both agree, else the judge's letter.

    Where the judge's reply has no letter, the first file's answer counts.
    """
    problems, wanted = science_qa.read_problems(options.base_dir, options.split)
    first = read_unique_answers(options.pred)
    second = science_qa_judge.read_outputs(options.other)
    for path, answers in ((options.pred, first), (options.other, second)):
        science_qa_judge.check_complete(path, answers, wanted)
    placeholders = ("question", "first", "second")
    templates = read_templates(options.judge_prompts, system=(), question=placeholders)
    differing = science_qa_judge.disagreements(wanted, first, second, problems)
    requests = {
        name: science_qa_judge.judge_messages(
            options.base_dir, name, problems[name],
            (str(first[name]["text"]), str(second[name]["text"])), templates,
        )
        for name in differing
    }  # fmt: skip
    cache = options.output.with_name(f"{options.output.name}.replies.jsonl")
    try:
        replies = ask_judge(options, requests, cache, science_qa_judge.has_letter)
    except DryRun:
        return
    decision = science_qa_judge.Adjudication.from_replies(first, replies)
    before = [science_qa.score_answers(problems, wanted, own) for own in (first, second)]
    notes = (
        f"The answers to {len(differing)} of {len(wanted)} problems differ. "
        f"{decision.stats.summary()}.",
        f"Accuracy before: {before[0].result['acc']:.2f} and {before[1].result['acc']:.2f} "
        "percent.",
    )
    answers_file = options.output.with_name(f"{options.output.name}.answers.jsonl")
    write_jsonl(answers_file, (decision.answers[name] for name in wanted))
    scores = science_qa.score_answers(problems, wanted, decision.answers)
    write_scores(options, problems, scores, notes, decision.notes)
    write_manifest(options.output, resolved(options), [options.pred, options.other], None)
    print("\n".join(notes))
    decision.stats.check()
