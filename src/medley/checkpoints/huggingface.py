"""Hugging Face's layout, which `ChameleonForConditionalGeneration.from_pretrained` reads.

Hugging Face's model contains only the encoder of the VQGAN. The additional folder `tokenizer/`
contains the full VQGAN and Chameleon's tokenizer file.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
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
from medley.modeling.dims import ARCHITECTURE
from medley.utils.config_files import number, shown
from medley.utils.files import write_json
from medley.utils.tensor_files import check_names

CONFIG = "config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARD_BYTES = 2 << 30
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_NOT_COPIED = ("*.safetensors", "*.bin", "*.index.json", "manifest.json", ".*")

# Gives the same ids as `Document.to_ids`: `<s>`, the turns with the end-of-turn token between them,
# `</s>`. A system message is prepended to the first user turn. Other roles raise an error.
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
    "{% if state.turns > 0 %}" + END_TURN + "{% endif %}"  # alias
    "{{ state.system + content }}{% set state.system = '' %}"
    "{% set state.turns = state.turns + 1 %}"  # alias
    "{% else %}{{ raise_exception('role ' + message['role'] + ' is not expected here: user and "
    "assistant alternate, user first') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + END_TURN + "{% else %}{{ eos_token }}{% endif %}"
)


def is_hugging_face(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def check_sizes(
    where: Path, config: transformers.ChameleonConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError for sizes in `config.json` that are not those of the weights.

    A model of false sizes may take hours to build, or all memory.
    """
    layer = "model.layers.0."
    gate = f"{layer}mlp.gate_proj.weight"
    queries, keys = (f"{layer}self_attn.{name}.weight" for name in ("q_norm", "k_norm"))
    needed = {EMBEDDING, gate, queries, keys}
    check_names(needed, shapes.keys() & needed, str(where.parent))
    layers = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    for name, expected in (
        ("num_hidden_layers", len(layers)),
        ("vocab_size", shapes[EMBEDDING][0] if shapes[EMBEDDING] else 0),
        ("hidden_size", shapes[EMBEDDING][-1] if shapes[EMBEDDING] else 0),
        ("intermediate_size", shapes[gate][0] if shapes[gate] else 0),
        ("num_attention_heads", shapes[queries][0] if shapes[queries] else 0),
        ("num_key_value_heads", shapes[keys][0] if shapes[keys] else 0),
    ):
        if getattr(config, name) != expected:
            raise UserError(
                f"{where}: {name} does not fit the weights (got {shown(getattr(config, name))}, "
                f"expected {expected}). Copy all files of the checkpoint again."
            )
    theta = (config.rope_parameters or {}).get("rope_theta")
    number(where, "rope_parameters.rope_theta", theta, low=1)


def other_files(folder: Path) -> list[Path]:
    """All files of a model except its weights: configuration, tokenizer, license and so on."""
    return [p for p in sorted(folder.iterdir()) if not any(p.match(n) for n in _NOT_COPIED)]


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes safetensors shards of about SHARD_BYTES, with an index if there are several.

    At most one tensor is in memory.
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
    for part, file in enumerate(files):
        final = f"model-{part + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{part}.safetensors").rename(folder / final)
        table.update(dict.fromkeys(file.names, final))
    index = {"metadata": {"total_size": sum(f.size for f in files)}, "weight_map": table}
    write_json(folder / "model.safetensors.index.json", index)


def write_config(folder: Path, config: transformers.ChameleonConfig, dtype: torch.dtype) -> None:
    config = copy.deepcopy(config)
    config.architectures = [ARCHITECTURE]
    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
    ).save_pretrained(folder)


def write_processor(folder: Path, text_tokenizer: Any, codes_per_image: int, size: int) -> None:
    """Writes tokenizer, processor and chat template from the content of `text_tokenizer.json`.

    Three settings differ from the defaults: the image placeholder is `<image>` (the unmodified
    file has another name), `<s>` starts every text, and pixels are scaled by 1 / 127.5 instead of
    0.0078.
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
    image_processor = ChameleonImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        rescale_factor=1 / 127.5,
    )
    processor = ChameleonProcessor(image_processor, fast, image_seq_length=codes_per_image)
    processor.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(folder)
