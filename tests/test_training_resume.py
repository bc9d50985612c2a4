"""Training that goes on: after a kill, on other ranks, in the same order."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from training import train
from training_runs import losses, words, write_tokens

from medley.trainer import checkpointing


def refused(flags: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "training.train", *flags],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    return done.stderr


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def run(command: list[str], log: Path) -> None:
    assert start(command, log).wait(timeout=600) == 0, log.read_text()[-3000:]


def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights(
    training_data: Path, tmp_path: Path
) -> None:
    more = ["--steps", 10, "--bs", 2, "--pack", "--max_length", 256, "--save_strategy", "steps"]
    more += ["--save_steps", 1, "--trainer", '{"save_total_limit": 2}', "--epoch", 9]
    command = [sys.executable, "-m", "training.train"]
    log = tmp_path / "log"
    run([*command, *words(training_data, tmp_path / "whole", *more)], log)
    killed = tmp_path / "killed"
    wait = random.Random(os.getpid())
    for after in (1, 4):
        resume = ["--resume"] if checkpointing.last_complete_checkpoint(killed) else []
        process = start([*command, *words(training_data, killed, *more, *resume)], log)
        while not (killed / f"checkpoint-{after}").exists():  # begun; the save may be halfway
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(wait.random() * 0.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "adapter_model.safetensors").exists()
        last = checkpointing.last_complete_checkpoint(killed)
        torn = killed / "checkpoint-99"  # a save that a kill cut short
        shutil.copytree(last or killed / f"checkpoint-{after}", torn, dirs_exist_ok=True)
        (torn / checkpointing.COMPLETE).unlink(missing_ok=True)
        if last is None:
            shutil.rmtree(killed)
    run([*command, *words(training_data, killed, *more, "--resume")], log)
    whole, again = (
        load_file(p / "adapter_model.safetensors") for p in (tmp_path / "whole", killed)
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert losses(killed) == losses(tmp_path / "whole")


def test_rows_of_like_lengths_come_in_the_same_order_after_a_stop(
    training_data: Path, tmp_path: Path
) -> None:
    more: list[object] = ["--group_by_length", "--epoch", 3, "--bs", 4, "--lora_dropout", 0]
    more += ["--save_strategy", "steps", "--save_steps", 7]
    assert train.main(words(training_data, tmp_path / "whole", *more)) == 0
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    shutil.copy(tmp_path / "whole" / checkpointing.RUN, stopped)
    shutil.copytree(tmp_path / "whole" / "checkpoint-14", stopped / "checkpoint-14")
    assert train.main(words(training_data, stopped, *more, "--resume")) == 0
    assert losses(stopped) == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    # Killed after its last checkpoint and before its last save: no step more is made.
    for name in ("manifest.json", "adapter_model.safetensors"):
        (stopped / name).unlink()
    assert train.main(words(training_data, stopped, *more, "--resume")) == 0
    names = ("whole", "stopped")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in names)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert train.main(words(training_data, stopped, *more, "--resume")) == 0  # has finished
    assert train.main(words(training_data, stopped, *more, "--resume", "--lr", "1")) == 2


@pytest.mark.parametrize(
    ("trainable", "stage"), [("full", 3), ("lora+image_head", 2)], ids=["full", "head"]
)
def test_ranks_with_blank_rows_do_not_wait_for_ever(
    training_data: Path, tmp_path: Path, trainable: str, stage: int
) -> None:
    few = write_tokens(tmp_path / "five.jsonl", 5)
    more: list[object] = ["--train_data", few, "--trainable", trainable, "--bs", 1, "--steps", 6]
    more += ["--ds", ROOT / "training" / "deepspeed" / f"zero{stage}.json", "--epoch", 9]
    more += ["--save_strategy", "no"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    run(
        [*ranks, "training.train", *words(training_data, tmp_path / "out", *more)], tmp_path / "log"
    )
    assert (tmp_path / "out" / "manifest.json").exists()
    assert len(losses(tmp_path / "out")) == 6


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_under_zero_equal_one_process_and_go_on_as_one(
    training_data: Path, tmp_path: Path, stage: int
) -> None:
    more: list[object] = ["--pack", "--max_length", 256, "--steps", 6, "--lora_dropout", 0]
    more += ["--save_strategy", "steps", "--save_steps", 3, "--global_bs", 4, "--epoch", 9]
    alone, two, less = (tmp_path / name for name in ("alone", "two", "less"))
    assert train.main(words(training_data, alone, *more, "--bs", 4)) == 0
    zero: list[object] = [*more, "--ds", ROOT / "training" / "deepspeed" / f"zero{stage}.json"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "-m", "training.train"]
    log = tmp_path / "log"
    run(
        [
            *ranks[:3],
            "--nproc-per-node=2",
            *ranks[3:],
            *words(training_data, two, *zero, "--bs", 2),
        ],
        log,
    )
    assert losses(two) == pytest.approx(losses(alone), abs=2e-3)
    assert (
        sum(p.stat().st_size for p in (two / "checkpoint-3").rglob("*")) < 5e6
    )  # no frozen weight
    less.mkdir()
    shutil.copy(two / checkpointing.RUN, less)
    shutil.copytree(two / "checkpoint-3", less / "checkpoint-3")
    going_on = words(training_data, less, *zero, "--bs", 4, "--resume")
    run([*ranks[:3], "--nproc-per-node=1", *ranks[3:], *going_on], log)
    assert losses(less) == pytest.approx(losses(two), abs=2e-3)
    other = words(training_data, less, *zero[:-2], "--bs", 4, "--resume", "--global_bs", 8)
    assert "a run that is gone on with keeps it: with 1 ranks give --global_bs 4" in refused(other)
