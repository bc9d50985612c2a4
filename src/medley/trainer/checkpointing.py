"""Training checkpoints: verified after each save, and checked before a run is resumed."""

from __future__ import annotations

import shutil
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
from medley.utils.run_identity import check_same_run

COMPLETE = "COMPLETE"  # empty file in a checkpoint folder, written after all other files
RUN_IDENTITY = "run.json"  # in the output folder: the options that a resumed run must share
_OLD_FIELDS = {"rows": "sequences", "learn": "train_on"}  # alias
_OLD_TRAIN_ON = {"answers": "assistant", "everything": "all", "pictures": "images"}  # alias


class VerifiedCheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Verifies every checkpoint and marks it as complete; then removes the oldest ones.

    A saved adapter is read back. The mark is written after all ranks have written their files.
    At most `limit` complete checkpoints are kept.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The log has the mean loss since the last entry. A resumed run starts at a checkpoint, so
        # its entries are those of an uninterrupted run only if each save has an entry as well.
        last = state.global_step >= state.max_steps
        control.should_log = control.should_log or control.should_save or last

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and is_adapter(folder):
            # With warm-up, the learning rate of the first step is zero: its adapter is zero, too.
            check_saved_adapter(folder, kwargs.get("model"), trained=state.global_step > 1)
        barrier()  # waits until the other ranks have written their files
        if state.is_world_process_zero:
            (folder / COMPLETE).touch()
            for old in complete_checkpoints(folder.parent)[: -self.limit] if self.limit else ():
                shutil.rmtree(old)


def check_saved_adapter(folder: Path, model: Any, trained: bool = True) -> None:
    """Raises UserError if a saved adapter is empty or zero, or lacks tensors of the model's."""
    _, tensors = read_adapter(folder, trained)
    if model is not None and hasattr(model, "peft_config"):
        names = {n for n, _ in model.named_parameters()}
        expected = get_peft_model_state_dict(model, dict.fromkeys(names))
        missing = sorted(set(expected) - set(tensors))
        if missing:
            raise UserError(
                f"{folder}: the saved adapter lacks {len(missing)} tensors ("
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Run `medley "
                "doctor` to check the installed versions."
            )


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = [file.parent for file in output_dir.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run; None if there is none."""
    return next(reversed(complete_checkpoints(output_dir)), None)


def resolve_resume(output_dir: Path, resume: bool, identity: Mapping[str, Any]) -> Path | None:
    """Finds the checkpoint to resume from; None for a new run, whose identity is recorded.

    Removes incomplete checkpoints. Raises UserError if there is nothing to resume, if a new run
    would mix its checkpoints with those of another run, and if `identity` differs from the
    recorded one in more than the number of ranks.
    """
    checkpoint = last_complete_checkpoint(output_dir)
    if is_main_rank() and (resume or checkpoint is None):
        for folder in output_dir.glob("checkpoint-*"):
            if not (folder / COMPLETE).exists():
                shutil.rmtree(folder)
    if not resume:
        if checkpoint is not None:
            raise UserError(
                f"{output_dir}: contains checkpoints of another run. Continue that run with "
                "--resume, or name another --output_dir."
            )
        if is_main_rank():
            output_dir.mkdir(parents=True, exist_ok=True)
            write_json(output_dir / RUN_IDENTITY, dict(identity))
        return None
    if checkpoint is None:
        raise UserError(f"{output_dir}: no complete checkpoint to resume from. Omit --resume.")
    file = output_dir / RUN_IDENTITY
    recorded = _read_identity(file) if file.is_file() else identity
    advice = "name another --output_dir"
    if recorded.get("global_bs") != identity["global_bs"]:
        advice += (
            f". To keep the batch on {identity['world_size']} rank(s), pass --global_bs "
            f"{recorded.get('global_bs')}"
        )
    check_same_run(recorded, identity, output_dir, advice, ignored=("world_size",))
    return checkpoint


def _read_identity(file: Path) -> dict[str, Any]:
    """The recorded identity, with the field names of an earlier version replaced."""
    recorded: dict[str, Any] = read_json(file)
    recorded.pop("ranks", None)  # alias
    identity = {_OLD_FIELDS.get(name, name): value for name, value in recorded.items()}
    if "learn" in recorded:  # alias
        identity["train_on"] = _OLD_TRAIN_ON.get(recorded["learn"], recorded["learn"])  # alias
    return identity


def is_last_step(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved after the last step of its run."""
    state = read_json(checkpoint / "trainer_state.json")
    return bool(state["global_step"] >= state["max_steps"])
