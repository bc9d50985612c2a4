"""`medley evaluate medmax`: answers and scores MedMax's suite.

The data are MedMax's evaluation records (task_name, question_type, prompt, answer, image_path) as
JSONL, Parquet or CSV. OUTPUT contains answers.jsonl (from which an interrupted run resumes),
images/, MedMax's results/NAME.json and logs/NAME.json, and NAME.json with an HTML report.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from medley.commands.evaluate.medmax_options import MedmaxOptions
from medley.errors import PartialFailure
from medley.evaluation import medmax_suite as suite
from medley.evaluation.judge import DryRun, JudgeStats, read_templates
from medley.evaluation.judge_prompts import JudgePrompts
from medley.evaluation.medmax_answers import ANSWERS_FILE, generate_answers, read_answers
from medley.evaluation.medmax_metrics import (
    score_image_similarity,
    score_text_similarity,
    score_with_judge,
)
from medley.evaluation.medmax_scores import JUDGED, GeneratedAnswer, MedmaxScores, merge_results
from medley.evaluation.medmax_suite import GENERATION, MIXED, MedmaxRecord
from medley.evaluation.report import (
    aggregate_scores,
    format_scores,
    kinds_table,
    report_path,
    write_report,
)
from medley.utils.files import nan_to_null, read_json, write_json
from medley.utils.manifest import read_manifest, write_manifest
from medley.utils.run_identity import check_same_run


def medmax(options: MedmaxOptions) -> None:
    image_folder = options.image_folder or options.eval_data.parent
    groups = options.groups()
    records = suite.read_records(options.eval_data, groups, options.limit, image_folder)
    counts = Counter(record.group for record in records)
    for group in (group for group in suite.GROUPS if group in groups):
        print(f"{group}: {counts[group]} records")
    placeholders = ("question", "gold", "answer")
    templates = read_templates(
        options.judge_prompts, system=(), open=placeholders, mixed=placeholders
    )
    chat_prompts = JudgePrompts.read(options.chat_judge_prompts)
    scores = MedmaxScores(records, answer_records(options, records), options.as_published)
    try:
        stats = judge_answers(options, scores, templates, chat_prompts)
    except DryRun:
        return
    if options.sentence_model is not None:
        score_text_similarity(scores, options.sentence_model)
    if options.clip_model is not None:
        score_image_similarity(scores, options.clip_model, options.batch_size)
    elif unscored := len(scores.with_images()):
        print(f"{unscored} captions and images have no score. They need --clip_model.")
    write_results(options, scores, stats)


def answer_records(
    options: MedmaxOptions, records: Sequence[MedmaxRecord]
) -> dict[int, GeneratedAnswer]:
    """The answers by record number, resumed from an interrupted run."""
    file = options.output / ANSWERS_FILE
    if file.exists():
        recorded = read_manifest(options.output).get("options", {})
        check_same_run(recorded, options.identity(), options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    write_manifest(options.output, options.identity(), [options.eval_data], None)
    answers = read_answers(options.output)
    remaining = [record for record in records if record.number not in answers]
    if len(remaining) < len(records):
        print(f"{file}: resuming after {len(records) - len(remaining)} answers")
    if not remaining:
        return answers
    # Text tasks alone need no VQGAN decoder.
    generates_images = any(record.task in (GENERATION, MIXED) for record in remaining)
    model_options = options if generates_images else replace(options, mode="text")
    model = model_options.load(min(options.max_num_seqs, len(remaining)))
    completed = generate_answers(
        model, remaining, options.output, options.prompt_processor,
        lambda record: options.generation_of(record, model), options.max_num_seqs,
    )  # fmt: skip
    answers |= dict(tqdm(completed, desc="answering", unit=" answers", total=len(remaining)))
    return answers


def judge_answers(
    options: MedmaxOptions,
    scores: MedmaxScores,
    templates: dict[str, str],
    chat_prompts: JudgePrompts,
) -> JudgeStats | None:
    """Has the judge score open, mixed and chat answers; None without a judge."""
    if options.endpoint is not None:
        cache = options.output / "replies.jsonl"
        return score_with_judge(options, scores, templates, chat_prompts, cache)
    unscored = len(scores.answered(*JUDGED))
    if unscored and options.sentence_model is None:
        print(
            f"{unscored} open, mixed and chat answers have no score. They need a judge "
            "(--endpoint and --judge) or a --sentence_model."
        )
    return None


def write_results(options: MedmaxOptions, scores: MedmaxScores, stats: JudgeStats | None) -> None:
    """Writes MedMax's result and log files and the report.

    Raises PartialFailure if an answer or a judge's reply is missing.
    """
    results = nan_to_null(scores.results())
    for folder, content in (("results", results), ("logs", nan_to_null(scores.logs()))):
        path = options.output / folder / f"{options.name}.json"
        before = read_json(path) if path.exists() else {}
        write_json(path, merge_results(before, content))
    scored = scores.to_examples()
    metrics = aggregate_scores(scored, options.seed)
    values: dict[str, Any] = {"evaluation": "medmax", "results": results, "scores": metrics}
    notes = [f"{options.ckpt}: {len(scored)} records of {options.eval_data}."]
    if stats is not None:
        values["judge"] = {"model": options.judge, **stats.to_json()}
        notes.append(f"{stats.summary()}.")
    failures = [answer.error for answer in scores.answers.values() if answer.error]
    if failures:
        notes.append(f"{len(failures)} records have no answer; the first error: {failures[0]}")
    output = options.output / f"{options.name}.json"
    tables = [kinds_table("By task", scored, options.seed)]
    write_report(output, f"MedMax's suite, {options.name}", values, tables, scored, notes)
    print(format_scores(metrics))
    for name, result in results.items():
        print(f"{name}: {json.dumps(result)}")
    print("\n".join(notes[1:]))
    print(f"Answers, results and logs: {options.output}. HTML report: {report_path(output)}.")
    if failures:
        raise PartialFailure(
            f"{len(failures)} of {len(scored)} records have no answer; the first error: "
            f"{failures[0]}"
        )
    if stats is not None:
        stats.check()
