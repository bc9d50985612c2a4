"""Chameleon's layout: `models/<size>/*.pth` with its JSON files, and the folder `tokenizer/`."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medley.checkpoints.torch_writer import TorchWriter
from medley.checkpoints.weight_map import (
    ROPE,
    HeadLayout,
    Norms,
    rope_frequencies,
    split_qkv,
    to_chameleon,
    to_hugging_face,
    weight_rules,
)
from medley.errors import UserError
from medley.modeling.dims import ModelDims
from medley.utils.config_files import integer, library_errors, number, read_json_object, shown
from medley.utils.files import atomic_file, write_json
from medley.utils.tensor_files import check_names, load_tensors

DEFAULT_CONTEXT = 4096  # params.json does not contain it; Chameleon's loader has this constant
TOKENIZER_FILES = ("text_tokenizer.json", "vqgan.yaml", "vqgan.ckpt")
OPTIONAL_TOKENIZER_FILES = ("text_tokenizer_modified.json",)
PARAMS = "params.json"
_COPY = "Copy all files of the checkpoint again."
_MAX_SHARDS = 100  # names of files have two digits
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_LAYER = re.compile(r"layers\.(\d+)\.")


def is_chameleon(folder: Path) -> bool:
    return (folder / "models").is_dir()


def model_folder(folder: Path, size: str | None = None) -> Path:
    """`models/<size>`. The size may be left out if there is only one."""
    sizes = sorted(p.name for p in (folder / "models").iterdir() if p.is_dir())
    if size is None and len(sizes) != 1:
        raise UserError(
            f"{folder / 'models'}: Expected one model (got {', '.join(sizes) or 'none'}). Name one "
            f"as the checkpoint, for example {folder / 'models' / (sizes or ['<size>'])[0]}."
        )
    chosen = size or sizes[0]
    if chosen not in sizes:
        raise UserError(
            f"{folder / 'models'}: Model size not found (got {chosen!r}, expected one of "
            f"{', '.join(sizes)})."
        )
    return folder / "models" / chosen


class ChameleonWeights:
    """The decoder's tensors in a folder `models/<size>`, under Hugging Face's names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.params = read_json_object(folder / PARAMS)
        if not isinstance(self.params.get("model"), dict):
            raise UserError(
                f"{folder / PARAMS}: Invalid model (got {shown(self.params.get('model'))}, "
                "expected an object with the sizes of the model)."
            )
        self._files = self._shard_files()

    def _shard_files(self) -> list[Path]:
        single = self.folder / "consolidated.pth"
        numbered = {
            int(match[1]): path
            for path in self.folder.iterdir()
            if (match := _SHARD.fullmatch(path.name))
        }
        declared = self.params.get("model_parallel_size")
        if declared is not None:
            integer(self.folder / PARAMS, "model_parallel_size", declared, high=_MAX_SHARDS)
        if single.is_file() and numbered:
            raise UserError(
                f"{self.folder}: Contains consolidated.pth and {len(numbered)} numbered shards. "
                "Only one of the two can be the model. Move the other away."
            )
        if single.is_file():
            files = [single]
        else:
            files = [path for _, path in sorted(numbered.items())]
            expected = declared or len(files)
            missing = [i for i in range(expected) if i not in numbered]
            if missing or not files:
                names = ", ".join(f"consolidated.{i:02d}.pth" for i in missing)
                names = "consolidated.pth" if expected <= 1 else names
                raise UserError(
                    f"{self.folder}: Weight files are missing: {names}. Copy them into the folder."
                )
        if declared not in (None, len(files)):
            raise UserError(
                f"{self.folder}: Wrong number of shards (got {len(files)}, expected {declared} by "
                "params.json). Copy the missing shards, or move away those of another model."
            )
        return files

    @cached_property
    def _shards(self) -> list[dict[str, Tensor]]:
        heads, key_value_heads = _heads(self.params, self.folder / PARAMS, len(self._files))
        own = HeadLayout(heads // len(self._files), key_value_heads // len(self._files), 1)
        shards = []
        for path in self._files:
            with library_errors(path, "A wqkv does not fit n_heads in params.json", _COPY):
                shards.append(split_qkv(load_tensors(path), own))
        return shards

    @cached_property
    def dims(self) -> ModelDims:
        return _dims_from_params(self.params, self._shards, self.folder / PARAMS)

    @property
    def dtype(self) -> torch.dtype:
        return _tensor(self._shards[0], "output.weight", self._files[0]).dtype

    @property
    def rope(self) -> Tensor | None:
        """The rotary frequencies, if the files contain them."""
        return self._shards[0].get(ROPE)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, in Hugging Face's form. Raises UserError for missing tensors.

        Tensors may share their memory with this object; do not modify them in place.
        """
        rules = weight_rules(self.dims.layers)
        for path, shard in zip(self._files, self._shards, strict=True):
            check_names([rule.chameleon for rule in rules], set(shard) - {ROPE}, str(path))
        heads = HeadLayout.of(self.dims)
        for rule in rules:
            parts = [shard[rule.chameleon] for shard in self._shards]
            with library_errors(self.folder, f"Wrong shape of {rule.chameleon}", _COPY):
                tensor = to_hugging_face(rule, parts, heads)
            yield rule.hugging_face, tensor


def write_model(
    folder: Path,
    dims: ModelDims,
    tensors: Callable[[], Iterator[tuple[str, Tensor]]],
    original: ChameleonWeights | None = None,
    norms: Norms = "equal",
) -> None:
    """Writes `models/<size>` from Hugging Face's tensors, one tensor at a time.

    Args:
        tensors: called twice, for the shapes and for the values
        original: the model that this one was trained from; its `params.json` and rotary
            frequencies are copied. Without it, both are computed from `dims`.
        norms: see `weight_map.to_chameleon`
    """
    folder.mkdir(parents=True, exist_ok=True)
    rules = {rule.hugging_face: rule for rule in weight_rules(dims.layers)}
    heads = HeadLayout.of(dims)
    shapes = {name: tensor.to("meta") for name, tensor in tensors()}
    check_names(rules, shapes, str(folder))
    frequencies = original.rope if original is not None else None
    if frequencies is None:
        frequencies = rope_frequencies(dims.width // dims.heads, dims.rope_theta)
    # This pass computes shapes only. Unequal norms are detected when values are written.
    parts = {r.chameleon: to_chameleon(r, shapes[n], heads, "mean") for n, r in rules.items()}
    with ExitStack() as stack:
        files = []
        for number in range(dims.shards):
            name = "consolidated.pth" if dims.shards == 1 else f"consolidated.{number:02d}.pth"
            temporary = stack.enter_context(atomic_file(folder / name))
            own = {key: by_shard[number] for key, by_shard in parts.items()}
            files.append(TorchWriter(temporary, {**own, ROPE: frequencies}))
            stack.callback(files[-1].abandon)
        for name, tensor in tensors():
            rule = rules[name]
            for file, part in zip(files, to_chameleon(rule, tensor, heads, norms), strict=True):
                file.put(rule.chameleon, part)
        for file in files:
            file.put(ROPE, frequencies)
            file.close()
    params = _dims_to_params(dims)
    if original is not None:
        params = {**original.params, "model_parallel_size": dims.shards}
        if original.params.get("model_parallel_size") in (None, dims.shards):
            params = original.params
    write_json(folder / PARAMS, params)
    write_json(folder / "consolidate_params.json", {"model_parallel_size": dims.shards})
    write_checklist(folder)


def _heads(params: dict[str, Any], where: Path, shards: int) -> tuple[int, int]:
    """Numbers of query heads, and of heads for keys and values."""
    model = params["model"]
    heads = integer(where, "model.n_heads", model.get("n_heads"))
    key_value_heads = model.get("n_kv_heads")
    if key_value_heads is None:
        key_value_heads = heads
    integer(where, "model.n_kv_heads", key_value_heads, high=heads)
    if heads % shards or key_value_heads % shards or heads % key_value_heads:
        raise UserError(
            f"{where}: Invalid model.n_heads and model.n_kv_heads (got {heads} and "
            f"{key_value_heads}, expected multiples of the number of shards, {shards}, and the "
            "first a multiple of the second)."
        )
    return heads, key_value_heads


def _tensor(shard: dict[str, Tensor], name: str, where: Path) -> Tensor:
    check_names([name], shard.keys() & {name}, str(where))
    return shard[name]


def _dims_from_params(
    params: dict[str, Any], shards: list[dict[str, Tensor]], where: Path
) -> ModelDims:
    """`params.json` and the tensors of all shards -> sizes.

    Raises UserError for a field that is missing, invalid, or does not fit the tensors.
    """
    model, count, first = params["model"], len(shards), shards[0]
    heads, key_value_heads = _heads(params, where, count)
    layers = {int(match[1]) for name in first if (match := _LAYER.match(name))}
    output = [_tensor(shard, "output.weight", where.parent) for shard in shards]
    gate = _tensor(first, "layers.0.feed_forward.w1.weight", where.parent)
    head_width = _tensor(first, "layers.0.attention.q_normalization.weight", where.parent).numel()
    for name, tensor in (("output.weight", output[0]), ("layers.0.feed_forward.w1.weight", gate)):
        if tensor.ndim != 2:
            raise UserError(
                f"{where.parent}: Wrong shape of {name} (got {tuple(tensor.shape)}, expected two "
                f"dimensions). {_COPY}"
            )
    width = integer(where, "model.dim", model.get("dim"))
    for name, got, expected in (
        ("model.dim", width, output[0].shape[1]),
        ("model.n_layers", integer(where, "model.n_layers", model.get("n_layers")), len(layers)),
        ("model.n_heads times the width of a head", heads * head_width, width),
    ):
        if got != expected:
            raise UserError(
                f"{where}: {name} does not fit the weights (got {got}, expected {expected}). "
                f"{_COPY}"
            )
    return ModelDims(
        width=width,
        layers=len(layers),
        heads=heads,
        key_value_heads=key_value_heads,
        feed_forward=gate.shape[0] * count,
        vocabulary_size=sum(tensor.shape[0] for tensor in output),
        context=integer(where, "model.max_seq_len", model.get("max_seq_len", DEFAULT_CONTEXT)),
        norm_eps=number(where, "model.norm_eps", model.get("norm_eps", ModelDims.norm_eps), high=1),
        rope_theta=number(
            where, "model.rope_theta", model.get("rope_theta", ModelDims.rope_theta), low=1
        ),
        swin_norm=_flag(where, "model.swin_norm", model.get("swin_norm")),
        shards=count,
    )


def _flag(where: Path, name: str, value: Any) -> bool:
    if not isinstance(value, bool | None):
        raise UserError(f"{where}: Invalid {name} (got {shown(value)}, expected true or false).")
    return bool(value)


def _dims_to_params(dims: ModelDims) -> dict[str, Any]:
    """The inverse of `_dims_from_params`: the content of `params.json`."""
    grouped = dims.key_value_heads != dims.heads
    return {
        "model_parallel_size": dims.shards,
        "model": {
            "dim": dims.width,
            "n_layers": dims.layers,
            "n_heads": dims.heads,
            "n_kv_heads": dims.key_value_heads if grouped else None,
            "multiple_of": 256,
            "norm_eps": dims.norm_eps,
            "rope_theta": dims.rope_theta,
            "qk_normalization": True,
            "swin_norm": dims.swin_norm,
            "vocab_size": dims.vocabulary_size,
            "max_seq_len": dims.context,
        },
    }


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a folder `tokenizer/`. Raises UserError for a missing file."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            raise UserError(
                f"{source / name}: File not found. A checkpoint in Chameleon's layout needs "
                f"tokenizer/{{{','.join(TOKENIZER_FILES)}}}."
            )
        shutil.copyfile(source / name, target / name)
    for name in OPTIONAL_TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    write_checklist(target)


def write_checklist(folder: Path) -> None:
    """Writes `checklist.chk`: the MD5 of every file, in the format of md5sum."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != "checklist.chk" and not path.name.startswith("."):
            digest = hashlib.md5(usedforsecurity=False)
            with open(path, "rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
            lines.append(f"{digest.hexdigest()}  {path.name}\n")
    with atomic_file(folder / "checklist.chk") as temporary:
        temporary.write_text("".join(lines))
