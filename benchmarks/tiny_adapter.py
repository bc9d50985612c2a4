"""LoRA on a modality that `tiny` was not trained on, compared with transformers' Trainer and PEFT.

    python benchmarks/tiny_adapter.py

All variants train on the same documents about phantoms of MR-CT, and of the known modalities to
limit forgetting, for the same number of epochs: Medley, the Trainer with default sampling, and the
Trainer with batches of similar lengths. `medley answer` then answers questions about held-out
phantoms, with Medley's adapter both loaded and merged. Ends with one JSON line.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np
from phantom_questions import (
    Model,
    Result,
    question_majorities,
    question_scores,
    read_rows,
    run,
    work_folder,
    write_questions,
)
from trainer_baseline import Sampling, train_baseline

from medley.data.token_dataset import TokenDataset
from medley.phantoms import MODALITIES, NEW_MODALITY, Phantom
from medley.tiny.embedded import tiny_folder
from medley.utils.cli_options import Alias, run_program
from medley.utils.jsonl import write_jsonl

SEED = 50_000_000  # differs from the seeds used for choosing settings
GROUPS = {"new": (NEW_MODALITY,), "known": MODALITIES}


@dataclass(frozen=True)
class Options:
    """Measures how well an adapter learns a new modality.

    Args:
        scans: phantoms to train on
        known_fraction: fraction of them with the known modalities
        test: held-out phantoms of the new and of the known modalities, each
        questions: questions per held-out phantom
        epochs: epochs of training
        batch: documents per step
        lr: learning rate
        rank: rank of the adapters
        bf16: compute in bfloat16 (autocast) in all variants; else in float32
        baselines: also train with transformers' Trainer and PEFT
        keep: empty folder to keep all files in
        seed: seed of the phantoms
    """

    aliases: ClassVar = {"known_share": Alias("known_fraction")}
    scans: int = 2600
    known_fraction: float = 0.5
    test: int = 100
    questions: int = 10
    epochs: int = 1
    batch: int = 8
    lr: float = 3e-3
    rank: int = 32
    bf16: bool = True
    baselines: bool = True
    keep: Path | None = None
    seed: int = SEED


def make_tokens(folder: Path, options: Options) -> Path:
    """Questions with answers about new phantoms, as a file of token sequences."""
    data, codes, tokens = folder / "data", folder / "codes", folder / "train.tokens.jsonl"
    run("medley", "draw-phantoms", "--output", data, "--modality", NEW_MODALITY,
        "--known_fraction", options.known_fraction, "--train", options.scans, "--test", 0,
        "--seed", options.seed)  # fmt: skip
    run("medley", "tokenize-images", "--input", data / "images.csv", "--output", codes,
        "--ckpt", "tiny")  # fmt: skip
    rows = [row for row in read_rows(data / "train.jsonl") if row["task"] == "VQA"]
    write_jsonl(folder / "vqa.jsonl", rows)
    run("medley", "tokenize", "--input_file", folder / "vqa.jsonl", "--image_codes", codes,
        "--output_file", tokens,
        "--tokenizer_file", tiny_folder() / "tokenizer" / "text_tokenizer.json")  # fmt: skip
    return tokens


def train_ours(tokens: Path, output: Path, options: Options) -> dict[str, float]:
    """Trains with Medley; seconds of the training alone, and its steps, as for the baselines."""
    lengths = TokenDataset(tokens).lengths
    # One packed sequence per step, with the average number of tokens of the baseline's batches.
    length = max(int(lengths.mean() * options.batch) + 1, int(lengths.max()))
    run("medley", "train", "--train_data", tokens, "--ckpt", "tiny", "--output_dir", output,
        "--pack", "--max_length", length, "--bs", 1, "--epoch", options.epochs, "--lr", options.lr,
        "--lora_r", options.rank, "--lora_alpha", 2 * options.rank, "--lora_dropout", 0,
        "--save_strategy", "no", *(("--bf16",) if options.bf16 else ()))  # fmt: skip
    state = json.loads((output / "trainer_state.json").read_text())
    seconds = next(e["train_runtime"] for e in state["log_history"] if "train_runtime" in e)
    return {"seconds": seconds, "steps": state["global_step"]}


def scores(folder: Path, model: Model) -> dict[str, float]:
    """Scores of the closed and open questions about new and known modalities."""
    result: dict[str, float] = {}
    for group in GROUPS:
        own = question_scores(folder / f"test-{group}", model)
        result |= {f"{model.name}_{group}_{kind}": own[kind] for kind in ("closed", "open")}
    return result


def work(options: Options) -> None:
    result = Result({"benchmark": "tiny_adapter"})
    with work_folder(options.keep) as folder:
        tokens = make_tokens(folder, options)
        rng = np.random.default_rng(options.seed + 1)
        for group, modalities in GROUPS.items():
            scans = [Phantom.random(rng, modalities) for _ in range(options.test)]
            test = folder / f"test-{group}"
            write_questions(test, scans, options.questions, options.seed + 2)
            result.add({f"{group}_{key}": v for key, v in question_majorities(test).items()})
        documents = list(TokenDataset(tokens))
        result.add(
            {"bf16": options.bf16, "documents": len(documents), "tokens": sum(map(len, documents))}
        )
        result.add(scores(folder, Model("before")))
        timing = train_ours(tokens, folder / "ours", options)
        result.add({f"ours_{key}": value for key, value in timing.items()})
        run("medley", "merge", "--ckpt_path", folder / "ours", "--base_path", "tiny",
            "--output_dir", folder / "merged")  # fmt: skip
        result.add(scores(folder, Model("ours", adapter=folder / "ours")))
        result.add(scores(folder, Model("merged", str(folder / "merged"))))
        for sampling in get_args(Sampling) if options.baselines else ():
            timing = train_baseline(
                documents, folder / sampling, options.batch, options.lr,
                options.rank, 2 * options.rank, options.epochs, sampling,
                options.bf16,
            )  # fmt: skip
            result.add({f"{sampling}_{key}": value for key, value in timing.items()})
            result.add(scores(folder, Model(sampling, adapter=folder / sampling)))
    result.print()


if __name__ == "__main__":
    sys.exit(run_program("benchmarks/tiny_adapter.py", Options, work))
