"""`medley answer`: questions about images -> LLaVA's answer file.

Questions are LLaVA's files: JSON Lines (question_id, image, text), or a JSON list as in LLaVA-Med's
VQA data (id, image, conversations). `--format` reads any other dataset that `medley convert` reads.
Answers are appended as they are ready; the same command resumes an interrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medley.commands.model_options import BatchOptions, QuestionOptions
from medley.errors import PartialFailure, UserError
from medley.evaluation.answer_files import (
    format_answer,
    model_name,
    question_keys,
    read_answers,
    shard,
    sort_answers,
)
from medley.evaluation.answer_shards import (
    check_devices,
    merge_shards,
    parse_devices,
    run_on_devices,
    split_answers,
)
from medley.evaluation.answering import answer_once, answer_twice
from medley.evaluation.questions import Question
from medley.generation import Mode
from medley.inference.batch import save_images
from medley.inference.response import Response
from medley.utils.cli_options import resolved
from medley.utils.jsonl import append_jsonl
from medley.utils.manifest import read_manifest, write_manifest
from medley.utils.run_identity import check_same_run, run_identity

_NOT_IN_IDENTITY = (
    "output", "batch_size", "deterministic", "device", "devices", "num_chunks", "chunk_idx",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(BatchOptions, QuestionOptions):
    """Answers questions about images.

    Args:
        questions: the questions: a file, or the folder of a published dataset
        output: the answer file (JSON Lines)
        num_chunks: number of chunks that the questions are split into
        chunk_idx: the chunk to answer, from 0
        devices: GPUs that each answer one chunk, such as 0-7 or 0,2; the answers are then merged
        answer_prompter: request a second, short answer and append it to the first one, as LLaVA
        model_id: name of the model in the answer file; by default the checkpoint's name
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
                "(--num_chunks - 1)."
            )
        if self.devices is not None and self.num_chunks > 1:
            raise UserError(
                "--devices splits the questions into chunks itself. Remove --num_chunks."
            )
        if self.devices is not None and ":" in self.device:
            raise UserError(
                f"--devices selects the GPUs (got --device {self.device}). Remove its number."
            )
        if self.answer_prompter and self.mode != "text":
            raise UserError("--answer_prompter requires --mode text.")
        self.check_batch_size()
        self.generation()

    def identity(self) -> dict[str, Any]:
        return run_identity(self, _NOT_IN_IDENTITY, questions=self.questions)


def answer(options: AnswerOptions) -> None:
    devices = [] if options.devices is None else parse_devices(options.devices)
    if options.devices is not None and options.device != "cpu":
        check_devices(options.devices, devices)
    questions = options.questions_in(options.questions)
    if options.output.exists():
        recorded = read_manifest(options.output).get("options", {})
        check_same_run(recorded, options.identity(), options.output)
    write_manifest(options.output, options.identity(), [options.questions], None)
    if devices:
        _answer_on_devices(options, questions, devices)
        return
    keys = list(question_keys((q.identifier, q.raw_text) for q in questions))
    answered = read_answers(options.output)
    own = shard(range(len(questions)), options.num_chunks, options.chunk_idx)
    pending = [number for number in own if keys[number] not in answered]
    if len(pending) < len(own):
        print(f"{options.output}: {len(own) - len(pending)} questions are answered already")
    if not pending:
        sort_answers(options.output, keys)
        return
    model = options.load(min(options.max_num_seqs, len(pending)))
    name = options.model_id or model_name(options.ckpt)
    answer_questions = answer_twice if options.answer_prompter else answer_once
    answers = answer_questions(
        model, [question.prompt for question in questions], pending, options.generation(model),
        options.max_num_seqs,
    )  # fmt: skip
    failed: list[str] = []
    for number, response in tqdm(answers, desc="answering", unit=" answers", total=len(pending)):
        if isinstance(response, Response):
            folder = options.output.with_name(f"{options.output.stem}_images")
            images = [
                f"{folder.name}/{path.name}"
                for path in save_images(folder, f"{number:06d}", response)
            ]
            row = format_answer(questions[number], response.text, name, images)
            append_jsonl(options.output, row)
        else:
            failed.append(f"question {questions[number].identifier}: {response}")
    sort_answers(options.output, keys)
    print(f"{len(own) - len(failed)} answers in {options.output}")
    if failed:
        raise PartialFailure(
            f"{len(failed)} of {len(own)} questions were not answered. First error: {failed[0]}"
        )


def _answer_on_devices(
    options: AnswerOptions, questions: Sequence[Question], devices: Sequence[int]
) -> None:
    """Runs one process for each device and merges their answers."""
    count = len(devices)
    shards = [
        replace(options, devices=None, output=path, num_chunks=count, chunk_idx=index)
        for index, path in enumerate(split_answers(options.output, questions, count))
    ]
    for own in shards:
        write_manifest(own.output, own.identity(), [own.questions], None)
    failed = run_on_devices("answer", [resolved(own) for own in shards], devices)
    answered = merge_shards(options.output, questions)
    if failed:
        raise PartialFailure(
            f"The processes on devices {', '.join(map(str, failed))} failed. {options.output} "
            "contains the answers so far. Run the same command to resume."
        )
    print(f"{len(answered)} answers in {options.output}")
