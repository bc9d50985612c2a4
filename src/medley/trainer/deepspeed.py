"""DeepSpeed: configurations by name, environment variables, checkpoints for other world sizes."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from medley.errors import UserError
from medley.trainer.checkpoint_safety import read_tag
from medley.trainer.extension_locks import clear_stale_locks
from medley.utils.files import read_json

CONFIGS = "deepspeed"  # folder of the package with the files that `--ds NAME` finds
UNIVERSAL = "latest_universal"  # file in which DeepSpeed looks for a universal checkpoint's name


def config_names() -> dict[str, Path]:
    """The configurations that the package ships: name -> file."""
    folder = Path(str(resources.files("medley") / CONFIGS))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_config(name: str) -> Path:
    """A configuration file by its path, or one of the package's by its name.

    Raises UserError that lists the names if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = config_names()
    if name not in shipped:
        raise UserError(
            f"--ds {name}: no such file and no configuration of that name (names: "
            f"{', '.join(shipped)})."
        )
    return shipped[name]


def read_config(name: str | None) -> dict[str, Any]:
    """A configuration by path or name; empty without DeepSpeed."""
    config: dict[str, Any] = {} if name is None else read_json(find_config(name))
    return config


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_environment() -> None:
    """Sets the environment variables that DeepSpeed reads when it is imported."""
    if "RANK" not in os.environ:  # started without torchrun: DeepSpeed would need MPI
        single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in single.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    # DeepSpeed builds its extensions with ninja, which a virtual environment has beside python.
    bin_folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    clear_stale_locks()


def needs_conversion(checkpoint: Path, world_size: int) -> bool:
    """Whether a checkpoint contains DeepSpeed's state of another number of ranks."""
    states = list(checkpoint.glob("global_step*/*_optim_states.pt"))
    ranks = {int(match[1]) for p in states if (match := re.search(r"_rank_(\d+)_", p.name))}
    return bool(ranks) and len(ranks) != world_size


def to_universal_checkpoint(checkpoint: Path) -> None:
    """Converts DeepSpeed's state in a checkpoint to one that any number of ranks can load."""
    tag = read_tag(checkpoint / "latest")
    if tag is None:
        raise UserError(f"{checkpoint}: DeepSpeed's file `latest` is missing. Copy it again.")
    output = checkpoint / f"{tag}_universal"
    if (checkpoint / UNIVERSAL).is_file():
        return
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint / tag), "--output_folder", str(output)]
    done = subprocess.run(
        [*command, "--inject_missing_state"], capture_output=True, text=True, check=False
    )
    if done.returncode or not output.is_dir():
        last_line = (done.stderr.strip().splitlines() or ["no error message"])[-1]
        raise UserError(
            f"{checkpoint}: DeepSpeed could not convert its state to another number of ranks "
            f"({last_line}). Resume with the number of ranks that wrote the checkpoint."
        )
    (checkpoint / UNIVERSAL).write_text(output.name)
