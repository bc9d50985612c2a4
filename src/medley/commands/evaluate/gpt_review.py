"""`medley evaluate gpt-review`: a judge scores two answers to each question, side by side.

Layouts and files are LLaVA's (text, visual, bench) and LLaVA-Med's; what the judge is told is ours
unless --rule names another file. --similarity_model needs no judge and no key.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medley.commands.evaluate.summarize import groups_text, reviews
from medley.commands.model_options import check_output, check_seed
from medley.datasets.base import RecordError, resolve_image_path
from medley.errors import UserError
from medley.evaluation import judge_scores
from medley.evaluation.cases import Example, ScoredExample
from medley.evaluation.judge import DryRun, JudgeOptions, JudgeStats, ask_judge, note_of
from medley.evaluation.judge_prompts import JudgeItem, JudgePrompts, Layout, review_row, reviews_of
from medley.evaluation.report import (
    Cell,
    Table,
    kinds_table,
    measures_of,
    measures_table,
    report_path,
    write_report,
)
from medley.evaluation.similarity import SentenceSimilarity, require_folder
from medley.utils.chat_client import RequestFailed
from medley.utils.cli_options import resolved
from medley.utils.files import atomic_file
from medley.utils.manifest import write_manifest

POINTS = 10  # the best score of a judge


@dataclass(frozen=True, kw_only=True)
class ReviewOptions(JudgeOptions):
    """Has a judge score two answers to each question.

    Args:
        questions: LLaVA's questions (question_id, text, category, image) or LLaVA-Med's (with
            gpt4_answer, fig_label, fig_caption), JSONL
        answers: answer files; the reference's and the model's, for llava_med the model's alone
        output: JSON file of the scores; reviews, cases and a page beside it
        layout: llava for words, llava_visual and llava_bench with what is known of the pictures,
            llava_med with captions
        context: JSONL of what is known of the pictures
        rule: file of what the judge is told, ours or LLaVA's rule.json
        image_folder: where the questions' pictures are, for the page
        similarity_model: folder of a model of sentences that compares answers with the reference
        compat: published for LLaVA-Med's own layout of mentions and questions, and for both
            programs' own ways to read a reply
        seed: seed of the intervals
    """

    questions: Path
    answers: list[Path]
    output: Path
    layout: Layout = "llava_med"
    context: Path | None = None
    rule: Path | None = None
    image_folder: Path | None = None
    similarity_model: Path | None = None
    compat: Literal["none", "published"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_judge()
        if self.endpoint is None and self.similarity_model is None:
            raise UserError("name a judge (--endpoint, --judge) or a --similarity_model")
        check_output(self.output, self.questions, *self.answers, self.context, self.rule)
        check_seed(self.seed)
        require_folder(self.similarity_model)

    def pair_of(self, reply: str) -> tuple[float, float] | None:
        """The two scores of a reply; None where it cannot be read (where LLaVA's program writes
        -1 for both)."""
        if self.compat == "none":
            return judge_scores.parse_pair(reply)
        if self.layout == "llava_med":
            try:
                return judge_scores.parse_pair_as_llava_med(reply)
            except UserError:
                return None
        first, second = judge_scores.parse_pair_as_llava(reply)
        return (first, second) if min(first, second) >= 0 else None


def review(options: ReviewOptions) -> None:
    rules = JudgePrompts.read(options.rule)
    contexts = None if options.context is None else list(reviews(options.context))
    asked = reviews_of(
        options.layout, list(reviews(options.questions)),
        [(path, list(reviews(path))) for path in options.answers], contexts,
        options.compat == "published",
    )  # fmt: skip
    falls_back = options.layout in ("llava", "llava_med") or options.rule is None
    messages = {n: rules.messages(one, falls_back) for n, one in enumerate(asked)}
    replies: dict[int, str | RequestFailed] = {}
    similar, folder = [], options.similarity_model
    if folder is not None and not options.dry_run:
        model = SentenceSimilarity(folder)
        similar = model.between([one.second for one in asked], [one.first for one in asked])
    if options.endpoint is not None:
        kept = options.output.with_name(f"{options.output.name}.replies.jsonl")
        try:
            replies = ask_judge(
                options, messages, kept, lambda _, reply: options.pair_of(reply) is not None
            )
        except DryRun:
            return
    pairs = {n: options.pair_of(r) for n, r in replies.items() if isinstance(r, str)}
    name = f"similarity to the reference ({folder.name if folder else ''}; no judge's score)"
    scored = [
        _scored(options, one, replies.get(n), pairs.get(n), {name: similar[n]} if similar else {})
        for n, one in enumerate(asked)
    ]
    counts = JudgeStats.of(replies, {n: pairs.get(n) is not None for n in replies})
    values: dict[str, Any] = {"evaluation": "gpt-review", "layout": options.layout}
    values["scores"] = measures_of(scored, options.seed)
    said = "Points in percent of ten."
    tables = [
        measures_table("All questions", values["scores"], text=said),
        kinds_table("By category", scored, options.seed),
    ]
    if options.endpoint is not None:
        groups = _groups(asked, pairs)
        values["judge"] = {"model": options.judge, **counts.values()}
        values["groups"] = {name: summary.published() for name, summary in groups.items()}
        tables.append(_groups_table(groups))
        _write_reviews(options, asked, replies, pairs)
    notes = [f"{len(asked)} questions of {options.questions}."]
    notes += [counts.line()] if options.endpoint is not None else []
    write_report(options.output, "Answers side by side", values, tables, scored, notes)
    inputs = [options.questions, *options.answers]
    write_manifest(options.output, resolved(options), inputs, None)
    print("\n".join(notes))
    for measure, value in values["scores"].items():
        print(f"{measure}: {value['percent']:.1f} % of {value['n']}")
    if options.endpoint is not None:
        print(groups_text(_groups(asked, pairs)))
    print(f"{options.output}: scores; {report_path(options.output)} shows some")
    counts.check()


def _scored(
    options: ReviewOptions,
    one: JudgeItem,
    reply: str | RequestFailed | None,
    pair: tuple[float, float] | None,
    similar: dict[str, float],
) -> ScoredExample:
    scores = dict(similar)
    if pair is not None:
        scores |= {"reference's points": pair[0] / POINTS, "model's points": pair[1] / POINTS}
        if pair[0]:
            scores["model relative to the reference"] = pair[1] / pair[0]
    image = None
    if one.image:
        try:
            image = resolve_image_path(one.image, options.image_folder)
        except RecordError:
            image = None  # outside of --image_folder: it is not shown
    case = Example(one.identifier, one.question, one.first, one.second, one.category, image)
    note = "" if reply is None else note_of(reply, pair is not None)
    return ScoredExample(case, scores, note)


def _groups(
    asked: Sequence[JudgeItem], pairs: dict[int, tuple[float, float] | None]
) -> dict[str, judge_scores.Summary]:
    """LLaVA-Med's groups: by type (LLaVA's category), of all, and by domain."""
    rows = []
    for n, pair in pairs.items():
        if pair is not None:
            rows.append(({**asked[n].row, "type": asked[n].category or None}, pair))
    return judge_scores.by_group(rows, "overall")


def _groups_table(groups: dict[str, judge_scores.Summary]) -> Table:
    rows = [
        [Cell(name), Cell(f"{s.reference:.2f}"), Cell(f"{s.model:.2f}"), Cell(f"{s.of_ratios:.1f}"),
         Cell(str(s.n))]
        for name, s in groups.items()
    ]  # fmt: skip
    columns = ("", "reference", "model", "relative (percent)", "n")
    return Table("As LLaVA-Med sums up", columns, rows)


def _write_reviews(
    options: ReviewOptions,
    asked: Sequence[JudgeItem],
    replies: dict[int, str | RequestFailed],
    pairs: dict[int, tuple[float, float] | None],
) -> None:
    path = options.output.with_name(f"{options.output.name}.reviews.jsonl")
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for n, one in enumerate(asked):
            reply = replies[n]
            said = reply.strip() if isinstance(reply, str) else None
            pair = pairs.get(n)
            if pair is None and said is not None and options.compat == "published":
                pair = (-1, -1)
            row = review_row(options.layout, n + 1, one, said, pair)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
