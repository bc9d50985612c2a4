"""LoRA on a modality that `tiny` has not seen, beside transformers' Trainer with PEFT.

    python benchmarks/tiny_adapter.py

All learn from the same documents about MR-CT phantoms (and some of the known modalities, so
that those are not forgotten), for as many passes: ours, the Trainer as it comes, and the Trainer
with batches of like lengths. Questions about held-out phantoms are then asked through `medley
answer`; our adapter is asked as an adapter and merged. Ends with one JSON line.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from phantom_questions import (
    Model,
    Result,
    question_majorities,
    question_scores,
    read_lines,
    run,
    work_folder,
    write_lines,
    write_questions,
)
from trainer_baseline import Sampling, train_baseline

from medley.checkpoints.checkpoint import tiny_folder
from medley.data.token_dataset import TokenDataset
from medley.phantoms import MODALITIES, NEW_MODALITY, Phantom
from medley.utils.cli_options import run_program

SEED = 50_000_000  # not what settings were chosen with
GROUPS = {"new": (NEW_MODALITY,), "known": MODALITIES}


@dataclass(frozen=True)
class Options:
    """Measures how an adapter learns a new modality.

    Args:
        scans: phantoms to learn from
        known_share: share of them that are of the known modalities
        test: phantoms of either side that are asked about
        questions: of each of those
        epochs: passes over the documents
        batch: documents of a step
        lr: learning rate
        rank: rank of the adapters
        bf16: all compute in bfloat16 (autocast), as the field's recipes do; else in float32
        baselines: also train with transformers' Trainer and PEFT
        keep: empty folder to keep all files in
        seed: seed of the phantoms
    """

    scans: int = 2600
    known_share: float = 0.5
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


def draw(folder: Path, options: Options) -> Path:
    """Questions with answers, as a file of tokens."""
    drawn, codes, tokens = folder / "data", folder / "codes", folder / "train.tokens.jsonl"
    run("conversion.draw_phantoms", "--output", drawn, "--modality", NEW_MODALITY, "--known_share",
        options.known_share, "--train", options.scans, "--test", 0, "--seed",
        options.seed)  # fmt: skip
    run("tokenizer.image_tokenization", "--input", drawn / "pictures.csv", "--output", codes,
        "--ckpt", "tiny")  # fmt: skip
    asked = [row for row in read_lines(drawn / "train.jsonl") if row["task"] == "VQA"]
    run("tokenizer.tokenize_jsonl", "--input_file", write_lines(folder / "asked.jsonl", asked),
        "--image_codes", codes, "--output_file", tokens,
        "--tokenizer_file", tiny_folder() / "tokenizer" / "text_tokenizer.json")  # fmt: skip
    return tokens


def train_ours(tokens: Path, output: Path, options: Options) -> dict[str, float]:
    """Seconds of the training alone, and its steps, as the baseline's are counted."""
    lengths = TokenDataset(tokens).lengths
    # One packed row of as many tokens as the baseline's batch has on average.
    row = max(int(lengths.mean() * options.batch) + 1, int(lengths.max()))
    run("training.train", "--train_data", tokens, "--ckpt", "tiny", "--output_dir", output,
        "--pack", "--max_length", row, "--bs", 1, "--epoch", options.epochs, "--lr", options.lr,
        "--lora_r", options.rank, "--lora_alpha", 2 * options.rank, "--lora_dropout", 0,
        "--save_strategy", "no", *(("--bf16",) if options.bf16 else ()))  # fmt: skip
    state = json.loads((output / "trainer_state.json").read_text())
    seconds = next(e["train_runtime"] for e in state["log_history"] if "train_runtime" in e)
    return {"seconds": seconds, "steps": state["global_step"]}


def scores(folder: Path, model: Model) -> dict[str, float]:
    """Closed and open questions of each side."""
    found: dict[str, float] = {}
    for side in GROUPS:
        own = question_scores(folder / f"test-{side}", model)
        found |= {f"{model.name}_{side}_{kind}": own[kind] for kind in ("closed", "open")}
    return found


def work(options: Options) -> None:
    result = Result({"benchmark": "tiny_adapter"})
    with work_folder(options.keep) as folder:
        tokens = draw(folder, options)
        rng = np.random.default_rng(options.seed + 1)
        for side, modalities in GROUPS.items():
            scans = [Phantom.random(rng, modalities) for _ in range(options.test)]
            own = folder / f"test-{side}"
            write_questions(own, scans, options.questions, options.seed + 2)
            result.keep({f"{side}_{key}": value for key, value in question_majorities(own).items()})
        documents = list(TokenDataset(tokens))
        result.keep(
            {"bf16": options.bf16, "documents": len(documents), "tokens": sum(map(len, documents))}
        )
        result.keep(scores(folder, Model("before")))
        result.keep(
            {f"ours_{k}": v for k, v in train_ours(tokens, folder / "ours", options).items()}
        )
        run("conversion.merge_lora", "--ckpt_path", folder / "ours", "--base_path", "tiny",
            "--output_dir", folder / "merged")  # fmt: skip
        result.keep(scores(folder, Model("ours", adapter=folder / "ours")))
        result.keep(scores(folder, Model("merged", str(folder / "merged"))))
        for sampling in get_args(Sampling) if options.baselines else ():
            took = train_baseline(
                documents, folder / sampling, options.batch, options.lr,
                options.rank, 2 * options.rank, options.epochs, sampling,
                options.bf16,
            )  # fmt: skip
            result.keep({f"{sampling}_{key}": value for key, value in took.items()})
            result.keep(scores(folder, Model(sampling, adapter=folder / sampling)))
    result.end()


if __name__ == "__main__":
    sys.exit(run_program("benchmarks/tiny_adapter.py", Options, work))
