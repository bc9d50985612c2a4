"""Checkpoints of a run: proven when they are written, passed over when they are torn, gone on with
on another number of ranks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from transformers import TrainerCallback

from medley.checkpoints.adapter import read_adapter
from medley.checkpoints.checkpoint import is_adapter
from medley.errors import UserError
from medley.utils.distributed import barrier, is_main_rank
from medley.utils.files import read_json, write_json

COMPLETE = "COMPLETE"  # written last into a checkpoint folder: one without it is half-written
RUN = "run.json"  # in the output folder: what a run that is gone on with must not change
UNIVERSAL = "latest_universal"  # where DeepSpeed looks for a state for any number of ranks


class VerifiedCheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Reads an adapter back after every save, marks the folder as complete when all ranks have
    written, and only then removes the oldest ones beyond `limit`."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Losses are logged as means since the last log: those of a run that is gone on with are the
        # same only where a save is a log as well.
        last = state.global_step >= state.max_steps
        control.should_log = control.should_log or control.should_save or last

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and is_adapter(folder):
            # The first step of a warm-up has a learning rate of zero.
            check_saved_adapter(folder, kwargs.get("model"), trained=state.global_step > 1)
        barrier()  # the other ranks have written their part
        if state.is_world_process_zero:
            (folder / COMPLETE).touch()
            for old in checkpoints(folder.parent)[: -self.limit] if self.limit else ():
                shutil.rmtree(old)


def check_saved_adapter(folder: Path, model: Any, trained: bool = True) -> None:
    """Raises UserError for a saved adapter that is empty, zero, or lacks tensors of the model's."""
    _, tensors = read_adapter(folder, trained)
    if model is not None and hasattr(model, "peft_config"):
        names = {n for n, _ in model.named_parameters()}
        expected = get_peft_model_state_dict(model, dict.fromkeys(names))
        missing = sorted(set(expected) - set(tensors))
        if missing:
            raise UserError(
                f"{folder}: the adapter that was saved lacks {len(missing)} tensors, "
                f"{', '.join(missing[:3])} among them; run `medley doctor` for the versions"
            )


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p.parent for p in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that was saved whole; half-written ones are passed over."""
    return next(reversed(checkpoints(folder)), None)


def resolve_resume(folder: Path, resume: bool, run: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from; None for a fresh run, whose `run` is written down.

    Raises UserError where there is none, where a fresh run would mix with an older one, and where
    `run` differs from what the older one wrote down: then its steps would see other samples.
    """
    start = last_complete_checkpoint(folder)
    if is_main_rank() and (resume or start is None):
        for torn in folder.glob("checkpoint-*"):  # half-written: nothing can go on from there
            if not (torn / COMPLETE).exists():
                shutil.rmtree(torn)
    if not resume:
        if start is not None:
            raise UserError(
                f"{folder}: holds checkpoints of another run; go on with --resume, or name "
                "another --output_dir"
            )
        if is_main_rank():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RUN, dict(run))
        return None
    if start is None:
        raise UserError(f"{folder}: no complete checkpoint to go on from; leave out --resume")
    before = read_json(folder / RUN) if (folder / RUN).is_file() else dict(run)
    for name, value in run.items():
        if name != "ranks" and before.get(name) != value:
            hint = ""
            if name == "global_bs":
                hint = f": with {run['ranks']} ranks give --global_bs {before.get(name)}"
            raise UserError(
                f"{folder}: the run had {name} {before.get(name)}, this one has {value}; a run "
                f"that is gone on with keeps it{hint}"
            )
    return start


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is that of a run's last step: only what comes after it is left."""
    state = read_json(checkpoint / "trainer_state.json")
    return bool(state["global_step"] >= state["max_steps"])


def needs_conversion(checkpoint: Path, ranks: int) -> bool:
    """Whether a checkpoint holds DeepSpeed's state of another number of ranks."""
    states = list(checkpoint.glob("global_step*/*_optim_states.pt"))
    saved = {int(m[1]) for p in states if (m := re.search(r"_rank_(\d+)_", p.name))}
    return bool(saved) and len(saved) != ranks


def to_universal_checkpoint(checkpoint: Path) -> None:
    """DeepSpeed's state of some ranks -> one that any number of ranks can read, beside it."""
    tag = (checkpoint / "latest").read_text().strip()
    output = checkpoint / f"{tag}_universal"
    if not (checkpoint / UNIVERSAL).is_file():
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", str(checkpoint / tag), "--output_folder", str(output)]
        done = subprocess.run(
            [*command, "--inject_missing_state"], capture_output=True, text=True, check=False
        )
        if done.returncode or not output.is_dir():
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"{checkpoint}: DeepSpeed could not convert its state to another number of ranks "
                f"({last}); go on with the number of ranks that wrote it"
            )
        (checkpoint / UNIVERSAL).write_text(output.name)
