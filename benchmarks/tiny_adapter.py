"""LoRA on a modality that `tiny` has not seen, beside transformers' Trainer with PEFT.

    python benchmarks/tiny_adapter.py

Both learn from the same documents about ultrasound phantoms (and a few of the known modalities, so
that those are not forgotten), for as many passes; closed questions about held-out phantoms are then
asked through `medley answer`. Our adapter is asked as an adapter and merged. Ends with one JSON
line.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tiny_skill import ask, run, write_questions
from trainer_baseline import train_baseline

from medley.checkpoints import tiny_folder
from medley.options import run_program
from medley.phantoms import MODALITIES, NEW_MODALITY, Phantom
from medley.token_shards import TokenShards

SEED = 30_000_000


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
    """

    scans: int = 700
    known: int = 200
    test: int = 200
    questions: int = 10
    epochs: int = 2
    batch: int = 16
    lr: float = 2e-3
    rank: int = 16


def draw(folder: Path, options: Options) -> Path:
    """Documents of both kinds as one file of tokens."""
    files = []
    for name, modality, count in (("new", NEW_MODALITY, options.scans),
                                  ("known", ",".join(MODALITIES), options.known)):  # fmt: skip
        run("conversion.draw_phantoms", "--output", folder / name, "--modality", modality,
            "--train", count, "--test", 1, "--seed", SEED)  # fmt: skip
        run("tokenizer.image_tokenization", "--input", folder / name / "pictures.csv",
            "--output", folder / f"{name}-codes", "--ckpt", "tiny")  # fmt: skip
        run("tokenizer.tokenize_jsonl", "--input_file", folder / name / "train.jsonl",
            "--image_codes", folder / f"{name}-codes", "--output_file", folder / f"{name}.jsonl",
            "--tokenizer_file", tiny_folder() / "tokenizer" / "text_tokenizer.json")  # fmt: skip
        files.append(folder / f"{name}.jsonl")
    whole = folder / "train.jsonl"
    whole.write_text("".join(file.read_text() for file in files))
    manifest = (folder / "new.jsonl.manifest.json").read_text()
    (folder / "train.jsonl.manifest.json").write_text(manifest)
    return whole


def closed(folder: Path, name: str, ckpt: str, adapter: Path | None = None) -> float:
    scores: dict[str, Any] = ask(ckpt, folder, name, adapter)
    return float(scores["all"]["closed accuracy"]["percent"])


def train_ours(tokens: Path, output: Path, options: Options) -> float:
    """Seconds of the training alone, as the baseline's are counted."""
    lengths = TokenShards(tokens).lengths
    # Four rows of about a quarter of the baseline's batch each.
    row = max(int(lengths.sum() / (len(lengths) / options.batch) / 4) + 1, int(lengths.max()))
    run("training.train", "--train_data", tokens, "--ckpt", "tiny", "--output_dir", output,
        "--pack", "--max_length", row, "--bs", 4, "--epoch", options.epochs, "--lr", options.lr,
        "--lora_r", options.rank, "--lora_alpha", 2 * options.rank, "--lora_dropout", 0,
        "--save_strategy", "no")  # fmt: skip
    state = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return float(next(entry["train_runtime"] for entry in state if "train_runtime" in entry))


def work(options: Options) -> None:
    result: dict[str, Any] = {"benchmark": "tiny_adapter"}
    rng = np.random.default_rng(SEED + 1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokens = draw(folder, options)
        sides = {"new": (NEW_MODALITY,), "known": MODALITIES}
        for side, modalities in sides.items():
            own = folder / f"test-{side}"
            (own / "pictures").mkdir(parents=True)
            scans = [Phantom.random(rng, modalities) for _ in range(options.test)]
            for number, scan in enumerate(scans):
                scan.image(64).save(own / "pictures" / f"{number}.png")
            write_questions(own, scans, options.questions)
        result["ours_seconds"] = train_ours(tokens, folder / "ours", options)
        result["baseline_seconds"] = train_baseline(
            list(TokenShards(tokens)), folder / "baseline", options.batch, options.lr,
            options.rank, 2 * options.rank, options.epochs,
        )  # fmt: skip
        run("conversion.merge_lora", "--ckpt_path", folder / "ours", "--base_path", "tiny",
            "--output_dir", folder / "merged")  # fmt: skip
        for side in sides:
            own = folder / f"test-{side}"
            result[f"before_{side}"] = closed(own, "before", "tiny")
            result[f"ours_{side}"] = closed(own, "ours", "tiny", folder / "ours")
            result[f"merged_{side}"] = closed(own, "merged", str(folder / "merged"))
            result[f"baseline_{side}"] = closed(own, "baseline", "tiny", folder / "baseline")
    result["machine"] = platform.machine()
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks/tiny_adapter.py", Options, work))
