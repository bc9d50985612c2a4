"""`medley answer`: questions about pictures -> LLaVA's answer file, in chunks over processes.

Questions are LLaVA's files: JSONL (question_id, image, text), or a JSON list as LLaVA-Med's VQA
data has it (id, image, conversations); or any data set that conversion.convert_dataset reads, by
`--format`. Answers are appended as they come: a run that was stopped goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from tqdm import tqdm

from medley.commands.model_options import BatchOptions, QuestionOptions
from medley.data.document import Document, Turn
from medley.errors import PartialFailure, UserError
from medley.evaluation.answer_files import (
    Key,
    format_answer,
    model_name,
    question_keys,
    read_answers,
    shard,
    sort_answers,
    write_rows,
)
from medley.evaluation.questions import Question
from medley.generation import GenerationOptions
from medley.generation.config import Mode
from medley.inference.batch import check_same_options, generate_all
from medley.inference.model import Model, Response
from medley.utils.cli_options import resolved
from medley.utils.files import path_hash
from medley.utils.jsonl import append_jsonl
from medley.utils.manifest import manifest_path, read_manifest, write_manifest

PROMPTER_TOKENS = 64  # of the second answer that --answer_prompter asks for
PROMPTER = "The answer is"
_WITHOUT_EFFECT = (
    "output", "batch_size", "deterministic", "device", "devices", "num_chunks", "chunk_idx",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(BatchOptions, QuestionOptions):
    """Answers questions about pictures.

    Args:
        questions: the questions: a file, or a data set's folder as published
        output: the answer file, JSONL
        num_chunks: parts that the questions are cut into
        chunk_idx: the part to answer, from 0
        devices: GPUs to run one part on each, such as 0-7 or 0,2; the parts are then gathered
        answer_prompter: ask for a short answer after the first one, and join both, as LLaVA does
        model_id: what the answers call the model; the checkpoint's name unless given
    """

    questions: Path
    output: Path
    num_chunks: int = 1
    chunk_idx: int = 0
    devices: str | None = None
    answer_prompter: bool = False
    model_id: str | None = None
    mode: Mode = "text"

    def __post_init__(self) -> None:
        if not 0 <= self.chunk_idx < self.num_chunks:
            raise UserError(
                f"--chunk_idx is {self.chunk_idx}, expected 0 to {self.num_chunks - 1} "
                "(--num_chunks - 1)"
            )
        if self.devices is not None and self.num_chunks > 1:
            raise UserError("--devices cuts the questions into parts itself; leave --num_chunks")
        if self.answer_prompter and self.mode != "text":
            raise UserError("--answer_prompter asks for words: --mode text")
        self.check_batch()
        self.generation()

    def identity(self) -> dict[str, Any]:
        """What the answers depend on."""
        kept = {n: v for n, v in resolved(self).items() if n not in _WITHOUT_EFFECT}
        return kept | {"questions_hash": path_hash(self.questions)}


def answer(options: AnswerOptions) -> None:
    questions = options.questions_in(options.questions)
    if options.output.exists():
        before = read_manifest(options.output).get("options", {})
        check_same_options(before, options.identity(), options.output)
    write_manifest(options.output, options.identity(), [options.questions], None)
    if options.devices is not None:
        run_on_devices(options, questions)
        return
    prompts = [question.prompt for question in questions]
    keys = list(question_keys((q.identifier, q.asked) for q in questions))
    there = read_answers(options.output)
    own = shard(range(len(questions)), options.num_chunks, options.chunk_idx)
    left = [number for number in own if keys[number] not in there]
    if len(left) < len(own):
        print(f"{options.output}: {len(own) - len(left)} answers are there already")
    if not left:
        sort_answers(options.output, keys)
        return
    model = options.load(min(options.rows_at_once, max(1, len(left))))
    name = options.model_id or model_name(options.ckpt)
    ask = answer_twice if options.answer_prompter else answer_once
    failed: list[str] = []
    found = ask(model, prompts, left, options)
    for number, text in tqdm(found, desc="answering", unit=" answers", total=len(left)):
        if isinstance(text, Response):
            pictures = saved_pictures(options.output, number, text)
            append_jsonl(
                options.output, format_answer(questions[number], text.text, name, pictures)
            )
        else:
            failed.append(f"question {questions[number].identifier}: {text}")
    sort_answers(options.output, keys)
    print(f"{len(own) - len(failed)} answers in {options.output}")
    if failed:
        raise PartialFailure(
            f"{len(failed)} of {len(own)} questions were not answered: {failed[0]}"
        )


def saved_pictures(output: Path, number: int, answer: Response) -> list[str]:
    """The drawn pictures' files, beside the answer file, by their paths from its folder."""
    folder = output.with_name(f"{output.stem}_pictures")
    names = []
    for place, image in enumerate(answer.images):
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:06d}_{place}.png")
        names.append(f"{folder.name}/{number:06d}_{place}.png")
    return names


def answer_once(
    model: Model, prompts: Sequence[Document], left: Sequence[int], options: AnswerOptions
) -> Iterator[tuple[int, Response | str]]:
    """(number, answer or why there is none), as they come."""
    chosen = options.generation(model)
    asked = ((number, prompts[number], chosen) for number in left)
    return generate_all(model, asked, batch_size=options.rows_at_once)


def answer_twice(
    model: Model, prompts: Sequence[Document], left: Sequence[int], options: AnswerOptions
) -> Iterator[tuple[int, Response | str]]:
    """The same with a second, short answer to each, joined to the first as LLaVA does it."""
    chosen = options.generation(model)
    # The second turn has to fit behind the first: its words, and two marks.
    second = len(model.encode_prompt(PROMPTER)) + PROMPTER_TOKENS + 2
    question = Turn("user", (PROMPTER,))
    short = replace(chosen, max_new_tokens=PROMPTER_TOKENS)
    size = 4 * options.rows_at_once
    for start in range(0, len(left), size):
        first: dict[int, Response | str] = {}
        asked: list[tuple[int, Document, GenerationOptions]] = []
        for n in left[start : start + size]:
            try:
                room = model.engine.context - len(model.encode_prompt(prompts[n])) - second
            except UserError as error:
                first[n] = str(error)
                continue
            most = min(chosen.max_new_tokens, max(room, 1))
            asked.append((n, prompts[n], replace(chosen, max_new_tokens=most)))
        first |= dict(generate_all(model, asked, batch_size=options.rows_at_once))
        again = [
            (n, Document((*prompts[n].turns, Turn("assistant", (a.text,)), question)), short)
            for n, a in sorted(first.items())
            if isinstance(a, Response)
        ]
        for n, found in generate_all(model, again, batch_size=options.rows_at_once):
            before = first.pop(n)
            if isinstance(found, Response) and isinstance(before, Response):
                text = f"{before.text}\n The answer is {found.text}"
                yield n, Response([text], found.finish_reason, found.note, found.ids)
            else:
                yield n, found
        yield from first.items()


# --- several devices --------------------------------------------------------------------------


def devices_of(text: str) -> list[int]:
    """`0-7`, `0,2` or `1` -> numbers. Raises UserError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--devices {text}: expected numbers such as 0-7 or 0,2")
        found += range(int(first), int(last if dash else first) + 1)
    if not found or len(set(found)) < len(found):
        raise UserError(f"--devices {text}: no device, or one of them twice")
    return found


def run_on_devices(options: AnswerOptions, questions: Sequence[Question]) -> None:
    """Starts one process a device, each with its part, and gathers the answers."""
    devices = devices_of(options.devices or "")
    count = len(devices)
    parts = [part_file(options.output, count, index) for index in range(count)]
    there = merge_parts(options.output, questions)  # of an earlier run, on any number of devices
    with TemporaryDirectory() as folder, ExitStack() as stack:
        running = []
        for index, (device, part) in enumerate(zip(devices, parts, strict=True)):
            own = replace(options, devices=None, output=part, num_chunks=count, chunk_idx=index)
            keys = shard(
                list(question_keys((q.identifier, q.asked) for q in questions)), count, index
            )
            write_rows(part, [there[key] for key in keys if key in there])
            write_manifest(part, own.identity(), [options.questions], None)
            config = Path(folder) / f"{index}.yaml"
            config.write_text(yaml.safe_dump(resolved(own), allow_unicode=True), encoding="utf-8")
            command = [sys.executable, "-m", "medley.cli", "answer", "--config", str(config)]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(device)}
            process = subprocess.Popen(command, env=environment)
            stack.callback(process.terminate)  # none goes on without us; one that ended stays so
            running.append(process)
        with sigterm_to_exit(signal.SIGTERM):
            failed = [d for p, d in zip(running, devices, strict=True) if p.wait()]
    there = merge_parts(options.output, questions)
    if failed:
        raise PartialFailure(
            f"the parts of devices {', '.join(map(str, failed))} failed; what was answered is in "
            f"{options.output}, the same command goes on"
        )
    print(f"{len(there)} answers in {options.output}")


def merge_parts(output: Path, questions: Sequence[Question]) -> dict[Key, dict[str, Any]]:
    """All answers that are there, by their keys: of the output and of its parts, which are then
    one file, in the order of the questions."""
    keys = list(question_keys((q.identifier, q.asked) for q in questions))
    there = read_answers(output)
    parts = sorted(output.parent.glob(f"{output.stem}.part-*-of-*{output.suffix}"))
    for part in parts:
        index, _, count = part.stem.rpartition(".part-")[2].partition("-of-")
        if not (index.isdigit() and count.isdigit()):
            continue
        own = shard(range(len(questions)), int(count), int(index))
        # Inside of a part equal questions are counted anew.
        local = question_keys((questions[n].identifier, questions[n].asked) for n in own)
        names = dict(zip(local, (keys[n] for n in own), strict=True))
        there |= {names[key]: row for key, row in read_answers(part).items() if key in names}
    if there:
        write_rows(output, [there[key] for key in keys if key in there])
    for part in parts:
        part.unlink()
        manifest_path(part).unlink(missing_ok=True)
    return there


@contextmanager
def sigterm_to_exit(number: signal.Signals) -> Iterator[None]:
    """Turns a signal that would end this process at once into SystemExit."""
    before = signal.signal(number, lambda *_: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(number, before)


def part_file(output: Path, count: int, index: int) -> Path:
    return output.with_name(f"{output.stem}.part-{index}-of-{count}{output.suffix}")
