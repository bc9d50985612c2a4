"""`medley evaluate gpt-review`: a judge scores two answers to each question side by side.

Layouts and files are those of LLaVA (text, visual, bench) and LLaVA-Med. The judge's prompts are
our own unless --judge_prompts names another file. --sentence_model compares the answers without a
judge and without an API key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from medley.commands.model_options import check_output, check_seed
from medley.errors import UserError
from medley.evaluation.gpt_review import Reviews, parse_review, summaries_table
from medley.evaluation.judge import DryRun, JudgeOptions, ask_judge
from medley.evaluation.judge_prompts import JudgeItem, JudgePrompts, Layout, build_items
from medley.evaluation.judge_scores import format_groups
from medley.evaluation.records import read_objects
from medley.evaluation.report import (
    aggregate_scores,
    kinds_table,
    metrics_table,
    report_path,
    write_report,
)
from medley.evaluation.similarity import SentenceSimilarity, require_model_folder
from medley.utils.chat_client import RequestFailed
from medley.utils.cli_options import Alias, resolved
from medley.utils.manifest import write_manifest


@dataclass(frozen=True, kw_only=True)
class ReviewOptions(JudgeOptions):
    """Has a judge score two answers to each question.

    Args:
        questions: LLaVA's questions (question_id, text, category, image) or LLaVA-Med's (also
            gpt4_answer, fig_label, fig_caption), JSONL
        answers: answer files of the reference and of the model; for llava_med only the model's
        output: JSON file of the scores; reviews, examples and an HTML report are written beside it
        layout: llava for text, llava_visual and llava_bench with texts about the images,
            llava_med with captions
        context: JSONL file of texts about the images
        judge_prompts: file of the judge's prompts, in our layout or LLaVA's rule.json
        image_folder: folder that image paths are relative to, for the HTML report
        sentence_model: folder of a sentence-embedding model that compares each answer with its
            reference
        compat: published reproduces LLaVA-Med's formatting of questions and figure mentions, and
            the parsers of both programs
        seed: seed of the confidence intervals
    """

    aliases: ClassVar = {
        "rule": Alias("judge_prompts"),
        "similarity_model": Alias("sentence_model"),
    }
    questions: Path
    answers: list[Path]
    output: Path
    layout: Layout = "llava_med"
    context: Path | None = None
    judge_prompts: Path | None = None
    image_folder: Path | None = None
    sentence_model: Path | None = None
    compat: Literal["none", "published"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_judge()
        if self.endpoint is None and self.sentence_model is None:
            raise UserError("Set a judge (--endpoint and --judge) or a --sentence_model.")
        inputs = (self.questions, *self.answers, self.context, self.judge_prompts)
        check_output(self.output, *inputs)
        check_seed(self.seed)
        require_model_folder(self.sentence_model)

    @property
    def as_published(self) -> bool:
        return self.compat == "published"


def review(options: ReviewOptions) -> None:
    prompts = JudgePrompts.read(options.judge_prompts)
    items = build_items(
        options.layout, list(read_objects(options.questions)),
        [(path, list(read_objects(path))) for path in options.answers],
        None if options.context is None else list(read_objects(options.context)),
        options.as_published,
    )  # fmt: skip
    try:
        reviews = make_reviews(options, items, prompts)
    except DryRun:
        return
    scored = reviews.to_examples(options.image_folder)
    scores = aggregate_scores(scored, options.seed)
    values: dict[str, Any] = {
        "evaluation": "gpt-review", "layout": options.layout, "scores": scores,
    }  # fmt: skip
    tables = [
        metrics_table("All questions", scores, text="Points are in percent of the maximum of 10."),
        kinds_table("By category", scored, options.seed),
    ]
    notes = [f"{len(items)} questions of {options.questions}."]
    stats, summaries = reviews.stats(), reviews.summaries()
    if options.endpoint is not None:
        values["judge"] = {"model": options.judge, **stats.to_json()}
        values["groups"] = {name: summary.to_llava_med() for name, summary in summaries.items()}
        tables.append(summaries_table(summaries))
        notes.append(f"{stats.summary()}.")
        reviews.write(options.output.with_name(f"{options.output.name}.reviews.jsonl"))
    write_report(options.output, "Pairwise review by a judge", values, tables, scored, notes)
    inputs = [options.questions, *options.answers]
    write_manifest(options.output, resolved(options), inputs, None)
    print("\n".join(notes))
    for metric, value in scores.items():
        print(f"{metric}: {value['percent']:.1f}%, n {value['n']}")
    if options.endpoint is not None:
        print(format_groups(summaries))
    print(f"Scores: {options.output}. HTML report: {report_path(options.output)}.")
    stats.check()


def make_reviews(options: ReviewOptions, items: list[JudgeItem], prompts: JudgePrompts) -> Reviews:
    """Compares the answers with the sentence model and asks the judge, as far as they are set."""
    use_default = options.layout in ("llava", "llava_med") or options.judge_prompts is None
    requests = {n: prompts.messages(item, use_default) for n, item in enumerate(items)}
    similarities: list[float] = []
    if options.sentence_model is not None and not options.dry_run:
        model = SentenceSimilarity(options.sentence_model)
        similarities = model.compare(
            [item.answer for item in items], [item.reference for item in items]
        )
    replies: dict[int, str | RequestFailed] = {}
    if options.endpoint is not None:
        cache = options.output.with_name(f"{options.output.name}.replies.jsonl")
        replies = ask_judge(
            options, requests, cache,
            lambda _, reply: (
                parse_review(options.layout, options.as_published, reply) is not None
            ),
        )  # fmt: skip
    name = options.sentence_model.name if options.sentence_model else ""
    return Reviews(options.layout, options.as_published, items, replies, similarities, name)
