"""Hugging Face's layout: what `ChameleonForConditionalGeneration.from_pretrained` reads.

Beside it `tokenizer/` holds the full VQGAN with its decoder, which the Hugging Face model does
not carry, and the tokenizer file as Chameleon has it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import (
    ChameleonImageProcessorPil,
    ChameleonProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from medley.checkpoints.safetensors_writer import SafetensorsWriter
from medley.data.vocabulary import (
    BOS,
    END_TURN,
    EOS,
    IMAGE,
    IMAGE_IN_UNMODIFIED_FILE,
    PAD,
    UNK,
)
from medley.errors import UserError
from medley.utils.files import read_json, write_json
from medley.vqgan.files import check_weights_file, load_tensors

SHARD_BYTES = 2 << 30
_INDEX = {
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}

# Turns with the end-of-turn mark between them, `<s>` before and `</s>` after: the same ids as
# `Document.to_ids`. A system text joins the first user turn, other roles are refused.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set state = namespace(system='', turns=0) %}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set content = message['content'] %}"
    "{% else %}{% set pieces = namespace(text='') %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set pieces.text = pieces.text + '" + IMAGE + "' %}"
    "{% else %}{% set pieces.text = pieces.text + part['text'] %}{% endif %}{% endfor %}"
    "{% set content = pieces.text %}{% endif %}"
    "{% if message['role'] == 'system' and loop.first %}"
    "{% set state.system = content + '\n' %}"
    "{% elif message['role'] == ('user' if state.turns % 2 == 0 else 'assistant') %}"
    "{% if state.turns > 0 %}" + END_TURN + "{% endif %}"
    "{{ state.system + content }}{% set state.system = '' %}"
    "{% set state.turns = state.turns + 1 %}"
    "{% else %}{{ raise_exception('role ' + message['role'] + ' is not expected here: user and "
    "assistant alternate, user first') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + END_TURN + "{% else %}{{ eos_token }}{% endif %}"
)


def is_hugging_face(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def read_config(folder: Path) -> transformers.ChameleonConfig:
    fields = read_json(folder / "config.json")
    if fields.get("model_type") != "chameleon":
        raise UserError(
            f"{folder / 'config.json'}: model_type is {fields.get('model_type')!r}; only "
            "Chameleon models (Chameleon, Anole, MedMax) can be loaded"
        )
    config: transformers.ChameleonConfig = transformers.ChameleonConfig.from_dict(fields)
    return config


class HuggingFaceWeights:
    """All tensors of a Hugging Face folder, safetensors or older bins, under their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where = self._find()

    def _find(self) -> dict[str, Path]:
        for single, index in _INDEX.items():
            if (self.folder / index).is_file():
                table = read_json(self.folder / index)["weight_map"]
                missing = sorted({f for f in table.values() if not (self.folder / f).is_file()})
                if missing:
                    raise UserError(
                        f"{self.folder}: weights are missing: {', '.join(missing)} ({index} "
                        "names them); copy them there"
                    )
                pattern = f"{Path(single).stem}-*-of-*{Path(single).suffix}"
                surplus = {p.name for p in self.folder.glob(pattern)} - set(table.values())
                if surplus:
                    raise UserError(
                        f"{self.folder}: {', '.join(sorted(surplus))}: not named by {index}; "
                        "shards of two checkpoints are mixed here: move the surplus ones away, or "
                        "copy the index that belongs to them"
                    )
                return {name: self.folder / file for name, file in table.items()}
            if (self.folder / single).is_file():
                path = self.folder / single
                return dict.fromkeys(_names_in(path), path)
        raise UserError(
            f"{self.folder}: no weights; expected model.safetensors, its index with shards, or "
            "pytorch_model.bin"
        )

    def names(self) -> list[str]:
        return list(self._where)

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Tensors file by file, mapped rather than read into memory."""
        wanted = set(self._where if names is None else names)
        by_file: dict[Path, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self._where[name], []).append(name)
        for path, own in sorted(by_file.items()):
            if path.suffix == ".safetensors":
                with _opened(path) as opened:
                    for name in sorted(own):
                        yield name, opened.get_tensor(name)
            else:
                state = load_tensors(path)
                for name in sorted(own):
                    yield name, state[name]

    def get(self, name: str) -> Tensor:
        return next(self.tensors([name]))[1]


def other_files(folder: Path) -> list[Path]:
    """What a folder holds beside its weights: configuration, tokenizer, licence and the like."""
    weights = ("*.safetensors", "*.bin", "*.index.json", "manifest.json", ".*")
    return [p for p in sorted(folder.iterdir()) if not any(p.match(w) for w in weights)]


def _names_in(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(load_tensors(path))
    with _opened(path) as opened:
        return list(opened.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_weights_file(path)
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise UserError(f"{path}: broken or cut off ({error})") from error


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes safetensors shards of about SHARD_BYTES, with an index where there are several.

    One tensor at a time is in memory.
    """
    files: list[SafetensorsWriter] = []
    try:
        for name, tensor in tensors:
            full = files and files[-1].size and files[-1].size + tensor.nbytes > SHARD_BYTES
            if not files or full or not files[-1].has_room_for(name):
                if files:
                    files[-1].close()
                files.append(SafetensorsWriter(folder / f"part-{len(files)}.safetensors"))
            files[-1].add(name, tensor)
        files[-1].close()
    finally:
        for file in files:
            file.abandon()
    if len(files) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    table = {}
    for number, file in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / final)
        table.update(dict.fromkeys(file.names, final))
    index = {"metadata": {"total_size": sum(f.size for f in files)}, "weight_map": table}
    write_json(folder / "model.safetensors.index.json", index)


def write_config(folder: Path, config: transformers.ChameleonConfig, dtype: torch.dtype) -> None:
    config = copy.deepcopy(config)
    config.architectures = ["ChameleonForConditionalGeneration"]
    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
    ).save_pretrained(folder)


def write_processor(folder: Path, text_tokenizer: Any, codes_per_image: int, size: int) -> None:
    """Tokenizer, processor and chat template, from the content of `text_tokenizer.json`.

    The processor's defaults are mended: the placeholder is named `<image>` (the unmodified file has
    another), `<s>` opens every text, and pixels are scaled by 1 / 127.5 and not 0.0078.
    """
    renamed = json.loads(json.dumps(text_tokenizer).replace(IMAGE_IN_UNMODIFIED_FILE, IMAGE))
    tokenizer = Tokenizer.from_str(json.dumps(renamed))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        sep_token=END_TURN,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )
    fast.chat_template = CHAT_TEMPLATE
    images = ChameleonImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        rescale_factor=1 / 127.5,
    )
    processor = ChameleonProcessor(images, fast, image_seq_length=codes_per_image)
    processor.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(folder)
