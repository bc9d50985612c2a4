"""`medley answer`: LLaVA's question files -> LLaVA's answer files, in chunks over processes.

A question file is JSONL (question_id, image, text) or a JSON list as LLaVA-Med's VQA data has it
(id, image, conversations). Answers are appended as they come: a run that was stopped goes on.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from medley.assistant import Answer, Model
from medley.commands.common import ModelOptions
from medley.document import Document, Picture, Turn
from medley.errors import DataLost, UserError
from medley.files import append_line, json_lines, read_json, whole_file
from medley.responses import answer_good
from medley.vocabulary import IMAGE

Item = TypeVar("Item")
PROMPTER_TOKENS = 64  # of the second answer that --answer_prompter asks for
PROMPTER = "The answer is"


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(ModelOptions):
    """Answers LLaVA's question files.

    Args:
        questions: JSONL of question_id, image and text, or a JSON list of id, image, conversations
        image_folder: folder that the questions' pictures are named from
        output: the answer file, JSONL
        num_chunks: parts that the questions are cut into
        chunk_idx: the part to answer, from 0
        devices: GPUs to run one part on each, such as 0-7 or 0,2; the parts are then gathered
        answer_prompter: ask for a short answer after the first one, and join both, as LLaVA does
        model_id: what the answers call the model; the checkpoint's name unless given
        batch_size: questions that are answered at once
    """

    questions: Path
    output: Path
    image_folder: Path | None = None
    num_chunks: int = 1
    chunk_idx: int = 0
    devices: str | None = None
    answer_prompter: bool = False
    model_id: str | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.chunk_idx < self.num_chunks:
            raise UserError(
                f"--chunk_idx is {self.chunk_idx}, expected 0 to {self.num_chunks - 1} "
                "(--num_chunks - 1)"
            )
        if self.devices is not None and self.num_chunks > 1:
            raise UserError("--devices cuts the questions into parts itself; leave --num_chunks")


@dataclass(frozen=True)
class Question:
    identifier: str | int
    text: str
    image: str | None


def read_questions(path: Path) -> list[Question]:
    """Questions in their order. Raises UserError with the place of a bad one."""
    if path.suffix == ".json":
        rows = read_json(path)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a list of questions")
        places = [(f"{path}: record {i}", row) for i, row in enumerate(rows)]
    else:
        places = []
        for number, line in json_lines(path):
            try:
                places.append((f"{path}:{number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg})") from error
    return [_question(place, row) for place, row in places]


def _question(place: str, row: Any) -> Question:
    try:
        identifier = row["question_id"] if "question_id" in row else row["id"]
        text = row["text"] if "text" in row else row["conversations"][0]["value"]
        image = row.get("image")
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{place}: expected question_id and text, or id and conversations ({error} is missing)"
        ) from error
    if not isinstance(text, str) or not isinstance(identifier, str | int):
        raise UserError(f"{place}: the question is no text, or its id neither text nor number")
    # The picture's place in LLaVA's files is before or behind the words; here it comes first.
    return Question(identifier, text.replace(IMAGE, "").strip(), image or None)


def chunk(questions: Sequence[Item], count: int, index: int) -> Sequence[Item]:
    """Part `index` of `count` of nearly the same size; joined in order they are the whole."""
    start, end = (len(questions) * i // count for i in (index, index + 1))
    return questions[start:end]


def answer(options: AnswerOptions) -> None:
    questions = read_questions(options.questions)
    if options.devices is not None:
        on_devices(options, questions)
        return
    own = chunk(questions, options.num_chunks, options.chunk_idx)
    done = finished(options.output)
    left = [(i, q) for i, q in enumerate(own) if q.identifier not in done]
    if done:
        print(f"{options.output}: {len(own) - len(left)} answers are there already")
    model = options.load(min(options.batch_size, max(1, len(left))))
    name = options.model_id or Path(options.ckpt).name
    failed: list[str] = []
    size = 4 * options.batch_size
    for start in tqdm(range(0, len(left), size), desc="answering", unit="batch"):
        part = left[start : start + size]
        for (_, question), text in zip(part, answers_to(model, part, options), strict=True):
            if isinstance(text, Answer):
                append_line(options.output, row_of(question, text.text, name))
            else:
                failed.append(f"question {question.identifier}: {text}")
    in_order(options.output, own)
    print(f"{len(own) - len(failed)} answers in {options.output}")
    if failed:
        raise DataLost(f"{len(failed)} of {len(own)} questions were not answered: {failed[0]}")


def answers_to(
    model: Model, part: Sequence[tuple[int, Question]], options: AnswerOptions
) -> list[Answer | str]:
    """Answers, or why there is none."""
    chosen = options.generation(model)
    numbers = [number for number, _ in part]
    prompts = [Document((Turn("user", _parts(q, options.image_folder)),)) for _, q in part]
    first = answer_good(model, prompts, chosen, False, numbers, options.batch_size)
    if not options.answer_prompter:
        return first
    short = options.generation(model)
    short = type(short)(**{**vars(short), "max_new_tokens": PROMPTER_TOKENS, "mode": "text"})
    good = [n for n, found in zip(numbers, first, strict=True) if isinstance(found, Answer)]
    again = [
        Document((*p.turns, Turn("assistant", (a.text,)), Turn("user", (PROMPTER,))))
        for p, a in zip(prompts, first, strict=True)
        if isinstance(a, Answer)
    ]
    seconds = iter(answer_good(model, again, short, False, good, options.batch_size))
    joined: list[Answer | str] = []
    for found in first:
        second = next(seconds) if isinstance(found, Answer) else None
        if isinstance(found, Answer) and isinstance(second, Answer):
            text = f"{found.text}\n The answer is {second.text}"
            joined.append(Answer([text], second.finish_reason, second.note, second.ids))
        else:
            joined.append(found if second is None else second)
    return joined


def _parts(question: Question, folder: Path | None) -> tuple[str | Picture, ...]:
    if question.image is None:
        return (question.text,)
    path = Path(question.image)
    return (Picture(path=folder / path if folder is not None else path), question.text)


def row_of(question: Question, text: str, model_id: str) -> str:
    return json.dumps(
        {
            "question_id": question.identifier,
            "prompt": question.text,
            "text": text,
            "answer_id": secrets.token_urlsafe(16),
            "model_id": model_id,
            "metadata": {},
        },
        ensure_ascii=False,
    )


def finished(path: Path) -> set[str | int]:
    """Questions that an answer file has answers to."""
    return {row["question_id"] for row in _rows(path)}


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for _, line in json_lines(path) if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # cut short by a kill: that question is answered again
    return rows


def in_order(path: Path, questions: Sequence[Question]) -> None:
    """The answers in the order of their questions, each once."""
    rows = {row["question_id"]: row for row in _rows(path)}
    ordered = [rows[q.identifier] for q in questions if q.identifier in rows]
    with whole_file(path) as temporary:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ordered]
        temporary.write_text("".join(lines), encoding="utf-8")


# --- several devices --------------------------------------------------------------------------


def devices_of(text: str) -> list[int]:
    """`0-7`, `0,2` or `1` -> numbers. Raises UserError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--devices {text}: expected numbers such as 0-7 or 0,2")
        found += range(int(first), int(last if dash else first) + 1)
    return found


def on_devices(options: AnswerOptions, questions: Sequence[Question]) -> None:
    """Starts one process a device, each with its part, and gathers the answers."""
    devices = devices_of(options.devices or "")
    flags = _without(sys.argv[1:], ("--devices", "--output"))
    running = []
    for index, device in enumerate(devices):
        part = part_file(options.output, len(devices), index)
        words = [*flags, "--output", str(part), "--num_chunks", str(len(devices))]
        words += ["--chunk_idx", str(index)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(device)}
        command = [sys.executable, "-m", "medley.cli", *words]
        running.append(subprocess.Popen(command, env=environment))
    failed = [device for process, device in zip(running, devices, strict=True) if process.wait()]
    with whole_file(options.output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for index in range(len(devices)):
            for row in _rows(part_file(options.output, len(devices), index)):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    in_order(options.output, questions)
    if failed:
        raise DataLost(
            f"the parts of devices {', '.join(map(str, failed))} failed; what was answered is in "
            f"{options.output}, the same command goes on"
        )


def part_file(output: Path, count: int, index: int) -> Path:
    return output.with_name(f"{output.stem}.part-{index}-of-{count}{output.suffix}")


def _without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A command line without some flags and their values."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word.partition("=")[0] not in flags:
            kept.append(word)
        skip = word in flags and not skip
    return kept
