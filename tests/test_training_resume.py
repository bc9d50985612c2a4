"""Resuming training: after a kill, on other ranks, with the same batches."""

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
from conftest import ROOT, TIMEOUT, torchrun_command
from safetensors.torch import load_file
from training import train
from training_runs import logged_values, train_flags, write_tokens

from medley.trainer import checkpointing

pytestmark = pytest.mark.slow


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a command in its own process group, with one thread, so that it can be killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def run(command: list[str], log: Path, status: int = 0) -> None:
    assert start(command, log).wait(timeout=TIMEOUT) == status, log.read_text()[-3000:]


def adapter_weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def copy_checkpoint(source: Path, step: int, target: Path) -> None:
    """Gives a run the state of another one after a step."""
    target.mkdir()
    shutil.copy(source / checkpointing.RUN_IDENTITY, target)
    shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")


@pytest.mark.hostile(repeat=3)
def test_killed_run_resumes_to_the_same_weights(training_data: Path, tmp_path: Path) -> None:
    flags = ["--steps", 16, "--bs", 2, "--pack", "--max_length", 256, "--save_strategy", "steps"]
    flags += ["--save_steps", 1, "--trainer", '{"save_total_limit": 2}', "--epoch", 9]
    command = [sys.executable, "-m", "training.train"]
    log, complete, killed = tmp_path / "log", tmp_path / "complete", tmp_path / "killed"
    run([*command, *train_flags(training_data, complete, *flags)], log)
    delay = random.Random(os.getpid())
    for step in (1, 4):
        resume = ["--resume"] if checkpointing.last_complete_checkpoint(killed) else []
        process = start([*command, *train_flags(training_data, killed, *flags, *resume)], log)
        # With save_total_limit, a busy machine may miss a checkpoint: wait for it or a later one.
        while not any(number >= step for number in checkpoint_numbers(killed)):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(delay.random() * 0.3)  # into the next save, the next step, or the next log
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        last = checkpointing.last_complete_checkpoint(killed)
        incomplete = killed / "checkpoint-99"
        shutil.copytree(last or killed / f"checkpoint-{step}", incomplete, dirs_exist_ok=True)
        (incomplete / checkpointing.COMPLETE).unlink(missing_ok=True)
        if last is None:
            shutil.rmtree(killed)
    run([*command, *train_flags(training_data, killed, *flags, "--resume")], log)
    expected, found = adapter_weights(complete), adapter_weights(killed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert logged_values(killed) == logged_values(complete)


def checkpoint_numbers(output: Path) -> list[int]:
    return [int(folder.name.partition("-")[2]) for folder in output.glob("checkpoint-*")]


def test_length_grouped_batches_are_the_same_after_a_resume(
    training_data: Path, tmp_path: Path
) -> None:
    flags: list[object] = ["--group_by_length", "--epoch", 3, "--bs", 4, "--lora_dropout", 0]
    flags += ["--save_strategy", "steps", "--save_steps", 7]
    complete, resumed = tmp_path / "complete", tmp_path / "resumed"
    assert train.main(train_flags(training_data, complete, *flags)) == 0
    copy_checkpoint(complete, 14, resumed)
    resume = train_flags(training_data, resumed, *flags, "--resume")
    assert train.main(resume) == 0
    assert logged_values(resumed) == pytest.approx(logged_values(complete), abs=1e-6)
    # As if killed after the last checkpoint and before the result: no further step is made.
    for name in ("manifest.json", "adapter_model.safetensors"):
        (resumed / name).unlink()
    assert train.main(resume) == 0
    expected, found = adapter_weights(complete), adapter_weights(resumed)
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)


def test_resuming_a_finished_run_does_nothing_and_checks_its_options(
    training_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: list[object] = ["--steps", 1, "--bs", 4, "--warmup_ratio", 0]
    assert train.main(train_flags(training_data, tmp_path, *flags)) == 0
    flags += ["--resume"]
    assert train.main(train_flags(training_data, tmp_path, *flags)) == 0
    assert "this run is already finished" in capsys.readouterr().out
    assert train.main(train_flags(training_data, tmp_path, *flags, "--lr", "1")) == 2
    assert "lr was 0.002, now 1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trainable", "stage"), [("full", 3), ("lora+image_head", 2)], ids=["full", "head"]
)
def test_ranks_with_blank_sequences_do_not_deadlock(
    tmp_path: Path, trainable: str, stage: int
) -> None:
    write_tokens(tmp_path / "train.jsonl", 5)
    flags: list[object] = ["--trainable", trainable, "--bs", 1, "--steps", 6, "--epoch", 9]
    flags += ["--ds", f"zero{stage}", "--save_strategy", "no"]
    output = tmp_path / "out"
    run(
        torchrun_command("training.train", *train_flags(tmp_path, output, *flags)),
        tmp_path / "log",
    )
    assert (output / "manifest.json").exists()
    assert len(logged_values(output)) == 6


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_on_two_ranks_equals_one_process_and_resumes_on_one_rank(
    training_data: Path, tmp_path: Path, stage: int
) -> None:
    flags: list[object] = ["--pack", "--max_length", 256, "--steps", 6, "--lora_dropout", 0]
    flags += ["--save_strategy", "steps", "--save_steps", 3, "--epoch", 9]
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    log = tmp_path / "log"

    def torchrun(output: Path, ranks: int, *more: object, status: int = 0) -> None:
        zero = train_flags(training_data, output, *flags, "--ds", f"zero{stage}", *more)
        run(torchrun_command("training.train", *zero, ranks=ranks), log, status)

    single = train_flags(training_data, one, *flags, "--bs", 4, "--global_bs", 4)
    assert train.main(single) == 0
    torchrun(two, 2, "--bs", 2, "--global_bs", 4)
    assert logged_values(two) == pytest.approx(logged_values(one), abs=2e-3)
    files = (two / "checkpoint-3").rglob("*")
    assert sum(file.stat().st_size for file in files) < 5e6  # contains no frozen weights
    copy_checkpoint(two, 3, resumed)
    torchrun(resumed, 1, "--bs", 4, "--global_bs", 4, "--resume")
    assert logged_values(resumed) == pytest.approx(logged_values(two), abs=2e-3)
    torchrun(resumed, 1, "--bs", 4, "--global_bs", 8, "--resume", status=1)  # torchrun's status
    assert "To keep the batch on 1 rank(s), pass --global_bs 4" in log.read_text()


@pytest.mark.parametrize(("trainable", "stage"), [("full", 2), ("full", 3), ("lora+image_head", 3)])
def test_a_trained_head_under_zero_on_two_ranks_equals_one_process(
    training_data: Path, tmp_path: Path, trainable: str, stage: int
) -> None:
    flags: list[object] = ["--pack", "--max_length", 256, "--steps", 4, "--lora_dropout", 0]
    flags += ["--save_strategy", "no", "--epoch", 9, "--trainable", trainable, "--train_on", "all"]
    flags += ["--warmup_ratio", 0, "--lr_scheduler", "constant", "--global_bs", 4]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main(train_flags(training_data, one, *flags, "--bs", 4)) == 0
    zero = train_flags(training_data, two, *flags, "--bs", 2, "--ds", f"zero{stage}")
    run(torchrun_command("training.train", *zero), tmp_path / "log")
    losses = logged_values(one)
    assert logged_values(two) == pytest.approx(losses, abs=2e-3)
    assert losses[0] - losses[-1] > 0.02  # the trained weights matter
