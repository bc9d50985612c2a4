"""Chameleon's layout: `models/<size>/*.pth` with its JSON files, and `tokenizer/`."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
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
from medley.utils.files import atomic_file, read_json, write_json
from medley.vqgan.files import check_names, load_tensors

DEFAULT_CONTEXT = 4096  # Chameleon's files do not say it; its loader has this number
TOKENIZER_FILES = ("text_tokenizer.json", "vqgan.yaml", "vqgan.ckpt")
OPTIONAL_TOKENIZER_FILES = ("text_tokenizer_modified.json",)
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")


def is_chameleon(folder: Path) -> bool:
    return (folder / "models").is_dir()


def model_folder(folder: Path, size: str | None = None) -> Path:
    """`models/<size>`; the only one there is, unless named."""
    sizes = sorted(p.name for p in (folder / "models").iterdir() if p.is_dir())
    if size is None and len(sizes) != 1:
        raise UserError(
            f"{folder / 'models'}: holds {', '.join(sizes) or 'no model'}; "
            f"name one as the checkpoint: {folder / 'models' / (sizes or ['<size>'])[0]}"
        )
    chosen = size or sizes[0]
    if chosen not in sizes:
        raise UserError(f"{folder / 'models'}: no model {chosen!r}, there is {', '.join(sizes)}")
    return folder / "models" / chosen


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a decoder as `params.json` gives them, and its width between layers."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    feed_forward: int
    vocabulary: int
    norm_eps: float
    rope_theta: float
    swin_norm: bool
    context: int
    shards: int

    @property
    def split(self) -> HeadLayout:
        return HeadLayout(self.heads, self.key_value_heads, self.shards)


class ChameleonWeights:
    """The decoder's tensors in a `models/<size>` folder, under Hugging Face's names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.params = read_json(folder / "params.json")
        self._files = self._shard_files()

    def _shard_files(self) -> list[Path]:
        single = self.folder / "consolidated.pth"
        numbered = {
            int(match[1]): path
            for path in self.folder.iterdir()
            if (match := _SHARD.fullmatch(path.name))
        }
        declared = self.params.get("model_parallel_size")
        if single.is_file() and numbered:
            raise UserError(
                f"{self.folder}: holds consolidated.pth and {len(numbered)} numbered shards; only "
                "one of the two can be the model: move the other away"
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
                    f"{self.folder}: weights are missing: {names}; copy "
                    "them there, the folder is not whole without them"
                )
        if declared not in (None, len(files)):
            raise UserError(
                f"{self.folder}: params.json says {declared} shards, {len(files)} are there: "
                "copy the missing ones, or move away those of another model"
            )
        return files

    @cached_property
    def _shards(self) -> list[dict[str, Tensor]]:
        shards = [load_tensors(path) for path in self._files]
        model = self.params["model"]
        heads, shard_count = int(model["n_heads"]), len(shards)
        own = HeadLayout(
            heads // shard_count, int(model.get("n_kv_heads") or heads) // shard_count, 1
        )
        return [split_qkv(shard, own) for shard in shards]

    @cached_property
    def sizes(self) -> ModelDims:
        try:
            model = self.params["model"]
            heads = int(model["n_heads"])
            shards = self._shards
            return ModelDims(
                width=int(model["dim"]),
                layers=int(model["n_layers"]),
                heads=heads,
                key_value_heads=int(model.get("n_kv_heads") or heads),
                feed_forward=shards[0]["layers.0.feed_forward.w1.weight"].shape[0] * len(shards),
                vocabulary=sum(shard["output.weight"].shape[0] for shard in shards),
                norm_eps=float(model.get("norm_eps", 1e-5)),
                rope_theta=float(model.get("rope_theta", 10_000.0)),
                swin_norm=bool(model.get("swin_norm", False)),
                context=int(model.get("max_seq_len", DEFAULT_CONTEXT)),
                shards=len(shards),
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self.folder}: {error} is missing in params.json or in the weights"
            ) from error

    @property
    def dtype(self) -> torch.dtype:
        return self._shards[0]["output.weight"].dtype

    @property
    def rope(self) -> Tensor | None:
        """The rotary frequencies that the files carry, if they do."""
        return self._shards[0].get(ROPE)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, as Hugging Face has it. Raises UserError for any it lacks."""
        expected = weight_rules(self.sizes.layers)
        for path, shard in zip(self._files, self._shards, strict=True):
            check_names([e.chameleon for e in expected], set(shard) - {ROPE}, str(path))
        for entry in expected:
            parts = [shard[entry.chameleon] for shard in self._shards]
            yield entry.hugging_face, to_hugging_face(entry, parts, self.sizes.split)


def write_model(
    folder: Path,
    sizes: ModelDims,
    tensors: Callable[[], Iterator[tuple[str, Tensor]]],
    original: ChameleonWeights | None = None,
    norms: Norms = "equal",
) -> None:
    """Writes `models/<size>`: Hugging Face's tensors -> Chameleon's files, one at a time.

    `tensors` is called twice, for the shapes and for the numbers. `original` is the model that this
    one was made from: its `params.json` and rotary frequencies are kept. Without one they are made
    from `sizes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {entry.hugging_face: entry for entry in weight_rules(sizes.layers)}
    shapes = {name: tensor.to("meta") for name, tensor in tensors()}
    check_names(by_name, shapes, str(folder))
    frequencies = original.rope if original is not None else None
    if frequencies is None:
        frequencies = rope_frequencies(sizes.width // sizes.heads, sizes.rope_theta)
    # Shapes alone: whether norms are equal is seen when they are written.
    parts = {
        e.chameleon: to_chameleon(e, shapes[n], sizes.split, "mean") for n, e in by_name.items()
    }
    with ExitStack() as stack:
        files = []
        for number in range(sizes.shards):
            name = "consolidated.pth" if sizes.shards == 1 else f"consolidated.{number:02d}.pth"
            temporary = stack.enter_context(atomic_file(folder / name))
            own = {key: tensors[number] for key, tensors in parts.items()}
            files.append(TorchWriter(temporary, {**own, ROPE: frequencies}))
            stack.callback(files[-1].abandon)
        for name, tensor in tensors():
            entry = by_name[name]
            for file, part in zip(
                files, to_chameleon(entry, tensor, sizes.split, norms), strict=True
            ):
                file.put(entry.chameleon, part)
        for file in files:
            file.put(ROPE, frequencies)
            file.close()
    params = _params(sizes)
    if original is not None:
        params = {**original.params, "model_parallel_size": sizes.shards}
        if original.params.get("model_parallel_size") in (None, sizes.shards):
            params = original.params
    write_json(folder / "params.json", params)
    write_json(folder / "consolidate_params.json", {"model_parallel_size": sizes.shards})
    write_checklist(folder)


def _params(sizes: ModelDims) -> dict[str, Any]:
    grouped = sizes.key_value_heads != sizes.heads
    return {
        "model_parallel_size": sizes.shards,
        "model": {
            "dim": sizes.width,
            "n_layers": sizes.layers,
            "n_heads": sizes.heads,
            "n_kv_heads": sizes.key_value_heads if grouped else None,
            "multiple_of": 256,
            "norm_eps": sizes.norm_eps,
            "rope_theta": sizes.rope_theta,
            "qk_normalization": True,
            "swin_norm": sizes.swin_norm,
            "vocab_size": sizes.vocabulary,
            "max_seq_len": sizes.context,
        },
    }


def copy_tokenizer(source: Path, target: Path) -> None:
    """Carries a `tokenizer/` folder along. Raises UserError for a file that it lacks."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            raise UserError(
                f"{source / name}: no such file; a checkpoint in Chameleon's layout needs "
                f"tokenizer/{{{','.join(TOKENIZER_FILES)}}}"
            )
        shutil.copyfile(source / name, target / name)
    for name in OPTIONAL_TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    write_checklist(target)


def write_checklist(folder: Path) -> None:
    """`checklist.chk`: the MD5 of every file, in md5sum's format."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != "checklist.chk" and not path.name.startswith("."):
            digest = hashlib.md5(usedforsecurity=False)
            with open(path, "rb") as handle:
                while chunk := handle.read(1 << 24):
                    digest.update(chunk)
            lines.append(f"{digest.hexdigest()}  {path.name}\n")
    with atomic_file(folder / "checklist.chk") as temporary:
        temporary.write_text("".join(lines))
