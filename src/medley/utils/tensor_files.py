"""Reads tensors from safetensors files and pickles: one file, or a folder of shards.

Pickles are read with weights_only=True. Files are memory-mapped where their format allows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medley.errors import UserError
from medley.utils.config_files import one_line, read_json_object, shown
from medley.utils.files import refuse_lfs_pointer

SAFETENSORS = ".safetensors"
_INDEX = {
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}
_LIGHTNING = ("pytorch_lightning.", "lightning.", "lightning_fabric.")
_ZIP_MAGIC = b"PK"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_pickle(path: Path) -> dict[str, Any]:
    """The content of a pickle of tensors.

    Checkpoints of PyTorch Lightning mention Lightning's classes beside the weights. Stand-ins
    without code replace these classes. Raises UserError for a file that is missing, a Git LFS
    pointer or damaged, and for a pickle that contains other classes.
    """
    check_weights_file(path)
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an older container or a damaged file; torch.load below reports which
        classes = []
    stand_ins: list[Any] = [
        (type(name.rpartition(".")[2], (), {}), name)
        for name in classes
        if name.startswith(_LIGHTNING)
    ]
    try:
        with torch.serialization.safe_globals(stand_ins):
            loaded = torch.load(path, "cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch raises many kinds of errors for a damaged pickle
        foreign = [name for name in classes if not name.startswith(_LIGHTNING)]
        if foreign:
            raise UserError(
                f"{path}: The pickle contains more than tensors ({', '.join(foreign)}) and was "
                "not loaded, because unpickling could run code."
            ) from error
        raise UserError(
            f"{path}: Damaged, truncated or not a weights file ({one_line(error)})."
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path}: Contains an object of the wrong type (got {type(loaded).__name__}, "
            "expected a dictionary of tensors)."
        )
    return loaded


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All weights of one file. Raises UserError as `load_pickle` and `check_weights` do."""
    if path.suffix != SAFETENSORS:
        return check_weights(load_pickle(path), path)
    with open_safetensors(path) as file:
        return {name: _get_weight(file, name, path) for name in list(file.keys())}


def _get_weight(file: Any, name: str, path: Path) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    return check_weights({name: tensor}, path)[name]


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened by `safe_open`. Raises UserError for a damaged one."""
    check_weights_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: Damaged or truncated ({one_line(error)}).") from error


def check_weights(tensors: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The content of a pickle, if it is weights: names, and dense tensors.

    A tensor whose elements share memory would grow when it is copied, from a small file to any
    size. Raises UserError that names the first entry that is not such a tensor.
    """
    for name, tensor in tensors.items():
        problem = f"an object of type {type(tensor).__name__}"
        if isinstance(tensor, Tensor):
            problem = ""
            if tensor.layout is not torch.strided or tensor.device.type != "cpu":
                problem = f"a {tensor.layout} tensor on {tensor.device}"
            elif tensor.nbytes > tensor.untyped_storage().nbytes():
                problem = f"{tensor.untyped_storage().nbytes()} bytes for {tuple(tensor.shape)}"
        if not isinstance(name, str):
            problem = "a name that is not a string"
        if problem:
            raise UserError(
                f"{path}: Invalid weight {shown(name)} (got {problem}, expected a dense tensor)."
            )
    return dict(tensors)


def check_weight(name: str, tensor: Tensor, shape: tuple[int, ...] | None, where: str) -> Tensor:
    """The tensor, if it is floating-point and of this shape. Raises UserError otherwise."""
    if tensor.dtype not in _DTYPES:
        raise UserError(
            f"{where}: Unsupported dtype of {name} (got {tensor.dtype}, expected "
            f"{', '.join(str(dtype) for dtype in _DTYPES)})."
        )
    if shape is not None and tuple(tensor.shape) != shape:
        raise UserError(
            f"{where}: Wrong shape of {name} (got {tuple(tensor.shape)}, expected {shape} by the "
            "configuration)."
        )
    return tensor


def check_weights_file(path: Path) -> None:
    """Raises UserError if a file is missing or is a Git LFS pointer."""
    if not path.is_file():
        raise UserError(f"{path}: File not found.")
    refuse_lfs_pointer(path)


def check_names(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raises UserError that names missing and unexpected tensors."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    advice = {
        "missing": "Copy all files of the checkpoint again, including its configuration.",
        "unexpected": "The configuration may belong to another (smaller?) model.",
    }
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise UserError(f"{where}: Tensors are {problem}: {_some(names)}. {advice[problem]}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name if len(name) < 80 else shown(name) for name in names[:5]) + more


def _is_zip(path: Path) -> bool:
    """Whether a pickle is a zip archive. torch cannot map the older container."""
    with open(path, "rb") as file:
        return file.read(2) == _ZIP_MAGIC


class ShardedTensors:
    """The tensors of a folder in Hugging Face's layout: `model.safetensors`, or the older
    `pytorch_model.bin`, as one file or as shards with an index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._find()

    def _find(self) -> dict[str, Path]:
        """Tensor name -> the file that contains it."""
        for single, index in _INDEX.items():
            if (self.folder / index).is_file():
                return self._read_index(single, index)
            if (self.folder / single).is_file():
                path = self.folder / single
                return dict.fromkeys(_names_in(path), path)
        raise UserError(
            f"{self.folder}: No weights found (expected model.safetensors, an index with its "
            "shards, or pytorch_model.bin)."
        )

    def _read_index(self, single: str, index: str) -> dict[str, Path]:
        table = read_json_object(self.folder / index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise UserError(
                f"{self.folder / index}: Invalid weight_map (got {shown(table)}, expected an "
                "object with the file of each tensor)."
            )
        for name, file in table.items():
            if not isinstance(file, str) or not file or Path(file).name != file:
                raise UserError(
                    f"{self.folder / index}: Invalid file of {name} (got {shown(file)}, expected "
                    "the name of a file beside the index)."
                )
        missing = sorted({f for f in table.values() if not (self.folder / f).is_file()})
        if missing:
            raise UserError(
                f"{self.folder}: Weight files are missing: {_some(missing)} ({index} lists them). "
                "Copy them into the folder."
            )
        pattern = f"{Path(single).stem}-*-of-*{Path(single).suffix}"
        surplus = {p.name for p in self.folder.glob(pattern)} - set(table.values())
        if surplus:
            raise UserError(
                f"{self.folder}: {_some(sorted(surplus))} not listed in {index}. The folder "
                "mixes shards of two checkpoints. Move these files away, or copy the index that "
                "belongs to them."
            )
        return {name: self.folder / file for name, file in table.items()}

    def names(self) -> list[str]:
        return list(self._files)

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yields tensors file by file, mapped and not copied; all of them unless named."""
        wanted = set(self._files if names is None else names)
        by_file: dict[Path, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self._files[name], []).append(name)
        for path, own in sorted(by_file.items()):
            if path.suffix == SAFETENSORS:
                with open_safetensors(path) as file:
                    for name in sorted(own):
                        yield name, _get_weight(file, name, path)
            else:
                state = load_tensors(path)
                check_names(own, set(state) & set(own), str(path))
                for name in sorted(own):
                    yield name, state[name]

    def get(self, name: str) -> Tensor:
        return next(self.tensors([name]))[1]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor. Reads the headers of safetensors files only."""
        found: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self._files.values())):
            if path.suffix == SAFETENSORS:
                with open_safetensors(path) as file:
                    for name in file.keys():  # noqa: SIM118  # no dictionary
                        found[name] = tuple(file.get_slice(name).get_shape())
            else:
                found |= {name: tuple(t.shape) for name, t in load_tensors(path).items()}
        check_names(self._files, set(found) & set(self._files), str(self.folder))
        return {name: found[name] for name in self._files}


def _names_in(path: Path) -> list[str]:
    if path.suffix != SAFETENSORS:
        return list(load_tensors(path))
    with open_safetensors(path) as file:
        return list(file.keys())
