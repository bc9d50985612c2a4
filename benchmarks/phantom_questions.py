"""Questions about phantoms for the benchmarks of `tiny`, and how those run the commands.

Questions are answered by `medley answer` and scored by `medley evaluate vqa`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from medley.data.vocabulary import END_TURN, IMAGE
from medley.errors import UserError
from medley.phantoms import Phantom, questions
from medley.utils.jsonl import write_jsonl

GREEDY = ("--text_greedy", "--repetition_penalty", "1.0")
Pair = tuple[str, str]  # question and answer


@dataclass(frozen=True)
class Model:
    """A checkpoint, optionally with an adapter, and its name in file names."""

    name: str
    ckpt: str = "tiny"
    adapter: Path | None = None

    @property
    def flags(self) -> tuple[object, ...]:
        return "--ckpt", self.ckpt, *(("--adapter", self.adapter) if self.adapter else ())


class Result(dict[str, Any]):
    """The result of a benchmark.

    Each part is printed to stderr as soon as it is known, so that a later error loses nothing. The
    complete result is the last line on stdout.
    """

    def add(self, values: Mapping[str, Any], suffix: str = "") -> None:
        part = {k + suffix: round(v, 2) if isinstance(v, float) else v for k, v in values.items()}
        print(json.dumps(part), file=sys.stderr, flush=True)
        self.update(part)

    def print(self) -> None:
        print(json.dumps({**self, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}))


@contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    """A temporary folder, or an empty folder to keep."""
    with TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).resolve()
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--keep {folder}: The folder is not empty. Use another one.")
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def run(*arguments: object) -> None:
    """Runs a module as a user starts it. Raises SystemExit with its output if it fails."""
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_questions(
    folder: Path,
    scans: Sequence[Phantom],
    limit: int,
    seed: int,
    groups: Sequence[dict[str, str]] | None = None,
) -> None:
    """Renders scans to `folder/images`, and writes questions to `folder/questions.jsonl`.

    At most `limit` random questions per scan, one per row. `groups` are fields of each scan whose
    values are scored separately.
    """
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number, scan in enumerate(scans):
        path = folder / "images" / f"{number}.png"
        scan.image(64).save(path)
        pairs = questions(scan)
        for index in sorted(rng.permutation(len(pairs))[:limit]):
            question, answer = pairs[index]
            answer_type = "CLOSED" if answer in ("yes", "no") else "OPEN"
            rows.append({
                "text": f"{IMAGE}{question}{END_TURN}{answer}", "id": len(rows),
                "image_path": str(path), "answer_type": answer_type,
                **(groups[number] if groups else {}),
            })  # fmt: skip
    write_jsonl(folder / "questions.jsonl", rows)


def question_scores(folder: Path, model: Model) -> dict[str, float]:
    """Scores of the closed and open questions in percent, in total and for each group."""
    answers, scores = folder / f"{model.name}.answers.jsonl", folder / f"{model.name}.scores.json"
    file_format = ("--format", "documents")
    run("medley", "answer", *model.flags, *file_format, "--questions", folder / "questions.jsonl",
        "--output", answers, "--max_new_tokens", 24, "--batch_size", 64, *GREEDY)  # fmt: skip
    run("medley", "evaluate", "vqa", *file_format, "--gt", folder / "questions.jsonl",
        "--pred", answers, "--output", scores)  # fmt: skip
    result = {}
    for group, values in json.loads(scores.read_text())["scores"].items():
        suffix = "" if group == "all" else f"_{group.partition(': ')[2]}"
        for kind, metric in (("closed", "closed accuracy"), ("open", "open exact match")):
            if metric in values:
                result[kind + suffix] = float(values[metric]["percent"])
    return result


def question_majorities(folder: Path) -> dict[str, float]:
    """The majority-answer baseline (image-blind) of closed and open questions, in percent."""
    rows = read_rows(folder / "questions.jsonl")
    pairs = [tuple(row["text"].removeprefix(IMAGE).split(END_TURN)) for row in rows]
    result = {}
    for kind in ("closed", "open"):
        own = [p for p, row in zip(pairs, rows, strict=True) if row["answer_type"] == kind.upper()]
        result[f"{kind}_majority"] = majority(own)
    return result


def majority(pairs: Sequence[Pair]) -> float:
    """Percentage of correct answers by the most frequent answer to each question."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in pairs:
        counts[question][answer] += 1
    return 100 * sum(max(count.values()) for count in counts.values()) / max(len(pairs), 1)
