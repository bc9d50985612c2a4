"""Kinds of files of users: an intact example of each, and what reads it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from medley.checkpoints import huggingface
from medley.checkpoints.adapter import load_adapter, merged_tensors
from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_hugging_face
from medley.data.image_token_store import ImageTokenStore, read_failures, write_partition
from medley.data.token_dataset import TokenDataset, write_token_jsonl, write_token_parquet
from medley.data.vocabulary import TextTokenizer
from medley.datasets.base import RecordError
from medley.datasets.readers import records_of
from medley.trainer.checkpoint_safety import check_pickle
from medley.trainer.checkpointing import is_last_step
from medley.trainer.run_record import RunRecord, read_record
from medley.utils.manifest import check_fingerprint, write_manifest
from medley.vqgan.files import open_vqgan

GOLDEN = Path(__file__).resolve().parent / "golden" / "checkpoints"


@dataclass(frozen=True)
class Kind:
    """How a kind of file is made, mutated and read.

    Attributes:
        make: writes an intact example into a folder
        file: the mutated file in that folder
        form: its format (file_mutations.mutations)
        read: reads what is in the folder and returns a value to compare
        free: fields that change the result or have no effect on it, at their end of a path
    """

    make: Callable[[Path], None]
    file: str
    form: str
    read: Callable[[Path], Any]
    exact: bool = True
    free: tuple[str, ...] = ()


# --- checkpoints ------------------------------------------------------------------------------


def _chameleon(layout: str, folder: Path) -> None:
    shutil.copytree(GOLDEN / layout / "input", folder, dirs_exist_ok=True)


def _published(folder: Path) -> None:
    """Hugging Face's layout with one safetensors file, without a folder tokenizer/."""
    checkpoint = open_checkpoint(GOLDEN / "chameleon_7b_layout" / "input")
    write_hugging_face(folder / "hf", checkpoint)
    shutil.rmtree(folder / "hf" / "tokenizer")


def _sharded(folder: Path) -> None:
    huggingface.SHARD_BYTES = 1 << 20
    _published(folder)
    huggingface.SHARD_BYTES = 2 << 30


def _pickled(folder: Path) -> None:
    _published(folder)
    weights = folder / "hf" / "model.safetensors"
    torch.save(load_file(weights), folder / "hf" / "pytorch_model.bin")
    weights.unlink()


def _adapter(folder: Path, name: str = "adapter_model.safetensors") -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=4,
        rank_pattern={"layers.0.self_attn.q_proj": 3},
        trainable_token_indices={"embed_tokens": [5]},
    )  # fmt: skip
    model = peft.get_peft_model(_base().decoder(torch.float32), config)
    model.save_pretrained(folder)
    if not name.endswith(".safetensors"):
        weights = folder / "adapter_model.safetensors"
        torch.save(load_file(weights), folder / name)
        weights.unlink()


def _base() -> Any:
    return open_checkpoint(GOLDEN / "chameleon_7b_layout" / "input")


def _read_checkpoint(folder: Path) -> Any:
    checkpoint = open_checkpoint(folder / "hf" if (folder / "hf").is_dir() else folder)
    checkpoint.check_vocabulary()
    decoder = checkpoint.decoder()
    tokenizer = checkpoint.text_tokenizer()
    checkpoint.image_tokenizer()
    return _digest(decoder.state_dict()), tokenizer.encode("A mass"), checkpoint.fingerprint()


def _read_vqgan(folder: Path) -> Any:
    vqgan, preprocessing, has_decoder = open_vqgan(folder)
    return _digest(vqgan.state_dict()), preprocessing, has_decoder


def _read_tokenizer(folder: Path) -> Any:
    file = next(p for p in (folder / "tokenizer" / "text_tokenizer.json",
                            folder / "hf" / "tokenizer.json") if p.is_file())  # fmt: skip
    tokenizer = TextTokenizer.from_file(file)
    text = "A mass of 12 mm, isn't it?\né"
    ids = tokenizer.encode(text)
    return ids, tokenizer.decode(ids), tokenizer.raw_tokenizer.encode(text).ids


def _read_adapter(folder: Path) -> Any:
    base = _base()
    merged = dict(merged_tensors(base, folder))
    load_adapter(base.decoder(torch.float32), folder)
    return _digest(merged)


def _digest(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- records of runs --------------------------------------------------------------------------


def _run(folder: Path) -> None:
    record = RunRecord(folder, {"lr": 0.1, "base": "x"}, checkpoints=["checkpoint-1"])
    (folder / "checkpoint-1").mkdir()
    record.write()
    record.complete(folder / "checkpoint-1")
    state = {"epoch": 1.0, "global_step": 3, "max_steps": 3, "log_history": [{"loss": 1.0}],
             "stateful_callbacks": {}}  # fmt: skip
    (folder / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(folder, {"a": 1}, [], "0" * 64, fit="crop")
    torch.save({"last_epoch": 3, "_last_lr": [0.1]}, folder / "scheduler.pt")


def _read_run(folder: Path) -> Any:
    record = read_record(folder)
    if record is None:
        return None
    record.own_checkpoints()
    return record.run_id, record.checkpoints


def _read_manifest(folder: Path) -> None:
    check_fingerprint(folder, "0" * 64, "tiny", {"fit": "crop", "exif_orientation": True})


# --- data -------------------------------------------------------------------------------------

_ROWS = [{"tokens": list(range(5 + i, 40 + i)), "task": f"t{i % 3}", "source": "s",
          "untrained_turns": [0]} for i in range(30)]  # fmt: skip


def _tokens(name: str, folder: Path) -> None:
    write = write_token_parquet if name.endswith(".parquet") else write_token_jsonl
    write(folder / name, _ROWS)
    TokenDataset(folder / name)


def _read_tokens(name: str, folder: Path) -> Any:
    dataset = TokenDataset(folder / name)
    rows = range(len(dataset))
    return [(dataset[i].tolist(), dataset.task(i), dataset.untrained_turns(i)) for i in rows]


def _codes(folder: Path) -> None:
    codes = np.arange(40 * 16, dtype=np.uint16).reshape(40, 16)
    write_partition(
        folder / "partition_0_rank_0.parquet", [f"{i}.png" for i in range(40)], codes, []
    )
    ImageTokenStore(folder)


def _read_codes(folder: Path) -> Any:
    read_failures(folder / "partition_0_rank_0.parquet")
    store = ImageTokenStore(folder)
    found = {path: store.get(path) for path in store.paths()}
    return {path: codes.tolist() for path, codes in found.items() if codes is not None}


def _records(name: str, folder: Path) -> None:
    rows = [{"id": str(i), "text": "a" * i, "image": None, "turns": [{"n": i}]} for i in range(30)]
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(rows))
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".csv"):
        pd.DataFrame(rows).to_csv(path, index=False)
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        options = pa.ipc.IpcWriteOptions(compression="zstd" if "zstd" in name else None)
        is_stream = "stream" in name
        new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
        with new(str(path), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=11)


def _read_records(name: str, folder: Path) -> int:
    return sum(1 for *_, record in records_of(folder / name) if not isinstance(record, RecordError))


# Fields that transformers keeps and that no size or weight depends on, or that have any number.
_FREE = (
    "norm_eps", "rope_theta", "max_seq_len", "rms_norm_eps", "max_position_embeddings", "dropout",
    "attn_resolutions", "resolution", "preprocessing", "fit", "swin_norm",
)  # fmt: skip
_7B, _30B = (partial(_chameleon, f"chameleon_{size}_layout") for size in ("7b", "30b"))

KINDS: dict[str, Kind] = {
    "params.json": Kind(_7B, "models/7b/params.json", "json", _read_checkpoint, free=_FREE),
    "params.json of 4 shards": Kind(
        _30B, "models/30b/params.json", "json", _read_checkpoint, free=_FREE
    ),
    "consolidate_params.json": Kind(
        _7B, "models/7b/consolidate_params.json", "json", _read_checkpoint
    ),
    "consolidated.pth": Kind(
        _7B, "models/7b/consolidated.pth", "pickle", _read_checkpoint, exact=False
    ),
    "one of 4 shards": Kind(
        _30B, "models/30b/consolidated.02.pth", "pickle", _read_checkpoint, exact=False
    ),
    "text_tokenizer.json": Kind(
        _7B, "tokenizer/text_tokenizer.json", "json", _read_tokenizer, exact=False
    ),
    "vqgan.yaml": Kind(_7B, "tokenizer/vqgan.yaml", "yaml", _read_vqgan, free=_FREE),
    "vqgan.ckpt": Kind(_7B, "tokenizer/vqgan.ckpt", "pickle", _read_vqgan, exact=False),
    "config.json": Kind(_published, "hf/config.json", "json", _read_checkpoint, free=_FREE),
    "generation_config.json": Kind(
        _published, "hf/generation_config.json", "json", _read_checkpoint
    ),
    "processor_config.json": Kind(_published, "hf/processor_config.json", "json", _read_checkpoint),
    "tokenizer_config.json": Kind(_published, "hf/tokenizer_config.json", "json", _read_checkpoint),
    "tokenizer.json": Kind(_published, "hf/tokenizer.json", "json", _read_tokenizer, exact=False),
    "model.safetensors": Kind(
        _published, "hf/model.safetensors", "safetensors", _read_checkpoint, exact=False
    ),
    "model.safetensors.index.json": Kind(
        _sharded, "hf/model.safetensors.index.json", "json", _read_checkpoint
    ),
    "a safetensors shard": Kind(
        _sharded, "hf/model-00002-of-00006.safetensors", "safetensors", _read_checkpoint,
        exact=False,
    ),
    "pytorch_model.bin": Kind(
        _pickled, "hf/pytorch_model.bin", "pickle", _read_checkpoint, exact=False
    ),
    "adapter_config.json": Kind(
        _adapter, "adapter_config.json", "json", _read_adapter, free=("lora_alpha",)
    ),
    "adapter_model.safetensors": Kind(
        _adapter, "adapter_model.safetensors", "safetensors", _read_adapter, exact=False
    ),
    "adapter_model.bin": Kind(
        partial(_adapter, name="adapter_model.bin"), "adapter_model.bin", "pickle", _read_adapter,
        exact=False,
    ),
    "run.json": Kind(_run, "run.json", "json", _read_run, exact=False),
    "trainer_state.json": Kind(
        _run, "checkpoint-1/trainer_state.json", "json",
        lambda folder: is_last_step(folder / "checkpoint-1"), exact=False,
    ),
    "manifest.json": Kind(_run, "manifest.json", "json", _read_manifest, exact=False),
    "scheduler.pt": Kind(
        _run, "scheduler.pt", "bytes", lambda folder: check_pickle(folder / "scheduler.pt"),
        exact=False,
    ),
    **{
        f"{mutated} of {name}": Kind(
            partial(_tokens, name), mutated.replace("NAME", name), form,
            partial(_read_tokens, name), exact=False,
        )
        for name in ("t.jsonl", "t.parquet")
        for mutated, form in (
            ("NAME", "bytes"), (".NAME.cache.arrow", "bytes"),
            (".NAME.cache.arrow.tasks.json", "json"),
        )
    },
    "image codes": Kind(_codes, "partition_0_rank_0.parquet", "bytes", _read_codes, exact=False),
    "cache of image codes": Kind(_codes, ".codes.arrow", "bytes", _read_codes, exact=False),
    "index of image codes": Kind(_codes, ".codes.npy", "bytes", _read_codes),
    **{
        f"records in {name}": Kind(
            partial(_records, name), name, form, partial(_read_records, name), exact=False
        )
        for name, form in (
            ("r.json", "json"), ("r.jsonl", "bytes"), ("r.csv", "bytes"), ("r.parquet", "bytes"),
            ("r.arrow", "bytes"), ("stream.arrow", "bytes"), ("zstd.arrow", "bytes"),
        )
    },
}  # fmt: skip
