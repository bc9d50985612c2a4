"""Training checkpoints: verified after each save, and checked before a run is resumed."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from transformers import TrainerCallback, TrainerState

from medley.checkpoints.adapter import read_adapter
from medley.checkpoints.checkpoint import is_adapter
from medley.errors import UserError
from medley.trainer.run_record import (
    COMPLETE,
    RUN_IDENTITY,
    RunRecord,
    clear_output,
    differing_fields,
    last_complete_checkpoint,
    read_record,
)
from medley.utils.config_files import integer, library_errors, read_json_object, shown
from medley.utils.distributed import barrier, is_main_rank
from medley.utils.run_identity import check_same_run

NEW_FIELDS = ("base", "adapter")  # of the identity, since Medley 0.2
TRAINER_PREFIX = "trainer."  # of the fields of TrainingArguments in the identity


class VerifiedCheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Verifies every checkpoint and records that it is complete; then removes the oldest ones.

    A saved adapter is read back. The mark is written after all ranks have written their files.
    At most `limit` complete checkpoints of this run are kept; others are never touched.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def _record(self, output_dir: str) -> RunRecord:
        record = read_record(Path(output_dir))
        if record is None:
            raise UserError(f"{output_dir}: {RUN_IDENTITY} was deleted during the run.")
        return record

    def _begin(self, args: Any, state: Any, control: Any) -> None:
        if control.should_save and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._record(args.output_dir).begin(folder)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The log has the mean loss since the last entry. A resumed run starts at a checkpoint, so
        # its entries are those of an uninterrupted run only if each save has an entry as well.
        last = state.global_step >= state.max_steps
        control.should_log = control.should_log or control.should_save or last
        self._begin(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save
        self._begin(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and is_adapter(folder):
            # With warm-up, the learning rate of the first step is zero: its adapter is zero, too.
            check_saved_adapter(folder, kwargs.get("model"), trained=state.global_step > 1)
        barrier()  # waits until the other ranks have written their files
        if state.is_world_process_zero:
            record = self._record(args.output_dir)
            record.complete(folder)
            for old in record.own_checkpoints()[: -self.limit] if self.limit else ():
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


def resolve_resume(
    output_dir: Path,
    resume: bool,
    identity: Mapping[str, Any],
    *,
    resume_anyway: Collection[str] = (),
    overwrite: bool = False,
) -> Path | None:
    """Finds the checkpoint to resume from; None for a new run, whose identity is recorded.

    Removes the incomplete checkpoints of the resumed run. Raises UserError if there is nothing to
    resume, if a new run would mix its checkpoints with those of another run, and if `identity`
    differs from the recorded one in more than the number of ranks.

    Args:
        output_dir: folder of the run
        resume: whether the run is to be continued
        identity: what the results depend on
        resume_anyway: fields that may differ (RUN_IDENTITY: there need not be a record)
        overwrite: whether a new run deletes an earlier run's files
    """
    if not resume:
        if is_main_rank():  # which may be writing its first checkpoint when another rank is here
            clear_output(output_dir, overwrite)
            output_dir.mkdir(parents=True, exist_ok=True)
            RunRecord(output_dir, dict(identity)).write()
        return None
    record = read_record(output_dir)
    if record is None:
        record = _record_for_unknown_run(output_dir, identity, resume_anyway)
    checkpoint = next(reversed(record.own_checkpoints()), None)
    if checkpoint is None:
        raise UserError(
            f"{output_dir}: no complete checkpoint to resume from (of the run that {RUN_IDENTITY} "
            "describes). Start again with --overwrite instead of --resume."
        )
    _check_identity(record, identity, resume_anyway)
    if is_main_rank():
        _update_record(record, identity, resume_anyway, checkpoint)
    return checkpoint


def _record_for_unknown_run(
    output_dir: Path, identity: Mapping[str, Any], resume_anyway: Collection[str]
) -> RunRecord:
    """The record of a folder without run.json. Raises UserError unless the user accepts that."""
    last = last_complete_checkpoint(output_dir)
    if last is None:
        raise UserError(f"{output_dir}: no complete checkpoint to resume from. Omit --resume.")
    if RUN_IDENTITY not in resume_anyway:
        raise UserError(
            f"{output_dir}: {RUN_IDENTITY} is missing, so it is unknown with which options and "
            f"base {last.name} was made. Copy {RUN_IDENTITY} here as well, or accept this with "
            f"--resume_anyway {RUN_IDENTITY}."
        )
    record = RunRecord(output_dir, dict(identity), (last / COMPLETE).read_text().strip())
    record.checkpoints = [folder.name for folder in record.own_checkpoints()]
    return record


def _check_identity(
    record: RunRecord, identity: Mapping[str, Any], resume_anyway: Collection[str]
) -> None:
    unknown = sorted({*resume_anyway} - {*record.identity, *identity, RUN_IDENTITY})
    if unknown:
        raise UserError(
            f"--resume_anyway {' '.join(unknown)}: No such field (fields: "
            f"{', '.join(sorted(identity))}, {RUN_IDENTITY})."
        )
    ignored = {"world_size", *resume_anyway}
    if "base" not in record.identity and "base" in identity:  # a run of Medley 0.1
        missing = {n for n in identity if n in NEW_FIELDS or n.startswith(TRAINER_PREFIX)}
        ignored |= missing
        warnings.warn(
            f"{record.folder / RUN_IDENTITY}: Written by Medley 0.1, which did not record "
            f"{', '.join(sorted(missing))}. They are not compared.",
            stacklevel=2,
        )
    advice = "name another --output_dir, or name fields that may differ with --resume_anyway"
    if record.identity.get("global_bs") != identity["global_bs"]:
        advice += (
            f". To keep the batch on {identity['world_size']} rank(s), pass --global_bs "
            f"{record.identity.get('global_bs')}"
        )
    check_same_run(record.identity, identity, record.folder, advice, ignored=ignored)


def _update_record(
    record: RunRecord,
    identity: Mapping[str, Any],
    resume_anyway: Collection[str],
    checkpoint: Path,
) -> None:
    """Records what differs, and removes what the interrupted run left incomplete."""
    differing = differing_fields(record.identity, identity)
    accepted = {name: values for name, values in differing.items() if name in resume_anyway}
    if accepted or not (record.folder / RUN_IDENTITY).is_file():
        entry = {"checkpoint": checkpoint.name, "fields": accepted}
        record.resumed_anyway = [*record.resumed_anyway, entry]
        record.identity |= {name: identity.get(name) for name in accepted}
        print(f"resumed with other options: {accepted or 'unknown'}", flush=True)
        record.write()
    if not record.run_id:
        record.adopt()
    record.remove_incomplete()


def is_last_step(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved after the last step of its run."""
    file = checkpoint / "trainer_state.json"
    fields = read_json_object(file)
    with library_errors(file, "Damaged", "Copy the checkpoint again."):
        state = TrainerState.load_from_json(str(file))
    for name, kind in (("log_history", list), ("stateful_callbacks", dict)):
        if not isinstance(getattr(state, name), kind):
            raise UserError(
                f"{file}: Invalid {name} (got {shown(getattr(state, name))}). Copy the checkpoint "
                "again."
            )
    done = integer(file, "global_step", fields.get("global_step"), low=0)
    return done >= integer(file, "max_steps", fields.get("max_steps"))
