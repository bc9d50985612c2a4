"""`medley answer`: questions about images -> LLaVA's answer file.

Questions are LLaVA's files: JSON Lines (question_id, image, text), or a JSON list as in LLaVA-Med's
VQA data (id, image, conversations). `--format` reads any other dataset that `medley convert` reads.
Answers are appended as they are ready; the same command resumes an interrupted run.
With `--choices` nothing is generated: each answer is the most probable choice, with the
probabilities of all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medley.commands.model_options import RUNTIME_OPTIONS, BatchOptions, QuestionOptions
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
from medley.evaluation.answering import answer_once, answer_twice, score_choices
from medley.evaluation.question_choices import CHOICE, choices_of, parse_choices
from medley.evaluation.questions import Question
from medley.generation import GenerationOptions, Mode
from medley.inference.batch import save_images
from medley.inference.choice_scoring import ChoiceScore, ScoringOptions, most_probable
from medley.inference.model import Model
from medley.inference.response import Response
from medley.utils.cli_options import resolved
from medley.utils.jsonl import append_jsonl
from medley.utils.manifest import read_manifest, write_manifest
from medley.utils.run_identity import check_same_run, run_identity

_NOT_IN_IDENTITY = ("output", "devices", "num_chunks", "chunk_idx", *RUNTIME_OPTIONS)
_CHOICE_OPTIONS = ("choices_template", "choices_per_token", "choices_prior", "choices_end")
_GENERATION_OPTIONS = tuple(sorted({*GenerationOptions.__dataclass_fields__} - {"mode"}))


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
        choices: answer by scoring these choices, such as yes,no; record for those of each
            question's record (PMC-VQA, ScienceQA), letters for A, B, ... in their place
        choices_template: text that is scored for a choice, with {choice} in it
        choices_per_token: divide the log-likelihood of a choice by its number of tokens
        choices_prior: subtract its log-likelihood after the question without its images
        choices_end: score the end of the response after the choice as well
    """

    questions: Path
    output: Path
    num_chunks: int = 1
    chunk_idx: int = 0
    devices: str | None = None
    answer_prompter: bool = False
    model_id: str | None = None
    choices: list[str] | None = None
    choices_template: str = CHOICE
    choices_per_token: bool = ScoringOptions.per_token
    choices_prior: bool = ScoringOptions.prior_correction
    choices_end: bool = ScoringOptions.with_end
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
        self._check_choices()
        self.check_batch_size()
        self.generation()

    def _check_choices(self) -> None:
        if self.choices is None:
            for name in self._differing(_CHOICE_OPTIONS):
                raise UserError(f"--{name} requires --choices.")
            return
        parse_choices(self.choices)
        if CHOICE not in self.choices_template:
            raise UserError(
                f"--choices_template {self.choices_template}: Expected {CHOICE} in the text."
            )
        if self.answer_prompter or self.mode != "text":
            other = "--answer_prompter" if self.answer_prompter else f"--mode {self.mode}"
            raise UserError(f"{other} generates a response, --choices does not. Remove one.")

    def warn_of_ignored(self) -> None:
        ignored = [] if self.choices is None else self._differing(_GENERATION_OPTIONS)
        if ignored:
            names = ", ".join(f"--{name}" for name in ignored)
            print(f"--choices generates nothing: {names} without effect", file=sys.stderr)

    def _differing(self, names: Sequence[str]) -> list[str]:
        """The options that do not have their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def identity(self) -> dict[str, Any]:
        ignored: tuple[str, ...] = _NOT_IN_IDENTITY
        ignored += ("choices", *_CHOICE_OPTIONS) if self.choices is None else _GENERATION_OPTIONS
        identity = run_identity(self, ignored, questions=self.questions)
        return identity | ({} if self.choices is None else {"choices": parse_choices(self.choices)})


def answer(options: AnswerOptions) -> None:
    devices = [] if options.devices is None else parse_devices(options.devices)
    if options.devices is not None and options.device != "cpu":
        check_devices(options.devices, devices)
    questions = options.questions_in(options.questions)
    choices = None
    if options.choices is not None:
        choices = choices_of(questions, parse_choices(options.choices))
    options.warn_of_ignored()
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
    failed: list[str] = []
    answers = _answers(options, model, questions, choices, pending)
    for number, result in tqdm(answers, desc="answering", unit=" answers", total=len(pending)):
        if isinstance(result, str):
            failed.append(f"question {questions[number].identifier}: {result}")
        else:
            append_jsonl(options.output, _row(options, questions[number], number, result))
    sort_answers(options.output, keys)
    print(f"{len(own) - len(failed)} answers in {options.output}")
    if failed:
        raise PartialFailure(
            f"{len(failed)} of {len(own)} questions were not answered. First error: {failed[0]}"
        )


def _answers(
    options: AnswerOptions,
    model: Model,
    questions: Sequence[Question],
    choices: Sequence[Sequence[str] | UserError] | None,
    pending: Sequence[int],
) -> Iterator[tuple[int, Response | list[ChoiceScore] | str]]:
    """Yields (number, answer or error message) for the questions whose numbers are `pending`."""
    prompts = [question.prompt for question in questions]
    if choices is not None:
        scoring = ScoringOptions(
            options.choices_per_token, options.choices_prior, options.choices_end
        )
        return score_choices(
            model, prompts, pending, choices, options.choices_template, scoring,
            options.max_num_seqs,
        )  # fmt: skip
    answer_questions = answer_twice if options.answer_prompter else answer_once
    return answer_questions(
        model, prompts, pending, options.generation(model), options.max_num_seqs
    )


def _row(
    options: AnswerOptions, question: Question, number: int, answer: Response | list[ChoiceScore]
) -> dict[str, Any]:
    """The row of an answer. Writes its generated images beside the answer file."""
    name = options.model_id or model_name(options.ckpt)
    if isinstance(answer, list):
        return format_answer(question, most_probable(answer).text, name, choices=answer)
    folder = options.output.with_name(f"{options.output.stem}_images")
    paths = save_images(folder, f"{number:06d}", answer)
    images = [f"{folder.name}/{path.name}" for path in paths]
    return format_answer(question, answer.text, name, images)


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
