"""ScienceQA (Lu et al. 2022): `problems.json` and `pid_splits.json`, asked in any of the published
prompt formats. Only read: its problems hold more than a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medley.data.document import Document, ImagePart, Turn
from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    Found,
    RecordError,
    Sample,
    extra_fields,
    repr_short,
    resolve_image_path,
    value_of,
)
from medley.errors import UserError
from medley.utils.files import read_json

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
# C context (the hint), Q question, M options (multiple choice), L lecture, E explanation (the
# solution), A answer.
INPUTS = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
OUTPUTS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")
_BECAUSE = "BECAUSE:"


def records(choices: ConversionConfig) -> Iterator[Found]:
    folder = choices.path
    problems, splits = read_json(folder / PROBLEMS), read_json(folder / SPLITS)
    lists = isinstance(splits, dict) and all(isinstance(own, list) for own in splits.values())
    if not isinstance(problems, dict) or not lists:
        raise UserError(f"{folder}: {PROBLEMS} is no object, or {SPLITS} none of lists")
    names = list(splits) if choices.split == "all" else [choices.split]
    if choices.split == "all":  # minival and minitest are parts of others
        names = [name for name in names if not name.startswith("mini") and name != "trainval"]
    for split in names:
        if split not in splits:
            raise UserError(f"--split {split}: {folder / SPLITS} has {', '.join(splits)}")
        for number in splits[split]:
            place = f"{folder / PROBLEMS}: problem {number}"
            problem = problems.get(number) if isinstance(number, str) else None
            if isinstance(problem, dict):
                yield place, split, {"id": number, **problem}
            else:
                yield (
                    place,
                    split,
                    RecordError(f"it stands in {SPLITS} and not here", content=number),
                )


def prompt_formats(text: str) -> tuple[str, str]:
    """`QCM-LEA` -> input and output. Raises UserError for one that is none."""
    asked, _, answered = text.partition("-")
    if asked not in INPUTS or answered not in OUTPUTS:
        raise UserError(
            f"--prompt_format {text}: expected one of {', '.join(INPUTS)}, then - and one of "
            f"{', '.join(OUTPUTS)}"
        )
    return asked, answered


def read(problem: Any, choices: ConversionConfig) -> Sample:
    identifier = value_of(problem, "id")
    offered, right = value_of(problem, "choices"), value_of(problem, "answer")
    listed = isinstance(offered, list) and all(isinstance(choice, str) for choice in offered)
    if not listed or type(right) is not int or not 0 <= right < len(offered):
        raise RecordError(f"answer {repr_short(right)} of the choices {repr_short(offered)}")
    for key in ("question", "hint", "lecture", "solution"):
        if not isinstance(value_of(problem, key), str):
            raise RecordError(f"{key!r} is {repr_short(problem[key])}, expected text")
    question, answer = texts(problem, choices.prompt_format, choices.compat == "llava")
    parts: tuple[str | ImagePart, ...] = (question,)
    if problem.get("image"):
        name, folder = f"{identifier}/{problem['image']}", folder_of(choices.image_folder, problem)
        # Behind the words, where LLaVA's converter puts it.
        parts = (question, ImagePart(path=resolve_image_path(name, folder)))
    document = Document((Turn("user", parts), Turn("assistant", (answer,))))
    fields = {"id": identifier, "source": "science_qa", "task": "VQA", "answer_type": "CLOSED"}
    taken = ("question", "hint", "lecture", "solution", "image", "split", "task")
    return Sample(document, {**fields, **extra_fields(problem, *taken)})


def folder_of(folder: Path | None, problem: dict[str, Any]) -> Path | None:
    """Where a problem's pictures are: in the folder of its split, where there is one."""
    if folder is not None and (folder / str(problem.get("split"))).is_dir():
        return folder / str(problem["split"])
    return folder


def texts(problem: dict[str, Any], prompt_format: str, as_published: bool) -> tuple[str, str]:
    """The question and its answer in a prompt format.

    The published converter gives AL the solution and AE the lecture, the wrong way round;
    `as_published` does so, too.
    """
    asked, answered = prompt_formats(prompt_format)
    lecture, solution = (problem[k].replace("\\n", "\n") for k in ("lecture", "solution"))
    letters = [chr(ord("A") + i) for i in range(len(problem["choices"]))]
    options = " ".join(f"({x}) {c}" for x, c in zip(letters, problem["choices"], strict=True))
    pieces = {
        "Q": f"Question: {problem['question']}\n",
        "C": f"Context: {problem['hint'] or 'N/A'}\n",
        "M": f"Options: {options}\n",
    }
    told = {"L": lecture, "E": solution}
    because = [x for x in asked if x in told]
    question = ""
    for letter in asked:
        if letter in pieces:
            question += pieces[letter]
        elif letter == because[0]:
            question += f"{_BECAUSE} {' '.join(told[x] for x in because)}\n"
    said = f"The answer is {letters[problem['answer']]}."
    if answered == "LEPA":
        answer = f"LECTURE: {lecture}\n" if lecture else ""
        answer += f"SOLUTION: {solution}\n" if solution else ""
        answer += f"###\nANSWER: {letters[problem['answer']]}."
    elif answered[0] == "A":
        if as_published and answered in ("AL", "AE"):
            answered = {"AL": "AE", "AE": "AL"}[answered]
        answer = f"Answer: {said}"
        if len(answered) > 1:
            answer += f" {_BECAUSE} " + " ".join(told[x] for x in answered[1:])
    else:
        answer = "Answer: " + " ".join([told[x] for x in answered[:-1]] + [said])
    return _tidied(question, "Question: "), _tidied(answer, "Answer: ")


def _tidied(text: str, lead: str) -> str:
    """As the published converter leaves it: its removals act on every occurrence."""
    text = text.replace("  ", " ").strip()
    if text.endswith(_BECAUSE):
        text = text.replace(_BECAUSE, "").strip()
    return text.replace(lead, "") if text.startswith(lead) else text


def image_folder(path: Path) -> Path:
    return path / "images" if (path / "images").is_dir() else path


FORMAT = FormatSpec(records, read, splits=True, images_in=image_folder)
