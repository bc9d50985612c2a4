"""Files of tokens to train on, and how training is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from medley.checkpoints.checkpoint import open_checkpoint
from medley.data.token_dataset import write_jsonl
from medley.utils.manifest import write_manifest

TINY = open_checkpoint("tiny")
MARKS = TINY.text_tokenizer().vocabulary
CODES = TINY.image_tokenizer().codes_per_image


def document(generator: np.random.Generator, words: int, task: str) -> dict[str, Any]:
    codes = generator.integers(0, len(MARKS.image_codes), CODES)
    text = generator.integers(MARKS.image + 1, MARKS.size, words).tolist()
    picture = MARKS.image_token_ids(codes.tolist())
    tokens = [MARKS.bos, *picture, *text, MARKS.end_turn, *text[::-1], MARKS.eos]
    return {"tokens": tokens, "source": "made", "task": task}


def write_tokens(path: Path, count: int, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    rows = [document(generator, 4 + i % 9, f"task{i % 2}") for i in range(count)]
    write_jsonl(path, iter(rows))
    write_manifest(path, {}, [], TINY.fingerprint())
    return path


def words(data: Path, output: Path, *more: object) -> list[str]:
    found = ["--train_data", data / "train.jsonl", "--ckpt", "tiny", "--output_dir", output]
    found += ["--lr", "2e-3", "--logging_steps", 1, "--lora_r", 4, *more]
    return [str(word) for word in found]


def losses(output: Path, name: str = "loss") -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]
