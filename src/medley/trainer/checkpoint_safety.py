"""Proves that resuming from a checkpoint runs no code of the checkpoint's.

transformers and DeepSpeed open the files of a checkpoint themselves, DeepSpeed with an unrestricted
unpickler. So each pickle is first read by torch's restricted unpickler, which knows tensors and the
names below, and replaces each of these by an empty class.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medley.errors import UserError
from medley.utils.config_files import one_line

ALLOWED = (
    r"deepspeed\.runtime\.zero\.config\.ZeroStageEnum",
    r"deepspeed\.runtime\.zero\.offload_config\.OffloadDeviceEnum",
    r"deepspeed\.runtime\.fp16\.loss_scaler\.(LossScaler|DynamicLossScaler)",
    r"deepspeed\.utils\.tensor_fragment\.(fragment_address|tensor_fragment)",
    r"numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)",
    r"numpy\.(ndarray|dtype|dtypes\.[A-Za-z0-9]+DType)",
)
# Nothing reads this file when a run is resumed. Its classes are those of the installed versions.
ALLOWED_IN = {"training_args.bin": (r"(transformers|accelerate)\.[a-z_.]+\.[A-Z][A-Za-z]+",)}
PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
_OTHER_SUFFIXES = {".safetensors", ".json", ".jsonl", ".md", ".py", ".txt", ".csv", ".png"}
_MAGIC = (b"PK", b"\x80")  # a zip archive, a pickle
_TAGS = ("latest", "latest_universal")  # files in which DeepSpeed names a folder
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def check_checkpoint(checkpoint: Path) -> None:
    """Raises UserError for a file that could run code, or that leads out of the checkpoint."""
    for name in _TAGS:
        read_tag(checkpoint / name)
    for path in sorted(checkpoint.rglob("*")):
        if path.is_symlink():
            raise UserError(
                f"{path}: A link in a checkpoint is not followed. Copy the file it leads to."
            )
        if path.is_file() and _may_be_pickle(path):
            check_pickle(path)


def read_tag(file: Path) -> str | None:
    """The folder that DeepSpeed's `latest` names; None without that file.

    Raises UserError for anything but the name of a folder beside it.
    """
    if not file.exists():
        return None
    with open(file, "rb") as handle:
        tag = handle.read(256).decode("utf-8", "replace").strip()
    if not _TAG.fullmatch(tag) or not (file.parent / tag).is_dir():
        raise UserError(
            f"{file}: Must name a folder beside it (got {tag!r}). Copy the checkpoint again."
        )
    return tag


def _may_be_pickle(path: Path) -> bool:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return True
    if path.suffix.lower() in _OTHER_SUFFIXES:
        return False
    with open(path, "rb") as file:
        return file.read(2).startswith(_MAGIC)


def check_pickle(path: Path) -> None:
    """Raises UserError for a pickle that contains anything but tensors and allowed names."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        patterns = (*ALLOWED, *ALLOWED_IN.get(path.name, ()))
        foreign = sorted(n for n in names if not any(re.fullmatch(p, n) for p in patterns))
        if not foreign:
            stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
                (_stand_in(name), name) for name in names
            ]
            with torch.serialization.safe_globals(stand_ins):
                torch.load(path, "cpu", weights_only=True, mmap=True)
            return
    except Exception as error:  # torch raises many kinds of errors for a damaged pickle
        raise UserError(
            f"{path}: Damaged, or not written by torch.save ({one_line(error)}). Copy the "
            "checkpoint again."
        ) from error
    raise UserError(
        f"{path}: The pickle contains more than tensors ({', '.join(foreign)}) and was not loaded, "
        "because unpickling could run code."
    )


def _stand_in(name: str) -> type[Any]:
    def ignore(self: Any, *args: Any, **kwargs: Any) -> None:
        pass

    return type(name.rpartition(".")[2], (), {"__init__": ignore, "__setstate__": ignore})
