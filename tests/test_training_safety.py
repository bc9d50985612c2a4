"""What a training run may load, delete and continue."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import train
from training_runs import logged_values, tiny, train_flags, write_tokens

from medley.errors import UserError
from medley.trainer import checkpointing
from medley.trainer.checkpoint_safety import check_checkpoint, read_tag
from medley.trainer.identity import weights_hash
from medley.trainer.run_record import RunRecord, clear_output, complete_checkpoints


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


ZERO_FILES = (
    "global_step1/mp_rank_00_model_states.pt",
    "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "global_step1_universal/zero/weight/exp_avg.pt",
    "rng_state.pth", "optimizer.pt", "scheduler.pt", "pytorch_model.bin", "training_args.bin",
    "global_step1/state_without_suffix",
)  # fmt: skip


@pytest.fixture
def zero_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with the files that DeepSpeed and transformers write."""
    folder = tmp_path / "checkpoint-1"
    (folder / "global_step1_universal" / "zero" / "weight").mkdir(parents=True)
    (folder / "global_step1").mkdir()
    for name in ZERO_FILES:
        torch.save({"x": torch.zeros(3), "rng": np.random.get_state()}, folder / name)
    (folder / "latest").write_text("global_step1")
    return folder


@pytest.mark.parametrize("name", ZERO_FILES)
def test_no_pickle_of_a_checkpoint_runs(zero_checkpoint: Path, name: str) -> None:
    check_checkpoint(zero_checkpoint)
    marker = zero_checkpoint.parent / "ran"
    torch.save({"x": Payload(f"touch {marker}")}, zero_checkpoint / name)
    with pytest.raises(UserError, match=r"contains more than tensors \((posix|nt)\.system\)"):
        check_checkpoint(zero_checkpoint)
    assert not marker.exists()


def test_an_old_pickle_and_a_damaged_one_are_refused(zero_checkpoint: Path) -> None:
    file, marker = zero_checkpoint / "optimizer.pt", zero_checkpoint.parent / "ran"
    payload = Payload(f"touch {marker}")
    torch.save(payload, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="Damaged, or not written by"):
        check_checkpoint(zero_checkpoint)
    torch.save({"x": torch.zeros(3)}, file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="Damaged, or not written by"):
        check_checkpoint(zero_checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize(
    "tag", ["../elsewhere", "/tmp", "..", ".", "", "a/b", "missing", "a\nb", "-rf"]
)
def test_tags_are_names_and_not_paths(zero_checkpoint: Path, tag: str) -> None:
    (zero_checkpoint.parent / "elsewhere").mkdir()
    for name in ("latest", "latest_universal"):
        (zero_checkpoint / name).write_text(tag)
        with pytest.raises(UserError, match="Must name a folder beside it"):
            read_tag(zero_checkpoint / name)
        with pytest.raises(UserError, match="Must name a folder beside it"):
            check_checkpoint(zero_checkpoint)


def test_links_in_a_checkpoint_are_not_followed(zero_checkpoint: Path) -> None:
    (zero_checkpoint / "global_step2").symlink_to(zero_checkpoint.parent)
    with pytest.raises(UserError, match="A link in a checkpoint is not followed"):
        check_checkpoint(zero_checkpoint)


def own_run(output: Path, *completed: int) -> RunRecord:
    record = RunRecord(output, {"world_size": 1, "global_bs": 8, "base": "b", "lr": 0.1})
    output.mkdir(exist_ok=True)
    record.write()
    for number in completed:
        folder = output / f"checkpoint-{number}"
        record.begin(folder)
        folder.mkdir()
        record.complete(folder)
    return record


def test_a_new_run_deletes_nobodys_checkpoints(tmp_path: Path) -> None:
    identity = {"world_size": 1, "global_bs": 8}
    (tmp_path / "checkpoint-notes.txt").touch()
    assert checkpointing.resolve_resume(tmp_path, False, identity) is None
    for name in ("checkpoint-500", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        for overwrite in (False, True):
            with pytest.raises(UserError, match=name):
                checkpointing.resolve_resume(tmp_path, False, identity, overwrite=overwrite)
        assert (tmp_path / name / "file").exists()
        shutil.rmtree(tmp_path / name)
    (tmp_path / "adapter_model.safetensors").touch()  # of a run without checkpoints
    with pytest.raises(UserError, match=r"results of another run \(adapter_model\.safetensors\)"):
        checkpointing.resolve_resume(tmp_path, False, identity)


def test_overwrite_names_what_it_deletes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_run(tmp_path, 3)
    (tmp_path / "manifest.json").touch()
    (tmp_path / "notes.txt").touch()
    foreign = tmp_path / "checkpoint-4"
    foreign.mkdir()
    (foreign / checkpointing.COMPLETE).write_text("another run")
    with pytest.raises(UserError, match=r"deletes only what the run of run\.json made, not.*-4"):
        clear_output(tmp_path, overwrite=True)
    shutil.rmtree(foreign)
    clear_output(tmp_path, overwrite=True)
    assert "--overwrite: deleting checkpoint-3, manifest.json" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "run.json"]


def test_a_resumed_run_ignores_the_checkpoints_of_others(tmp_path: Path) -> None:
    record = own_run(tmp_path, 3, 20)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / checkpointing.COMPLETE).touch()
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-30" / checkpointing.COMPLETE).write_text("another run")
    (tmp_path / "checkpoint-notes.txt").touch()
    found = checkpointing.resolve_resume(tmp_path, True, record.identity)
    assert found == tmp_path / "checkpoint-20"
    assert [f.name for f in record.own_checkpoints()] == ["checkpoint-3", "checkpoint-20"]
    assert len(complete_checkpoints(tmp_path)) == 3
    with pytest.raises(UserError, match="checkpoint-30: Exists and was not written by this run"):
        record.begin(tmp_path / "checkpoint-30")


def test_differences_are_refused_unless_named(tmp_path: Path) -> None:
    record = own_run(tmp_path, 3)
    other = {**record.identity, "lr": 0.2, "base": "c", "trainer.weight_decay": 0.5}
    match = r"base was 'b', now 'c'; lr was 0\.1, now 0\.2; trainer\.weight_decay was None"
    with pytest.raises(UserError, match=match):
        checkpointing.resolve_resume(tmp_path, True, other)
    with pytest.raises(UserError, match="base was 'b', now 'c'; trainer"):
        checkpointing.resolve_resume(tmp_path, True, other, resume_anyway=["lr"])
    with pytest.raises(UserError, match="--resume_anyway lrr: No such field"):
        checkpointing.resolve_resume(tmp_path, True, other, resume_anyway=["lrr"])
    fields = ["lr", "base", "trainer.weight_decay"]
    assert checkpointing.resolve_resume(tmp_path, True, other, resume_anyway=fields)
    assert checkpointing.resolve_resume(tmp_path, True, other)  # recorded since
    (tmp_path / checkpointing.RUN_IDENTITY).unlink()
    with pytest.raises(UserError, match=r"run\.json is missing"):
        checkpointing.resolve_resume(tmp_path, True, other)
    assert checkpointing.resolve_resume(tmp_path, True, other, resume_anyway=["run.json"])
    assert checkpointing.resolve_resume(tmp_path, True, other)


def test_the_hash_of_a_base_covers_all_weights(tmp_path: Path) -> None:
    weights = torch.zeros(3 << 20)
    torch.save(weights, tmp_path / "consolidated.pth")
    before = weights_hash([tmp_path])
    (tmp_path / "manifest.json").write_text("{}")
    assert weights_hash([tmp_path]) == before
    weights[1 << 20 : 1 << 21] = 0.01  # partial_hash, of both ends, would not see this
    torch.save(weights, tmp_path / "consolidated.pth")
    assert weights_hash([tmp_path]) != before


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_one_step_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    write_tokens(tmp_path / "train.jsonl", 4)
    output = tmp_path / "out"
    flags = train_flags(tmp_path, output, "--steps", steps, "--bs", 2)
    assert train.main(flags) == 0
    assert f"no warm-up: the run has {steps} steps" in capsys.readouterr().out
    assert logged_values(output, "learning_rate")[0] == pytest.approx(2e-3)


@pytest.mark.slow
def test_resuming_on_another_base_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokens(tmp_path / "train.jsonl", 4)
    output, copied = tmp_path / "out", tmp_path / "base"
    shutil.copytree(tiny().folder, copied)
    flags: list[object] = ["--steps", 2, "--bs", 2, "--save_strategy", "steps", "--save_steps", 1]
    assert train.main(train_flags(tmp_path, output, *flags, "--ckpt", copied)) == 0
    (output / "manifest.json").unlink()
    weights = max(copied.rglob("*.*"), key=lambda p: p.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 100_000] = bytes(100_000)
    weights.write_bytes(content)
    more = ["--ckpt", copied, "--trainer", '{"weight_decay": 0.5}', "--resume"]
    assert train.main(train_flags(tmp_path, output, *flags, *more)) == 2
    error = capsys.readouterr().err
    assert "base was '" in error and "trainer.weight_decay was None, now 0.5" in error
