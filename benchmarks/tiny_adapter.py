"""LoRA on a modality that `tiny` has not seen, beside transformers' Trainer with PEFT.

    python benchmarks/tiny_adapter.py

All learn from the same documents about ultrasound phantoms (and some of the known modalities, so
that those are not forgotten), for as many passes: ours, the Trainer as it comes, and the Trainer
with batches of like lengths. Questions about held-out phantoms are then asked through `medley
answer`; our adapter is asked as an adapter and merged. Ends with one JSON line.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
from tiny_skill import question_scores, read_lines, run, write_lines, write_questions
from trainer_baseline import Sampling, train_baseline

from medley.checkpoints import tiny_folder
from medley.options import run_program
from medley.phantoms import MODALITIES, NEW_MODALITY, Phantom
from medley.token_shards import TokenShards

SEED = 30_000_000
SIDES = {"new": (NEW_MODALITY,), "known": MODALITIES}


@dataclass(frozen=True)
class Options:
    """Measures how an adapter learns a new modality.

    Args:
        scans: ultrasound phantoms to learn from
        known: phantoms of known modalities beside them
        test: phantoms of each side that are asked about
        questions: of each of those
        epochs: passes over the documents
        batch: documents of a step
        lr: learning rate
        rank: rank of the adapters
        baselines: also train with transformers' Trainer and PEFT
        keep: folder to keep all files in
    """

    scans: int = 2000
    known: int = 800
    test: int = 200
    questions: int = 10
    epochs: int = 1
    batch: int = 8
    lr: float = 3e-3
    rank: int = 32
    baselines: bool = True
    keep: Path | None = None


def draw(folder: Path, options: Options) -> list[Path]:
    """Questions with answers about both kinds, as two files of tokens."""
    files = []
    for name, count in (("new", options.scans), ("known", options.known)):
        drawn, codes, tokens = folder / name, folder / f"{name}-codes", folder / f"{name}.jsonl"
        run("conversion.draw_phantoms", "--output", drawn, "--modality", ",".join(SIDES[name]),
            "--train", count, "--test", 1, "--seed", SEED)  # fmt: skip
        run("tokenizer.image_tokenization", "--input", drawn / "pictures.csv",
            "--output", codes, "--ckpt", "tiny")  # fmt: skip
        asked = [row for row in read_lines(drawn / "train.jsonl") if row["task"] == "VQA"]
        run("tokenizer.tokenize_jsonl",
            "--input_file", write_lines(drawn / "asked.jsonl", asked),
            "--image_codes", codes, "--output_file", tokens,
            "--tokenizer_file", tiny_folder() / "tokenizer" / "text_tokenizer.json")  # fmt: skip
        files.append(tokens)
    return files


def draw_tests(folder: Path, options: Options) -> None:
    rng = np.random.default_rng(SEED + 1)
    for side, modalities in SIDES.items():
        own = folder / f"test-{side}"
        (own / "pictures").mkdir(parents=True)
        scans = [Phantom.random(rng, modalities) for _ in range(options.test)]
        for number, scan in enumerate(scans):
            scan.image(64).save(own / "pictures" / f"{number}.png")
        write_questions(own, scans, options.questions)


def train_ours(tokens: list[Path], output: Path, options: Options) -> float:
    """Seconds of the training alone, as the baseline's are counted."""
    lengths = np.concatenate([TokenShards(file).lengths for file in tokens])
    # Four rows of about a quarter of the baseline's batch each.
    row = max(int(lengths.sum() / (len(lengths) / options.batch) / 4) + 1, int(lengths.max()))
    run("training.train", "--train_data", *tokens, "--ckpt", "tiny", "--output_dir", output,
        "--pack", "--max_length", row, "--bs", 4, "--epoch", options.epochs, "--lr", options.lr,
        "--lora_r", options.rank, "--lora_alpha", 2 * options.rank, "--lora_dropout", 0,
        "--save_strategy", "no")  # fmt: skip
    state = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return float(next(entry["train_runtime"] for entry in state if "train_runtime" in entry))


def scores(
    folder: Path, name: str, ckpt: str = "tiny", adapter: Path | None = None
) -> dict[str, float]:
    """Closed and open questions of each side; of those asked of no adapter, too, what always
    saying the commonest answer gives."""
    kinds = ["closed", "open"]
    if name == "before":
        kinds += ["closed_majority", "open_majority"]
    found = {}
    for side in SIDES:
        own = question_scores(folder / f"test-{side}", ckpt, name, adapter)
        found |= {f"{name}_{side}_{kind}": own[kind] for kind in kinds}
    return found


def work(options: Options) -> None:
    result: dict[str, Any] = {"benchmark": "tiny_adapter"}
    with TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        tokens = draw(folder, options)
        draw_tests(folder, options)
        result["documents"] = sum(len(TokenShards(file)) for file in tokens)
        result["ours_seconds"] = train_ours(tokens, folder / "ours", options)
        run("conversion.merge_lora", "--ckpt_path", folder / "ours", "--base_path", "tiny",
            "--output_dir", folder / "merged")  # fmt: skip
        result |= scores(folder, "before")
        result |= scores(folder, "ours", adapter=folder / "ours")
        result |= scores(folder, "merged", str(folder / "merged"))
        documents = [ids for file in tokens for ids in TokenShards(file)]
        for sampling in get_args(Sampling) if options.baselines else ():
            result[f"{sampling}_seconds"] = train_baseline(
                documents, folder / sampling, options.batch, options.lr,
                options.rank, 2 * options.rank, options.epochs, sampling,
            )  # fmt: skip
            result |= scores(folder, sampling, adapter=folder / sampling)
    result["machine"] = platform.machine()
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks/tiny_adapter.py", Options, work))
