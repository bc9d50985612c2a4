"""Helpers of the training tests: tokens files, command-line flags, logged losses."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medley.checkpoints.checkpoint import Checkpoint, open_checkpoint
from medley.data.token_dataset import write_token_jsonl
from medley.data.vocabulary import Vocabulary
from medley.utils.manifest import write_manifest


@lru_cache(1)
def tiny() -> Checkpoint:
    """The embedded checkpoint, opened once per process."""
    return open_checkpoint("tiny")


@lru_cache(1)
def tiny_vocabulary() -> Vocabulary:
    return tiny().text_tokenizer().vocabulary


def random_document(generator: np.random.Generator, text_tokens: int, task: str) -> dict[str, Any]:
    """A line of a tokens file: an image, some random text, and the reversed text as the answer."""
    vocabulary = tiny_vocabulary()
    codes_per_image = tiny().vqgan()[0].config.codes_per_image
    codes = generator.integers(0, len(vocabulary.image_codes), codes_per_image)
    text = generator.integers(first_text_token(), vocabulary.size, text_tokens).tolist()
    image = vocabulary.image_token_ids(codes.tolist())
    tokens = [vocabulary.bos, *image, *text, vocabulary.end_turn, *text[::-1], vocabulary.eos]
    return {"tokens": tokens, "source": "made", "task": task}


def first_text_token() -> int:
    """The first id of ordinary text; <image> is the last special token."""
    return tiny_vocabulary().image_placeholder + 1


def write_tokens(path: Path, count: int, seed: int = 0) -> Path:
    """A tokens file of `count` random documents of two tasks, with its manifest."""
    generator = np.random.default_rng(seed)
    rows = [random_document(generator, 4 + i % 9, f"task{i % 2}") for i in range(count)]
    write_token_jsonl(path, iter(rows))
    write_manifest(path, {}, [], tiny().fingerprint())
    return path


def train_flags(data: Path, output: Path, *more: object) -> list[str]:
    """Flags of `medley train` for the embedded model; flags in `more` replace the defaults."""
    defaults = {
        "--train_data": data / "train.jsonl", "--ckpt": "tiny", "--output_dir": output,
        "--lr": "2e-3", "--logging_steps": 1, "--lora_r": 4,
    }  # fmt: skip
    kept = [word for flag, value in defaults.items() if flag not in more for word in (flag, value)]
    return [str(word) for word in (*kept, *more)]


def logged_values(output: Path, name: str = "loss") -> list[float]:
    """All values of one name in a run's log, in order."""
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]
