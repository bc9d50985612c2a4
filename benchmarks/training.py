"""Training: tokens per second compared with transformers' Trainer, and memory of the loss.

    python benchmarks/training.py

LoRA on `tiny`, with documents of MedMax's range of lengths (answers of 10 to 300 words, 0 to 3
images). Baseline: transformers' Trainer with PEFT, batches of 8 documents padded on the right, and
the usual loss over all logits. Both train on the same documents in the same number of steps, so the
losses on held-out documents must agree. Then measures the loss alone, for any width and vocabulary.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from trainer_baseline import train_baseline

from medley.checkpoints.checkpoint import open_checkpoint
from medley.data.packing import IGNORE_INDEX, build_labels, build_sequence, collate
from medley.data.token_dataset import TokenDataset, write_token_jsonl
from medley.phantoms import Phantom, caption
from medley.utils.cli_options import run_program
from medley.utils.manifest import write_manifest

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Options:
    """Measures training.

    Args:
        documents: training documents; the number of steps is that of batches of 8
        length: positions of the loss measurement
        width: hidden size of the loss measurement
        vocabulary: vocabulary size of the loss measurement
        rounds: runs of each variant; the fastest counts
    """

    documents: int = 320
    length: int = 4096
    width: int = 1024
    vocabulary: int = 65536
    rounds: int = 2


def main(argv: list[str] | None = None) -> int:
    return run_program("benchmarks/training.py", Options, work, argv)


def work(options: Options) -> None:
    result: dict[str, Any] = {"benchmark": "training"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(folder / "train.jsonl", options.documents, 0)
        write_documents(folder / "val.jsonl", 64, 1)
        held_out = list(TokenDataset(folder / "val.jsonl"))
        for kind, run in (("baseline", run_baseline), ("ours", run_ours)):
            runs = [run(folder, options) for _ in range(options.rounds)]
            best = max(runs, key=lambda r: r["tokens_per_second"])
            best["held_out_loss"] = held_out_loss(folder / kind, held_out)
            result[kind] = best
            print(kind, best, flush=True)
    speeds = [result[kind]["tokens_per_second"] for kind in ("baseline", "ours")]
    result["times_the_baseline"] = speeds[1] / speeds[0]
    result["head"] = measure_loss(options)
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps(result))


# --- documents --------------------------------------------------------------------------------


def write_documents(path: Path, count: int, seed: int) -> None:
    """Captions of phantoms, concatenated to MedMax's lengths, after images as tokens."""
    tiny = open_checkpoint("tiny")
    text, images = tiny.text_tokenizer(), tiny.image_tokenizer()
    vocabulary = text.vocabulary
    generator = np.random.default_rng(seed)
    scans = [Phantom.random(generator) for _ in range(40)]
    codes = [images.encode([scan.image(images.size)])[0].tolist() for scan in scans]
    sentences = [text.encode(caption(scan) + " ") for scan in scans]

    def row() -> dict[str, Any]:
        ids = [vocabulary.bos]
        for index in generator.integers(0, len(scans), generator.integers(0, 4)):
            ids += vocabulary.image_token_ids(codes[index])
        ids += [*text.encode("What is seen?"), vocabulary.end_turn]
        length = len(ids) + int(generator.integers(10, 301) * 1.3)  # tokens per word
        while len(ids) < length:
            ids += sentences[generator.integers(0, len(scans))]
        return {"tokens": [*ids[:length], vocabulary.eos]}

    write_token_jsonl(path, (row() for _ in range(count)))
    write_manifest(path, {}, [], tiny.fingerprint())


# --- runs ---------------------------------------------------------------------------------------


def run_baseline(folder: Path, options: Options) -> dict[str, float]:
    documents = list(TokenDataset(folder / "train.jsonl"))
    seconds = train_baseline(documents, folder / "baseline", 8, LEARNING_RATE)["seconds"]
    return {"tokens_per_second": count_labels(documents) / seconds, "seconds": seconds}


def count_labels(documents: Sequence[Any]) -> int:
    """Number of tokens with a label."""
    vocabulary = open_checkpoint("tiny").text_tokenizer().vocabulary
    return sum(int((build_labels(ids, vocabulary) != IGNORE_INDEX).sum()) for ids in documents)


def run_ours(folder: Path, options: Options) -> dict[str, float]:
    """`medley train` with packed sequences of about 8 documents, like the baseline's batches."""
    dataset = TokenDataset(folder / "train.jsonl")
    # One packed sequence per step, of a length that gives the baseline's number of steps.
    length = int(dataset.lengths.sum() / (options.documents / 8) * 1.01)
    output = folder / "ours"
    for old in output.glob("*"):
        old.unlink()
    flags = ["--train_data", dataset.path, "--ckpt", "tiny", "--output_dir", output, "--pack"]
    flags += ["--max_length", length, "--lr", LEARNING_RATE, "--lora_dropout", 0]
    flags += ["--logging_steps", 5, "--save_strategy", "no", "--trainer", '{"disable_tqdm": true}']
    command = [sys.executable, "-m", "medley", "train", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    state = json.loads((output / "trainer_state.json").read_text())["log_history"]
    seconds = next(e["train_runtime"] for e in state if "train_runtime" in e)
    steps_done = max(e["step"] for e in state)
    tokens = count_labels(list(dataset))
    return {
        "tokens_per_second": tokens / seconds, "seconds": seconds, "steps": steps_done,
    }  # fmt: skip


def held_out_loss(adapter: Path, documents: Sequence[Any]) -> float:
    """Mean loss per labeled token, by the same code for both."""
    tiny = open_checkpoint("tiny")
    vocabulary = tiny.text_tokenizer().vocabulary
    model = peft.PeftModel.from_pretrained(tiny.decoder(torch.float32), str(adapter)).eval()
    total, count = 0.0, 0.0
    with torch.no_grad():
        for ids in documents:
            model(**collate([build_sequence([ids], vocabulary)], vocabulary))
            text, text_tokens, image, image_tokens = model.get_base_model().loss_sums.tolist()
            total, count = total + text + image, count + text_tokens + image_tokens
    return total / count


# --- the loss -----------------------------------------------------------------------------------

HEAD = """
import pathlib, re, threading, time, torch
import torch.nn.functional as F
from medley.modeling.chunked_loss import ChunkedCrossEntropy

def naive(states, head, targets):  # float32 logits of all positions, like transformers
    F.cross_entropy((states @ head.t()).float(), targets, ignore_index=-100).backward()
def ours(states, head, targets):
    positions = (targets != -100).nonzero().squeeze(1)
    ones = torch.ones(len(positions))
    total, _ = ChunkedCrossEntropy.apply(states[positions], head, targets[positions], ones, 0.0)
    (total / len(positions)).backward()
def status():
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

torch.manual_seed(0)
states = torch.randn({length}, {width}).bfloat16().requires_grad_()
head = (torch.randn({vocabulary}, {width}) * 0.02).bfloat16()
targets = torch.randint({vocabulary}, ({length},))
{kind}(states[:64].detach().requires_grad_(), head, targets[:64])  # warm-up
targets = torch.where(torch.arange({length}) < {labeled}, targets, -100)
before = peak = status()
def watch():
    global peak
    while True:
        peak = max(peak, status())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
{kind}(states, head, targets)
print("result", time.perf_counter() - start, (peak - before) / 1024)
"""


def measure_loss(options: Options) -> dict[str, Any]:
    result: dict[str, Any] = {}
    cases = {
        "naive": ("naive", options.length), "ours": ("ours", options.length),
        "ours_quarter_labeled": ("ours", options.length // 4),
    }  # fmt: skip
    for name, (kind, labeled) in cases.items():
        code = HEAD.format(
            kind=kind, labeled=labeled,
            length=options.length, width=options.width, vocabulary=options.vocabulary,
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        seconds, megabytes = map(float, done.stdout.split("result")[1].split())
        result[name] = {"seconds": seconds, "peak_mb": megabytes}
        print("head", name, result[name], flush=True)
    result["memory_of_naive"] = result["ours"]["peak_mb"] / result["naive"]["peak_mb"]
    result["time_of_naive"] = result["ours"]["seconds"] / result["naive"]["seconds"]
    return result


if __name__ == "__main__":
    sys.exit(main())
