"""`medley evaluate science-qa` and `science-qa-judge`: answers to ScienceQA's problems."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medley.commands.model_options import check_output, check_seed
from medley.datasets.base import RecordError
from medley.datasets.science_qa import PROBLEMS, SPLITS, texts
from medley.errors import UserError
from medley.evaluation import science_qa
from medley.evaluation.cases import ScoredExample
from medley.evaluation.confidence import share_interval
from medley.evaluation.judge import (
    PROMPTS,
    DryRun,
    JudgeOptions,
    JudgeStats,
    ask_judge,
    filled,
    note_of,
    read_prompts,
)
from medley.evaluation.predictions import by_identifier, missing_ids
from medley.evaluation.report import confusion_table, measures_table, report_path, write_report
from medley.utils.chat_client import Message
from medley.utils.cli_options import resolved
from medley.utils.files import atomic_file, read_json, write_json
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class ScienceQaOptions:
    """Scores answers to ScienceQA.

    Args:
        base_dir: folder of problems.json and pid_splits.json
        pred: the answer file, JSONL of question_id and text
        output: JSON file of the right and the wrong rows, cases and a page beside it
        output_result: JSON file of accuracy, results and outputs
        split: the split that was answered
        compat: llava or llava_med for the published ways to find the letter; LLaVA-Med's leaves
            out problems without an answer, and draws a letter where it finds none
        image_folder: where the problems' pictures are, for the page
        seed: seed of the letters that llava_med draws
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
    problems, wanted = problems_of(options.base_dir, options.split)
    answers = by_identifier(options.pred)
    scores = science_qa.score(problems, wanted, answers, options.compat, options.seed)
    write_scores(options, options.output, options.output_result, problems, scores)
    write_manifest(options.output, resolved(options), [options.pred], None)
    left = "left out" if options.compat == "llava_med" else "counted as wrong"
    missing = len(missing_ids(wanted, answers))
    print(f"{missing} problems have no answer ({left}), {scores.unread} answers name no letter")
    strangers = len(answers.keys() - set(wanted))
    if strangers:
        print(f"{strangers} answers are to no problem of --split {options.split}: not scored")


def problems_of(folder: Path, split: str) -> tuple[dict[str, Any], list[str]]:
    """All problems, and the names of those of a split."""
    problems, splits = read_json(folder / PROBLEMS), read_json(folder / SPLITS)
    if not isinstance(problems, dict) or not isinstance(splits, dict):
        raise UserError(f"{folder}: {PROBLEMS} or {SPLITS} is no object")
    if not isinstance(splits.get(split), list):
        raise UserError(f"--split {split}: there is {', '.join(splits)}")
    wanted = [str(identifier) for identifier in splits[split]]
    if unknown := missing_ids(wanted, problems):
        raise UserError(f"{folder / PROBLEMS}: no problem {unknown[0]}")
    for name in wanted:
        science_qa.check_problem(f"{folder / PROBLEMS}: problem {name}", problems[name])
    return problems, wanted


def write_scores(
    options: ScienceQaOptions | AdjudicateOptions,
    output: Path,
    output_result: Path | None,
    problems: dict[str, Any],
    scores: science_qa.Scores,
    notes: tuple[str, ...] = (),
    told: dict[str, str] | None = None,
) -> None:
    """LLaVA's two files, the page, and the line that LLaVA prints. `told` are notes by problem."""
    result = scores.result
    if output_result is not None:
        write_json(output_result, result)
    n, right = result["count"], result["correct"]
    cases = scores.cases(problems, options.image_folder)
    cases = [ScoredExample(one.case, one.scores, (told or {}).get(one.case.identifier, ""))
             for one in cases]  # fmt: skip
    tables = []
    if n:
        measures = {"accuracy": share_interval(right, n).percent()}
        pictured = [row for row in scores.rows if row["is_multimodal"]]
        own = sum(row["is_multimodal"] for row in scores.correct)
        if pictured:
            measures["accuracy with a picture"] = share_interval(own, len(pictured)).percent()
        chance = sum(1 / len(problems[row["question_id"]]["choices"]) for row in scores.rows) / n
        said = f"Drawn letters would give {100 * chance:.1f} percent."
        tables = [measures_table("All problems", measures, text=said)]
        tables.append(confusion_table(scores.confusion()))
    values = {"correct": scores.correct, "incorrect": scores.incorrect}
    write_report(output, f"ScienceQA, {options.split}", values, tables, cases, notes)
    print(scores.line())
    if n:
        bounds = share_interval(right, n).percent()
        print(f"95 % interval {bounds['low']:.1f} to {bounds['high']:.1f}; {report_path(output)}")


@dataclass(frozen=True, kw_only=True)
class AdjudicateOptions(JudgeOptions):
    """Has a judge settle two answer files to ScienceQA where they differ.

    Args:
        base_dir: folder of problems.json and pid_splits.json
        pred: the answer file, JSONL of question_id and text
        other: the answers of another model: such a file, or a result file with outputs
        output: JSON file of the right and the wrong rows, cases and a page beside it
        output_result: JSON file of accuracy, results and outputs
        split: the split that was answered
        image_folder: where the problems' pictures are, for the page
        prompts: YAML file of system and question
    """

    base_dir: Path
    pred: Path
    other: Path
    output: Path
    output_result: Path | None = None
    split: str = "test"
    image_folder: Path | None = None
    prompts: Path = PROMPTS / "science_qa.yaml"

    def __post_init__(self) -> None:
        self.check_judge()
        self.asked_of()
        check_output(self.output, self.pred, self.other, self.output_result)


def adjudicate(options: AdjudicateOptions) -> None:
    """The letter of both where they agree; else the judge's, and where its reply names none the
    first file's."""
    problems, wanted = problems_of(options.base_dir, options.split)
    first, second = by_identifier(options.pred), _outputs(options.other)
    for path, answers in ((options.pred, first), (options.other, second)):
        if absent := missing_ids(wanted, answers):
            raise UserError(
                f"{path}: {len(absent)} problems have no answer, the first is {absent[0]}"
            )
    places = ("question", "first", "second")
    told = read_prompts(options.prompts, system=(), question=places)
    letters = {
        name: [science_qa.parsed_letter(str(side[name]["text"])) for side in (first, second)]
        for name in wanted
    }
    # Two answers that name no letter agree on nothing.
    differ = [
        n for n in wanted if letters[n][0] != letters[n][1] or science_qa.FAILED in letters[n]
    ]

    def messages(name: str) -> list[Message]:
        try:
            question, _ = texts(problems[name], "QCM-A", False)
        except (KeyError, TypeError, RecordError) as error:
            raise UserError(f"{options.base_dir / PROBLEMS}: problem {name} ({error})") from error
        both = {"first": str(first[name]["text"]), "second": str(second[name]["text"])}
        said = filled(told["question"], {"question": question, **both})
        return [{"role": "system", "content": told["system"]}, {"role": "user", "content": said}]

    def readable(_: str, reply: str) -> bool:
        return science_qa.last_letter(reply) != science_qa.FAILED

    kept = options.output.with_name(f"{options.output.name}.replies.jsonl")
    try:
        replies = ask_judge(options, {n: messages(n) for n in differ}, kept, readable)
    except DryRun:
        return
    read = {
        name: isinstance(reply, str) and readable(name, reply) for name, reply in replies.items()
    }
    notes = {n: note_of(reply, read[n]) or "the judge decided" for n, reply in replies.items()}
    for name in [name for name in differ if read[name]]:
        first[name] = {**first[name], "text": science_qa.last_letter(str(replies[name]))}
    scores = science_qa.score(problems, wanted, first)
    counts = JudgeStats.of(replies, read)
    alone = science_qa.score(problems, wanted, by_identifier(options.pred))
    other = science_qa.score(problems, wanted, second)
    said = (
        f"{len(differ)} of {len(wanted)} problems were answered differently. {counts.line()}.",
        f"Before: {alone.result['acc']:.2f} and {other.result['acc']:.2f} percent.",
    )
    _write_answers(options.output, wanted, first)
    write_scores(options, options.output, options.output_result, problems, scores, said, notes)
    write_manifest(options.output, resolved(options), [options.pred, options.other], None)
    print("\n".join(said))
    counts.check()


def _outputs(path: Path) -> dict[str, Any]:
    """Answers of an answer file, or of a result file (`outputs`)."""
    if path.suffix == ".json":
        found = read_json(path)
        outputs = found.get("outputs") if isinstance(found, dict) else None
        if not isinstance(outputs, dict):
            raise UserError(f"{path}: no result file, it has no outputs by problem")
        if odd := [name for name, text in outputs.items() if not isinstance(text, str)]:
            raise UserError(f"{path}: the output of problem {odd[0]} is no text")
        return {name: {"question_id": name, "text": text} for name, text in outputs.items()}
    return by_identifier(path)


def _write_answers(output: Path, wanted: list[str], answers: dict[str, Any]) -> None:
    """The settled answers, as an answer file."""
    with atomic_file(output.with_name(f"{output.name}.answers.jsonl")) as temporary:
        rows = (json.dumps(answers[name], ensure_ascii=False) + "\n" for name in wanted)
        temporary.write_text("".join(rows), encoding="utf-8")
