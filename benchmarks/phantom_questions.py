"""Questions about phantoms through `medley answer` and `medley evaluate vqa`, and what the
benchmarks of `tiny` have in common: running the programs and their files."""

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

GREEDY = ("--text_greedy", "--repetition_penalty", "1.0")
Pair = tuple[str, str]  # a question and an answer


@dataclass(frozen=True)
class Model:
    """What is asked: a checkpoint, an adapter over it if there is one, and what files call it."""

    name: str
    ckpt: str = "tiny"
    adapter: Path | None = None

    @property
    def words(self) -> tuple[object, ...]:
        """Of a command line."""
        return "--ckpt", self.ckpt, *(("--adapter", self.adapter) if self.adapter else ())


class Result(dict[str, Any]):
    """What a benchmark prints: each part as it is found, so that a later fault costs none, and all
    of it as the last line."""

    def keep(self, found: Mapping[str, Any], name: str = "") -> None:
        own = {k + name: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}
        print(json.dumps(own), file=sys.stderr, flush=True)
        self.update(own)

    def end(self) -> None:
        print(json.dumps({**self, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}))


@contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    """A temporary one, or an empty one that is kept."""
    with TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).resolve()
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--keep {folder}: not empty; what lies there would be taken for this")
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def run(*words: object) -> None:
    """A program as a user starts it. Raises SystemExit with all that it said where it failed."""
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_questions(
    folder: Path,
    scans: Sequence[Phantom],
    most: int,
    seed: int,
    groups: Sequence[dict[str, str]] | None = None,
) -> None:
    """Draws the scans to `folder/pictures`, and at most so many questions about each to
    `folder/questions.jsonl`, every one alone; `groups` are values of each scan to score apart."""
    (folder / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number, scan in enumerate(scans):
        path = folder / "pictures" / f"{number}.png"
        scan.image(64).save(path)
        pairs = questions(scan)
        for place in sorted(rng.permutation(len(pairs))[:most]):
            question, answer = pairs[place]
            kind = "CLOSED" if answer in ("yes", "no") else "OPEN"
            rows.append({
                "text": f"{IMAGE}{question}{END_TURN}{answer}", "id": len(rows),
                "image_path": str(path), "answer_type": kind, **(groups[number] if groups else {}),
            })  # fmt: skip
    write_lines(folder / "questions.jsonl", rows)


def question_scores(folder: Path, model: Model) -> dict[str, float]:
    """Closed and open questions of `write_questions`, in percent: of all, and of each group."""
    answers, scores = folder / f"{model.name}.answers.jsonl", folder / f"{model.name}.scores.json"
    asked = ("--format", "documents")
    run("medley.cli", "answer", *model.words, *asked, "--questions", folder / "questions.jsonl",
        "--output", answers, "--max_new_tokens", 24, "--batch_size", 64, *GREEDY)  # fmt: skip
    run("medley.cli", "evaluate", "vqa", *asked, "--gt", folder / "questions.jsonl",
        "--pred", answers, "--output", scores)  # fmt: skip
    found = {}
    for group, values in json.loads(scores.read_text())["scores"].items():
        suffix = "" if group == "all" else f"_{group.partition(': ')[2]}"
        for kind, measure in (("closed", "closed accuracy"), ("open", "open exact match")):
            if measure in values:
                found[kind + suffix] = float(values[measure]["percent"])
    return found


def question_majorities(folder: Path) -> dict[str, float]:
    """What always saying the commonest answer to each question gives."""
    rows = read_lines(folder / "questions.jsonl")
    pairs = [tuple(row["text"].removeprefix(IMAGE).split(END_TURN)) for row in rows]
    found = {}
    for kind in ("closed", "open"):
        own = [p for p, row in zip(pairs, rows, strict=True) if row["answer_type"] == kind.upper()]
        found[f"{kind}_majority"] = majority(own)
    return found


def majority(pairs: Sequence[Pair]) -> float:
    """Percent that the commonest answer to each question gets right."""
    usual: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in pairs:
        usual[question][answer] += 1
    return 100 * sum(max(own.values()) for own in usual.values()) / max(len(pairs), 1)
