"""`medley evaluate medmax`: MedMax's suite, answered and scored.

Data are MedMax's evaluation lines (task_name, question_type, prompt, answer, image_path) as JSONL,
Parquet or CSV. OUTPUT holds answers.jsonl (a run that was stopped goes on), pictures/,
results/NAME.json and logs/NAME.json as MedMax has them, and NAME.json with its page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from medley.commands.evaluate.medmax_options import MedmaxOptions, image_path
from medley.data.document import ContentPart, Document, ImagePart, Turn
from medley.data.vocabulary import IMAGE
from medley.datasets.base import RecordError
from medley.datasets.instructions.captions import context_of
from medley.datasets.readers import records_of
from medley.errors import PartialFailure, UserError
from medley.evaluation import medmax_suite as suite
from medley.evaluation.cases import Example, ScoredExample
from medley.evaluation.judge import (
    DryRun,
    JudgeStats,
    ask_judge,
    filled,
    read_prompts,
)
from medley.evaluation.judge_prompts import JudgeItem, JudgePrompts
from medley.evaluation.medmax_scores import (
    JUDGED,
    LIKENESS,
    Prediction,
    Scores,
    merged,
)
from medley.evaluation.medmax_suite import CAPTIONING, CHAT, GENERATION, MIXED, Row
from medley.evaluation.report import kinds_table, measures_of, report_path, text_table, write_report
from medley.evaluation.similarity import ImageSimilarity, SentenceSimilarity
from medley.images.preprocess import ImageError, open_image
from medley.inference.batch import check_same_options, generate_all, read_existing
from medley.inference.model import Response
from medley.utils.chat_client import Message
from medley.utils.files import check_unicode, nan_to_null, read_json, write_json
from medley.utils.jsonl import append_jsonl
from medley.utils.manifest import read_manifest, write_manifest


def medmax(options: MedmaxOptions) -> None:
    rows = list(read_rows(options))
    places = ("question", "gold", "answer")
    told = read_prompts(options.judge_prompts, system=(), open=places, mixed=places)
    rules = JudgePrompts.read(options.rule)
    scores = Scores(rows, answered(options, rows), options.as_published)
    try:
        counts = judged(options, scores, told, rules)
    except DryRun:
        return
    compare_sentences(options, scores)
    compare_pictures(options, scores)
    write(options, scores, counts)


def read_rows(options: MedmaxOptions) -> Iterator[Row]:
    """The rows of the tasks that were asked for. Raises UserError with the place of a bad one."""
    wanted, counts, n = options.wanted(), dict.fromkeys(suite.TASKS, 0), 0
    for n, (place, _, record) in enumerate(records_of(options.eval_data), 1):
        try:
            if isinstance(record, RecordError):
                raise record
            row = suite.row_of(n - 1, record)
            if row.group in ("closed", "mcq", "open") and (fault := suite.gold_fault(row)):
                raise UserError(fault)
            check_unicode(place, record)
            if row.task == CHAT:
                suite.chat_reference(row.answer)
            if row.image is not None:
                image_path(options, row)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        if row.group in wanted and counts[row.group] != options.limit:
            counts[row.group] += 1
            yield row
    if not any(counts.values()):
        raise UserError(
            f"{options.eval_data}: none of its {n} lines is of {', '.join(sorted(wanted))}"
        )
    for task in suite.TASKS:
        if task in wanted:
            print(f"{task}: {counts[task] or 'no'} rows")


# --- answers ----------------------------------------------------------------------------------


def answered(options: MedmaxOptions, rows: Sequence[Row]) -> dict[int, Prediction]:
    """Answers by the rows' numbers; those of an earlier run that was stopped are kept."""
    file = options.output / "answers.jsonl"
    if file.exists():
        before = read_manifest(options.output).get("options", {})
        check_same_options(before, options.identity(), options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    write_manifest(options.output, options.identity(), [options.eval_data], None)
    found = dict(_kept_of(options.output, row) for row in read_existing(file, "row"))
    left = [row for row in rows if row.number not in found]
    if len(left) < len(rows):
        print(f"{file}: {len(rows) - len(left)} answers are there already")
    if not left:
        return found
    drawing = any(row.task in (GENERATION, MIXED) for row in left)
    # Where nothing is drawn no VQGAN decoder is needed.
    loaded = options if drawing else replace(options, mode="text")
    model = loaded.load(min(options.rows_at_once, len(left)))
    by_number = {row.number: row for row in left}
    asked = (
        (row.number, Document((Turn("user", tuple(prompt_of(options, row))),)),
         options.generation_of(row, model))
        for row in left
    )  # fmt: skip
    complete = options.prompt_processor != "sft"
    stream = generate_all(model, asked, complete, options.rows_at_once)
    for number, answer in tqdm(stream, desc="answering", unit=" answers", total=len(left)):
        found[number] = _kept(options.output, by_number[number], answer)
        if not found[number].error:
            names = [Path(path).name for path in found[number].pictures]
            row = {"row": number, "task": by_number[number].name, "text": found[number].text,
                   "pictures": names}  # fmt: skip
            append_jsonl(file, row)
    return found


def _kept_of(folder: Path, row: dict[str, Any]) -> tuple[int, Prediction]:
    """A line of answers.jsonl. Raises UserError for one that is something else."""
    try:
        pictures = tuple(str(folder / "pictures" / name) for name in row["pictures"])
        return int(row["row"]), Prediction(str(row["text"]), pictures)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'answers.jsonl'}: not an answer ({error})") from error


def prompt_of(options: MedmaxOptions, row: Row) -> list[ContentPart]:
    shown = None
    if row.image is not None and row.task not in (GENERATION, MIXED):
        shown = ImagePart(path=image_path(options, row))
    return suite.prompt_for(options.prompt_processor, row, shown)


def _kept(folder: Path, row: Row, answer: Response | str) -> Prediction:
    if isinstance(answer, str):
        return Prediction("", error=answer)
    names = []
    (folder / "pictures").mkdir(exist_ok=True)
    for place, image in enumerate(answer.images):
        path = folder / "pictures" / f"{row.number:06d}_{place}.png"
        image.save(path)
        names.append(str(path))
    texts = [part.strip() for part in answer.parts if isinstance(part, str)]
    return Prediction(" ".join(text for text in texts if text), tuple(names))


# --- judges and models of likeness --------------------------------------------------------------


def judged(
    options: MedmaxOptions, scores: Scores, told: dict[str, str], rules: JudgePrompts
) -> JudgeStats | None:
    """Asks a judge about all that words alone do not settle; None without one.

    Raises DryRun where only its estimate was asked for.
    """
    rows = scores.answered(*JUDGED)
    if not rows or options.endpoint is None:
        if rows and options.sentence_model is None:
            print(
                f"{len(rows)} open, mixed and chat answers have no score: they need a judge "
                "(--endpoint, --judge) or a --sentence_model"
            )
        return None
    asked = {row.number: messages(scores, row, told, rules) for row in rows}
    kept = options.output / "replies.jsonl"
    replies = ask_judge(options, asked, kept, scores.readable)
    read = {number: scores.take_reply(number, reply) for number, reply in replies.items()}
    return JudgeStats.of(replies, read)


def messages(scores: Scores, row: Row, told: dict[str, str], rules: JudgePrompts) -> list[Message]:
    given = scores.given[row.number].text
    if row.task == CHAT:
        known = suite.chat_reference(row.answer)
        question = row.prompt.replace(IMAGE, "").strip()
        context = context_of(known, True)
        return rules.messages(
            JudgeItem(row.number, row.kind, question, known["gpt4_answer"], given, context)
        )
    text = filled(
        told["mixed" if row.task == MIXED else "open"],
        {"question": row.prompt, "gold": str(row.answer), "answer": given},
    )
    return [{"role": "system", "content": told["system"]}, {"role": "user", "content": text}]


def compare_sentences(options: MedmaxOptions, scores: Scores) -> None:
    folder, rows = options.sentence_model, scores.answered(*JUDGED)
    if folder is None or not rows:
        return
    given = [scores.given[row.number].text for row in rows]
    found = SentenceSimilarity(folder).between(given, [suite.gold_text(row) for row in rows])
    name = f"similarity of words ({folder.name}; no judge's score)"
    for row, value in zip(rows, found, strict=True):
        scores.by_row[row.number][name] = value


def compare_pictures(options: MedmaxOptions, scores: Scores) -> None:
    """Captions with their pictures, drawn pictures with their words, and in mixed answers with the
    picture that is the right answer."""
    rows = scores.with_pictures()
    if options.similarity_model is None or not rows:
        if rows:
            print(f"{len(rows)} captions and pictures have no score: they need a "
                  "--similarity_model")  # fmt: skip
        return
    model = ImageSimilarity(options.similarity_model)
    for start in range(0, len(rows), options.batch_size):
        images: dict[int, list[Image.Image]] = {}
        for row in rows[start : start + options.batch_size]:
            try:
                images[row.number] = [open_image(path) for path in _compared(options, scores, row)]
            except (ImageError, OSError) as error:
                scores.notes[row.number] = f"a picture cannot be compared: {error}"
        for kind in (CAPTIONING, GENERATION, MIXED):
            own = [r for r in rows[start:] if r.number in images and r.task == kind]
            if not own:
                continue
            first = [images[row.number][0] for row in own]
            if kind == MIXED:
                found = model.between(first, [images[row.number][1] for row in own])
            else:
                told = [
                    scores.given[r.number].text if kind == CAPTIONING else r.prompt for r in own
                ]
                found = model.with_texts(first, told)
            for row, value in zip(own, found, strict=True):
                scores.by_row[row.number][f"{LIKENESS} ({model.name})"] = value


def _compared(options: MedmaxOptions, scores: Scores, row: Row) -> list[str]:
    """The pictures that a row's score is about."""
    if row.task == CAPTIONING:
        return [image_path(options, row)]
    drawn = str(scores.given[row.number].drawn)
    return [drawn, image_path(options, row)] if row.task == MIXED else [drawn]


# --- results ----------------------------------------------------------------------------------


def write(options: MedmaxOptions, scores: Scores, counts: JudgeStats | None) -> None:
    """MedMax's result file, its log and the page. Raises DataLost where an answer is missing."""
    output = options.output
    results, logs = scores.results(), scores.logs()
    for folder, found in (("results", results), ("logs", logs)):
        path = output / folder / f"{options.name}.json"
        before = read_json(path) if path.exists() else {}
        write_json(path, merged(before, nan_to_null(found)))
    cases = [case_of(options, scores, row) for row in scores.rows]
    measures = measures_of(cases, options.seed)
    values: dict[str, Any] = {
        "evaluation": "medmax", "results": nan_to_null(results), "scores": measures,
    }  # fmt: skip
    notes = [f"{options.ckpt}: {len(cases)} rows of {options.eval_data}."]
    if counts is not None:
        values["judge"] = {"model": options.judge, **counts.values()}
        notes.append(counts.line())
    failed = [given.error for given in scores.given.values() if given.error]
    if failed:
        notes.append(f"{len(failed)} rows were not answered: {failed[0]}")
    page = output / f"{options.name}.json"
    tables = [kinds_table("By task", cases, options.seed)]
    write_report(page, f"MedMax's suite, {options.name}", values, tables, cases, notes)
    print(text_table(measures))
    for name, value in nan_to_null(results).items():
        print(f"{name}: {json.dumps(value)}")
    print("\n".join(notes[1:]))
    print(f"{output}: answers, results/ and logs/; {report_path(page)} shows some")
    if failed:
        raise PartialFailure(
            f"{len(failed)} of {len(cases)} rows were not answered, the first: {failed[0]}"
        )
    if counts is not None:
        counts.check()


def case_of(options: MedmaxOptions, scores: Scores, row: Row) -> ScoredExample:
    given = scores.given[row.number]
    image = image_path(options, row) if row.image is not None else None
    kind = row.name if row.group == row.kind else f"{row.task}: {row.kind}"
    shown = image if row.task not in (GENERATION, MIXED) else None  # there it is the right answer
    case = Example(row.number, row.prompt, suite.gold_text(row), given.text, kind, shown)
    return ScoredExample(case, scores.by_row[row.number], scores.notes[row.number], given.drawn)
