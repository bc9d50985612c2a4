"""Answer files in shards: one process for each device, whose answers are merged at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from medley.errors import UserError
from medley.evaluation.answer_files import Key, question_keys, read_answers, shard
from medley.evaluation.questions import Question
from medley.utils.jsonl import write_jsonl
from medley.utils.manifest import manifest_path


def parse_devices(text: str) -> list[int]:
    """`0-7`, `0,2` or `1` -> device numbers. Raises UserError for anything else."""
    devices: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--devices {text}: Expected numbers such as 0-7 or 0,2.")
        devices += range(int(first), int(last if dash else first) + 1)
    if not devices or len(set(devices)) < len(devices):
        raise UserError(f"--devices {text}: The list is empty or contains a device twice.")
    return devices


def check_devices(text: str, devices: Sequence[int]) -> None:
    """Raises UserError for a GPU that this machine does not have. Without GPUs, the CPU answers."""
    import torch  # slow to import

    count = torch.cuda.device_count()
    missing = [device for device in devices if device >= count]
    if count and missing:
        raise UserError(
            f"--devices {text}: No GPU {', '.join(map(str, missing))} (got {count} GPUs, expected "
            f"numbers from 0 to {count - 1}; CUDA_VISIBLE_DEVICES hides others)."
        )


def device_name(device: int) -> str:
    """A GPU that this process numbers `device`, as CUDA_VISIBLE_DEVICES of a child names it."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return visible[device] if any(visible) and device < len(visible) else str(device)


def shard_path(output: Path, count: int, index: int) -> Path:
    return output.with_name(f"{output.stem}.part-{index}-of-{count}{output.suffix}")


def split_answers(output: Path, questions: Sequence[Question], count: int) -> list[Path]:
    """Distributes all answers of earlier runs to `count` shard files and returns their paths."""
    rows = merge_shards(output, questions)  # earlier runs may have had another number of devices
    keys = _keys(questions)
    paths = [shard_path(output, count, index) for index in range(count)]
    for index, path in enumerate(paths):
        write_jsonl(path, [rows[key] for key in shard(keys, count, index) if key in rows])
    return paths


def merge_shards(output: Path, questions: Sequence[Question]) -> dict[Key, dict[str, Any]]:
    """Merges the shard files into the output, in the order of the questions, and removes them.

    Returns all answers by their keys.
    """
    keys = _keys(questions)
    rows = read_answers(output)
    paths = sorted(output.parent.glob(f"{output.stem}.part-*-of-*{output.suffix}"))
    for path in paths:
        index, _, count = path.stem.rpartition(".part-")[2].partition("-of-")
        if not (index.isdigit() and count.isdigit()):
            continue
        numbers = shard(range(len(questions)), int(count), int(index))
        # Equal questions are counted within a shard, so that its keys may differ from ours.
        own_keys = _keys([questions[number] for number in numbers])
        by_own_key = dict(zip(own_keys, (keys[number] for number in numbers), strict=True))
        rows |= {
            by_own_key[key]: row for key, row in read_answers(path).items() if key in by_own_key
        }
    if rows:
        write_jsonl(output, [rows[key] for key in keys if key in rows])
    for path in paths:
        path.unlink()
        manifest_path(path).unlink(missing_ok=True)
    return rows


def _keys(questions: Sequence[Question]) -> list[Key]:
    return list(question_keys((q.identifier, q.raw_text) for q in questions))


def run_on_devices(
    verb: str, options: Sequence[Mapping[str, Any]], devices: Sequence[int]
) -> list[int]:
    """Runs `medley VERB` once for each device, with one set of options each.

    Returns the devices whose process failed. Ends all processes if this one is interrupted.
    """
    with TemporaryDirectory() as folder, ExitStack() as stack:
        processes = []
        for device, own in zip(devices, options, strict=True):
            config = Path(folder) / f"{device}.yaml"
            config.write_text(yaml.safe_dump(dict(own), allow_unicode=True), encoding="utf-8")
            command = [sys.executable, "-m", "medley.cli", verb, "--config", str(config)]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device_name(device)}
            process = subprocess.Popen(command, env=environment)
            stack.callback(process.terminate)  # no effect on a process that has ended
            processes.append(process)
        with sigterm_to_exit():
            return [d for p, d in zip(processes, devices, strict=True) if p.wait()]


@contextmanager
def sigterm_to_exit() -> Iterator[None]:
    """Raises SystemExit on SIGTERM, so that cleanup code runs."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
