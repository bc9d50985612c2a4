"""run.json: what a run's results depend on, its id, and the checkpoints that it has begun to write.

A run deletes nothing but what this record, or the id in a checkpoint's COMPLETE, says is its own.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medley.errors import UserError
from medley.utils.config_files import read_json_object
from medley.utils.files import atomic_file, write_json

COMPLETE = "COMPLETE"  # in a checkpoint, written after all other files: the run's id
RUN_IDENTITY = "run.json"  # in the output folder
RESULTS = (
    "adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "manifest.json",
    "model",
)  # fmt: skip
_RECORD_FIELDS = {"run_id", "checkpoints", "resumed_anyway"}  # beside the identity
_OLD_FIELDS = {"rows": "sequences", "learn": "train_on"}  # alias
_OLD_TRAIN_ON = {"answers": "assistant", "everything": "all", "pictures": "images"}  # alias


@dataclass
class RunRecord:
    """The content of run.json.

    Attributes:
        folder: the output folder
        identity: the options that a resumed run must share
        run_id: random name of the run; empty for a run of Medley 0.1
        checkpoints: names of the checkpoints that the run has begun to write
        resumed_anyway: the differences that --resume_anyway allowed
    """

    folder: Path
    identity: dict[str, Any]
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    checkpoints: list[str] = field(default_factory=list)
    resumed_anyway: list[dict[str, Any]] = field(default_factory=list)

    def write(self) -> None:
        record = {
            **self.identity,
            "run_id": self.run_id,
            "checkpoints": self.checkpoints,
            **({"resumed_anyway": self.resumed_anyway} if self.resumed_anyway else {}),
        }
        write_json(self.folder / RUN_IDENTITY, record)

    def begin(self, checkpoint: Path) -> None:
        """Records a checkpoint as this run's, before its first file is written.

        Raises UserError for a folder that is there already and is not this run's.
        """
        if checkpoint.exists() and not self.owns(checkpoint):
            raise UserError(
                f"{checkpoint}: Exists and was not written by this run, so it is not replaced. "
                "Move it away and continue with --resume."
            )
        if checkpoint.name not in self.checkpoints:
            self.checkpoints.append(checkpoint.name)
            self.write()

    def complete(self, checkpoint: Path) -> None:
        """Records that a checkpoint is complete, in the checkpoint itself."""
        with atomic_file(checkpoint / COMPLETE) as temporary:
            temporary.write_text(self.run_id)

    def owns(self, checkpoint: Path) -> bool:
        """Whether this run wrote a checkpoint."""
        mark = checkpoint / COMPLETE
        if mark.is_file():
            return not self.run_id or mark.read_text(errors="replace").strip() == self.run_id
        return checkpoint.name in self.checkpoints

    def own_checkpoints(self) -> list[Path]:
        """The complete checkpoints of this run, oldest first."""
        return [folder for folder in complete_checkpoints(self.folder) if self.owns(folder)]

    def remove_incomplete(self) -> None:
        """Removes the checkpoints that this run began and did not complete."""
        for folder in numbered_checkpoints(self.folder):
            if not (folder / COMPLETE).is_file() and self.owns(folder):
                shutil.rmtree(folder)

    def adopt(self) -> None:
        """Gives a run of Medley 0.1, which had no id, an id, in its checkpoints too."""
        own = self.own_checkpoints()
        self.run_id = secrets.token_hex(8)
        for folder in own:
            self.complete(folder)
        self.checkpoints = [folder.name for folder in own]
        self.write()


def read_record(folder: Path) -> RunRecord | None:
    """The record in an output folder, with the field names of Medley 0.1 replaced."""
    file = folder / RUN_IDENTITY
    if not file.is_file():
        return None
    content = read_json_object(file)
    names, resumed = content.get("checkpoints", []), content.get("resumed_anyway", [])
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    is_record = is_list and isinstance(resumed, list)
    if not is_record or not isinstance(content.get("run_id", ""), str):
        raise UserError(f"{file}: Not the record of a training run. Name another --output_dir.")
    content.pop("ranks", None)  # alias
    identity = {
        _OLD_FIELDS.get(name, name): value
        for name, value in content.items()
        if name not in _RECORD_FIELDS
    }
    if "learn" in content:  # alias
        identity["train_on"] = _OLD_TRAIN_ON.get(str(content["learn"]), content["learn"])  # alias
    return RunRecord(folder, identity, content.get("run_id", ""), names, resumed)


def numbered_checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N, by N; other names with this beginning are the user's."""
    found = {
        int(match[1]): folder
        for folder in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-([0-9]+)", folder.name)) and folder.is_dir()
    }
    return [found[number] for number in sorted(found)]


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return [f for f in numbered_checkpoints(output_dir) if (f / COMPLETE).is_file()]


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint in a folder; None without one."""
    return next(reversed(complete_checkpoints(output_dir)), None)


def clear_output(output_dir: Path, overwrite: bool) -> None:
    """Refuses a folder with checkpoints or results; with `overwrite`, deletes those of a run.

    Deleted is only what the run of run.json made. Raises UserError for anything else.
    """
    checkpoints = sorted(f for f in output_dir.glob("checkpoint-*") if f.is_dir())
    results = [output_dir / name for name in RESULTS if (output_dir / name).exists()]
    if not checkpoints and not results:
        return
    if not overwrite:
        raise UserError(
            f"{output_dir}: contains checkpoints or results of another run "
            f"({_names([*checkpoints, *results])}). Continue that run with --resume, name another "
            "--output_dir, or delete its files with --overwrite."
        )
    record = read_record(output_dir)
    foreign = [f for f in checkpoints if record is None or not record.owns(f)]
    foreign += results if record is None else []
    if foreign:
        raise UserError(
            f"{output_dir}: --overwrite deletes only what the run of {RUN_IDENTITY} made, not "
            f"{_names(foreign)}. Move them away, or name another --output_dir."
        )
    print(f"--overwrite: deleting {_names([*checkpoints, *results])} in {output_dir}", flush=True)
    for path in (*checkpoints, *results):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def differing_fields(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that differ, each with its two values."""
    return {
        name: {"was": recorded.get(name), "now": current.get(name)}
        for name in sorted({*recorded, *current})
        if recorded.get(name) != current.get(name)
    }
