"""`medley evaluate vqa`, `science-qa` and `summarize`: answer and review files to scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medley.errors import UserError
from medley.evaluation import judging, science_qa
from medley.evaluation.intervals import share_interval
from medley.evaluation.pairs import by_identifier, missing_of, read_candidates, read_cases
from medley.evaluation.vqa import Case, Compat, is_right, own_scores, published_scores
from medley.files import read_json, whole_file, write_json, write_manifest
from medley.formats.files import records_of
from medley.formats.sample import RecordError
from medley.formats.science_qa import PROBLEMS, SPLITS
from medley.options import resolved


@dataclass(frozen=True)
class VqaOptions:
    """Scores answers to visual questions.

    Args:
        gt: questions with right answers, LLaVA's list with answer_type
        pred: the answer file, JSONL of question_id and text
        output: JSON file of the scores; the wrong answers go to OUTPUT.wrong.jsonl
        candidate: open answers of the train set, for run_eval
        compat: one of LLaVA-Med's published scorers, bug for bug, beside our own
        skip_missing: leave questions without an answer out; else they are wrong
        seed: seed of the intervals
    """

    gt: Path
    pred: Path
    output: Path
    candidate: Path | None = None
    compat: Compat = "none"
    skip_missing: bool = False
    seed: int = 0


def vqa(options: VqaOptions) -> None:
    cases, missing = read_cases(options.gt, options.pred, options.skip_missing)
    published = None
    if options.compat != "none":
        candidates = None if options.candidate is None else read_candidates(options.candidate)
        published = published_scores(cases, options.compat, candidates)
    groups = own_scores(cases, options.seed)
    wrong = [case for case in cases if not is_right(case)]
    scores: dict[str, Any] = {"missing answers": missing, "scores": groups}
    if published is not None:
        scores[options.compat] = published
    write_json(options.output, scores)
    write_wrong(options.output.with_name(f"{options.output.name}.wrong.jsonl"), wrong)
    write_manifest(options.output, resolved(options), [options.gt, options.pred], None)
    print(table(groups["all"]))
    if missing:
        what = "left out" if options.skip_missing else "counted as wrong"
        print(f"{missing} questions have no answer: {what}")
    if published is not None:
        print(f"\n{options.compat}, as published (percent):")
        print("\n".join(f"{name:20} {value:10.4f}" for name, value in published.items()))
    print(f"{options.output}: scores by group; {len(wrong)} wrong answers beside it")


def table(scores: dict[str, Any]) -> str:
    lines = [f"{'':32}   percent   95 % interval      n"]
    for name, value in scores.items():
        if isinstance(value, dict):
            bounds = f"{value['low']:.1f} to {value['high']:.1f}"
            lines.append(f"{name:32} {value['percent']:9.1f}   {bounds:15} {value['n']:6}")
        else:
            lines.append(f"{name:32} {value:>34}")
    return "\n".join(lines)


def write_wrong(path: Path, cases: Sequence[Case]) -> None:
    with whole_file(path) as temporary:
        rows = (
            {"id": case.identifier, "image": case.image, "answer_type": case.kind,
             "question": case.question, "gold": case.gold, "answer": case.answer}
            for case in cases
        )  # fmt: skip
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class ScienceQaOptions:
    """Scores answers to ScienceQA.

    Args:
        base_dir: folder of problems.json and pid_splits.json
        pred: the answer file, JSONL of question_id and text
        output: JSON file of the right and the wrong rows
        output_result: JSON file of accuracy, results and outputs
        split: the split that was answered
        compat: llava for the published way to find the letter
    """

    base_dir: Path
    pred: Path
    output: Path
    output_result: Path | None = None
    split: str = "test"
    compat: Literal["none", "llava"] = "none"


def score_science_qa(options: ScienceQaOptions) -> None:
    problems = read_json(options.base_dir / PROBLEMS)
    splits = read_json(options.base_dir / SPLITS)
    if options.split not in splits:
        raise UserError(f"--split {options.split}: there is {', '.join(splits)}")
    wanted = [str(identifier) for identifier in splits[options.split]]
    if unknown := missing_of(wanted, problems):
        raise UserError(f"{options.base_dir / PROBLEMS}: no problem {unknown[0]}")
    answers = by_identifier(options.pred)
    rows, result = science_qa.score(problems, wanted, answers, options.compat == "llava")
    write_json(options.output, rows)
    if options.output_result is not None:
        write_json(options.output_result, result)
    write_manifest(options.output, resolved(options), [options.pred], None)
    pictured = [row for own in rows.values() for row in own if row["is_multimodal"]]
    right = sum(row["is_multimodal"] for row in rows["correct"])
    line = f"Total: {result['count']}, Correct: {result['correct']}, Accuracy: {result['acc']:.2f}%"
    if wanted:
        bounds = share_interval(result["correct"], len(wanted)).percent()
        line += f" ({bounds['low']:.1f} to {bounds['high']:.1f})"
    if pictured:
        line += f", IMG-Accuracy: {100 * right / len(pictured):.2f}%"
    print(line)
    unread = sum(row["parsed_ans"] == science_qa.FAILED for own in rows.values() for row in own)
    missing = len(missing_of(wanted, answers))
    print(f"{missing} problems have no answer, {unread - missing} answers name no letter")


@dataclass(frozen=True)
class SummarizeOptions:
    """Sums up a judge's scores.

    Args:
        input: reviews, JSONL; LLaVA-Med's with the judge's reply in gpt_eval or result, or LLaVA's
            with tuple or score
        output: JSON file of the summaries
        compat: llava_med or llava for the published way to read replies and to sum them up
    """

    input: Path
    output: Path
    compat: Literal["none", "llava_med", "llava"] = "none"


def summarize(options: SummarizeOptions) -> None:
    rows = list(reviews(options.input))
    if options.compat == "llava":
        lines = judging.llava_lines(row for _, row in rows)
        write_json(options.output, {"lines": lines})
        print("\n".join(lines))
        return
    read: list[tuple[dict[str, Any], judging.Pair]] = []
    unread: list[str] = []
    for place, row in rows:
        reply = row.get("gpt_eval", row.get("result"))
        if not isinstance(reply, str):
            raise UserError(f"{place}: no gpt_eval or result, the judge's reply")
        published = options.compat == "llava_med"
        pair = judging.parse_pair_as_llava_med(reply) if published else judging.parse_pair(reply)
        if pair is None:
            unread.append(f"{place}: {reply[:80]!r}")
        else:
            read.append((row, pair))
    groups = judging.by_group(read, "overall")
    scores = {
        name: {"gpt4_score": s.reference, "pred_score": s.model,
               "pred_relative_score": s.of_ratios, "data_size": s.n}
        for name, s in groups.items()
    }  # fmt: skip
    write_json(options.output, {"groups": scores, "replies without two scores": unread})
    print(f"{'':24} reference    model   relative      n")
    for name, s in groups.items():
        print(f"{name:24} {s.reference:9.2f} {s.model:8.2f} {s.of_ratios:9.1f}% {s.n:6}")
    if unread:
        print(f"{len(unread)} replies have no two scores, the first: {unread[0]}")


def reviews(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, _, row in records_of(path):
        if isinstance(row, RecordError):
            raise UserError(f"{place}: {row}")
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected an object")
        yield place, row
