"""ScienceQA (Lu et al. 2022): `problems.json` and `pid_splits.json`, in all prompt formats.

The format is read-only, because its problems have fields that a conversation cannot represent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medley.data.document import Document, ImagePart, Turn
from medley.data.vocabulary import IMAGE
from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RawRecord,
    RecordError,
    Sample,
    extra_fields,
    get_value,
    repr_short,
    resolve_image_path,
)
from medley.datasets.embedded_images import read_images
from medley.datasets.input_files import ROW_ID, table_records
from medley.datasets.placement import check_image_count
from medley.errors import UserError
from medley.utils.files import read_json

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
# Letters of the prompt formats: C context (the hint), Q question, M multiple choice (the options),
# L lecture, E explanation (the solution), A answer.
INPUTS = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
OUTPUTS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")
_BECAUSE = "BECAUSE:"


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    folder = config.path
    tables = table_records(config, {"": (PROBLEMS,)})
    if tables is not None:  # the copies on hubs
        yield from tables
        return
    problems, splits = read_json(folder / PROBLEMS), read_json(folder / SPLITS)
    has_lists = isinstance(splits, dict) and all(isinstance(ids, list) for ids in splits.values())
    if not isinstance(problems, dict) or not has_lists:
        raise UserError(
            f"{folder}: {PROBLEMS} is not an object, or {SPLITS} is not an object of lists."
        )
    names = list(splits) if config.split == "all" else [config.split]
    if config.split == "all":  # minival, minitest and trainval repeat problems of other splits
        names = [name for name in names if not name.startswith("mini") and name != "trainval"]
    for split in names:
        if split not in splits:
            raise UserError(
                f"--split {split}: {folder / SPLITS} has no such split (expected one of "
                f"{', '.join(splits)})."
            )
        for number in splits[split]:
            where = f"{folder / PROBLEMS}: problem {number}"
            problem = problems.get(number) if isinstance(number, str) else None
            if isinstance(problem, dict):
                yield where, split, {"id": number, **problem}
            else:
                reason = f"The problem is listed in {SPLITS} but missing here."
                yield where, split, RecordError(reason, content=number)


def parse_prompt_format(text: str) -> tuple[str, str]:
    """`QCM-LEA` -> input and output. Raises UserError for an unknown format."""
    input_format, _, output_format = text.partition("-")
    if input_format not in INPUTS or output_format not in OUTPUTS:
        raise UserError(
            f"--prompt_format is invalid (got {text}, expected one of {', '.join(INPUTS)}, then - "
            f"and one of {', '.join(OUTPUTS)})."
        )
    return input_format, output_format


def read(problem: Any, config: ConversionConfig) -> Sample:
    identifier = get_value(problem, "id")
    choices, answer_index = get_value(problem, "choices"), get_value(problem, "answer")
    is_list = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not is_list or type(answer_index) is not int or not 0 <= answer_index < len(choices):
        raise RecordError(
            f"The answer is not the index of a choice (got {repr_short(answer_index)} of "
            f"{repr_short(choices)})."
        )
    for key in ("question", "hint", "lecture", "solution"):
        if not isinstance(get_value(problem, key), str):
            raise RecordError(f"{key!r} is not a string (got {repr_short(problem[key])}).")
    question, answer = format_problem(problem, config.prompt_format, config.compat == "llava")
    parts: tuple[str | ImagePart, ...] = (question,)
    remarks: list[str] = []
    if isinstance(problem.get("image"), dict | bytes | list):
        parts = (question, *read_images(problem["image"], identifier, config, remarks))
    elif problem.get("image"):
        name = f"{identifier}/{problem['image']}"
        folder = problem_image_folder(config.image_folder, problem)
        # LLaVA's converter puts the image after the text.
        parts = (question, ImagePart(path=resolve_image_path(name, folder)))
    check_image_count((question + answer).count(IMAGE), 0, problem, ())
    document = Document((Turn("user", parts), Turn("assistant", (answer,))))
    fields = {"id": identifier, "source": "science_qa", "task": "VQA", "answer_type": "CLOSED"}
    used = ("question", "hint", "lecture", "solution", "image", "split", "task", ROW_ID)
    return Sample(document, {**fields, **extra_fields(problem, *used)}, tuple(remarks))


def problem_image_folder(folder: Path | None, problem: dict[str, Any]) -> Path | None:
    """The image folder of a problem's split if it exists, else `folder`."""
    if folder is not None and (folder / str(problem.get("split"))).is_dir():
        return folder / str(problem["split"])
    return folder


def format_problem(problem: dict[str, Any], prompt_format: str, compat: bool) -> tuple[str, str]:
    """The texts of the question and of its answer in a prompt format.

    LLaVA's converter swaps AL and AE: AL gets the solution and AE the lecture. `compat` reproduces
    that.
    """
    input_format, output_format = parse_prompt_format(prompt_format)
    lecture, solution = (problem[k].replace("\\n", "\n") for k in ("lecture", "solution"))
    letters = [chr(ord("A") + i) for i in range(len(problem["choices"]))]
    options = " ".join(f"({x}) {c}" for x, c in zip(letters, problem["choices"], strict=True))
    sections = {
        "Q": f"Question: {problem['question']}\n",
        "C": f"Context: {problem['hint'] or 'N/A'}\n",
        "M": f"Options: {options}\n",
    }
    reasons = {"L": lecture, "E": solution}
    input_reasons = [x for x in input_format if x in reasons]
    question = ""
    for letter in input_format:
        if letter in sections:
            question += sections[letter]
        elif letter == input_reasons[0]:
            question += f"{_BECAUSE} {' '.join(reasons[x] for x in input_reasons)}\n"
    conclusion = f"The answer is {letters[problem['answer']]}."
    if output_format == "LEPA":
        answer = f"LECTURE: {lecture}\n" if lecture else ""
        answer += f"SOLUTION: {solution}\n" if solution else ""
        answer += f"###\nANSWER: {letters[problem['answer']]}."
    elif output_format[0] == "A":
        if compat and output_format in ("AL", "AE"):
            output_format = {"AL": "AE", "AE": "AL"}[output_format]
        answer = f"Answer: {conclusion}"
        if len(output_format) > 1:
            answer += f" {_BECAUSE} " + " ".join(reasons[x] for x in output_format[1:])
    else:
        answer = "Answer: " + " ".join([reasons[x] for x in output_format[:-1]] + [conclusion])
    return _clean(question, "Question: "), _clean(answer, "Answer: ")


def _clean(text: str, prefix: str) -> str:
    """Cleans a text as LLaVA's converter does: it removes every occurrence of the prefix."""
    text = text.replace("  ", " ").strip()
    if text.endswith(_BECAUSE):
        text = text.replace(_BECAUSE, "").strip()
    return text.replace(prefix, "") if text.startswith(prefix) else text


def image_folder(path: Path) -> Path:
    return path / "images" if (path / "images").is_dir() else path


FORMAT = FormatSpec(records, read, has_splits=True, default_image_folder=image_folder)
