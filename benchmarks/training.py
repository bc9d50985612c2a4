"""Training: trained tokens a second beside transformers' Trainer, and the memory of the loss head.

    python benchmarks/training.py

Documents with MedMax's spread of lengths (answers of 10 to 300 words, 0 to 3 pictures) train LoRA
on `tiny`. Baseline: transformers' Trainer with PEFT, batches of 8 documents padded on the right,
the plain loss over all logits. Both see the same documents in the same number of steps; the loss on
held-out documents must come out alike. Then the loss head alone, at any width and vocabulary.
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
from medley.data.token_dataset import TokenDataset, write_jsonl
from medley.phantoms import Phantom, caption
from medley.utils.cli_options import run_program
from medley.utils.manifest import write_manifest

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Options:
    """Measures training.

    Args:
        documents: documents to learn from; as many steps as batches of 8 of them
        length: places of the loss head's measurement
        width: its width
        vocabulary: its vocabulary
        rounds: runs of each, of which the fastest counts
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
            figures = max(runs, key=lambda r: r["trained_tokens_per_second"])
            figures["held_out_loss"] = held_out_loss(folder / kind, held_out)
            result[kind] = figures
            print(kind, figures, flush=True)
    speeds = [result[kind]["trained_tokens_per_second"] for kind in ("baseline", "ours")]
    result["times_the_baseline"] = speeds[1] / speeds[0]
    result["head"] = head_figures(options)
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps(result))


# --- documents --------------------------------------------------------------------------------


def write_documents(path: Path, count: int, seed: int) -> None:
    """Phantoms' texts, strung together to MedMax's lengths; pictures by their codes."""
    tiny = open_checkpoint("tiny")
    text, images = tiny.text_tokenizer(), tiny.image_tokenizer()
    marks = text.vocabulary
    generator = np.random.default_rng(seed)
    scans = [Phantom.random(generator) for _ in range(40)]
    codes = [images.encode([scan.image(images.size)])[0].tolist() for scan in scans]
    sentences = [text.encode(caption(scan) + " ") for scan in scans]

    def row() -> dict[str, Any]:
        ids = [marks.bos]
        for place in generator.integers(0, len(scans), generator.integers(0, 4)):
            ids += marks.image_token_ids(codes[place])
        ids += [*text.encode("What is seen?"), marks.end_turn]
        wanted = len(ids) + int(generator.integers(10, 301) * 1.3)  # tokens of so many words
        while len(ids) < wanted:
            ids += sentences[generator.integers(0, len(scans))]
        return {"tokens": [*ids[:wanted], marks.eos]}

    write_jsonl(path, (row() for _ in range(count)))
    write_manifest(path, {}, [], tiny.fingerprint())


# --- runs ---------------------------------------------------------------------------------------


def run_baseline(folder: Path, options: Options) -> dict[str, float]:
    documents = list(TokenDataset(folder / "train.jsonl"))
    seconds = train_baseline(documents, folder / "baseline", 8, LEARNING_RATE)["seconds"]
    return {"trained_tokens_per_second": trained(documents) / seconds, "seconds": seconds}


def trained(documents: Sequence[Any]) -> int:
    marks = open_checkpoint("tiny").text_tokenizer().vocabulary
    return sum(int((build_labels(ids, marks) != IGNORE_INDEX).sum()) for ids in documents)


def run_ours(folder: Path, options: Options) -> dict[str, float]:
    """The program itself, with rows of about 8 documents, as the baseline's batches have."""
    shards = TokenDataset(folder / "train.jsonl")
    # One row a step, as long as makes as many steps as the baseline's batches of 8.
    length = int(shards.lengths.sum() / (options.documents / 8) * 1.01)
    output = folder / "ours"
    for old in output.glob("*"):
        old.unlink()
    flags = ["--train_data", shards.path, "--ckpt", "tiny", "--output_dir", output, "--pack"]
    flags += ["--max_length", length, "--lr", LEARNING_RATE, "--lora_dropout", 0]
    flags += ["--logging_steps", 5, "--save_strategy", "no", "--trainer", '{"disable_tqdm": true}']
    command = [sys.executable, "-m", "training.train", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    state = json.loads((output / "trainer_state.json").read_text())["log_history"]
    seconds = next(e["train_runtime"] for e in state if "train_runtime" in e)
    steps_done = max(e["step"] for e in state)
    tokens = trained(list(shards))
    return {
        "trained_tokens_per_second": tokens / seconds, "seconds": seconds, "steps": steps_done,
    }  # fmt: skip


def held_out_loss(adapter: Path, documents: Sequence[Any]) -> float:
    """Mean loss a labelled token, by the same code for both."""
    tiny = open_checkpoint("tiny")
    marks = tiny.text_tokenizer().vocabulary
    model = peft.PeftModel.from_pretrained(tiny.decoder(torch.float32), str(adapter)).eval()
    total, count = 0.0, 0.0
    with torch.no_grad():
        for ids in documents:
            model(**collate([build_sequence([ids], marks)], marks))
            text, texts, image, images = model.get_base_model().loss_sums.tolist()
            total, count = total + text + image, count + texts + images
    return total / count


# --- the loss head ------------------------------------------------------------------------------

HEAD = """
import pathlib, re, threading, time, torch
import torch.nn.functional as F
from medley.modeling.chunked_loss import HeadLoss

def naive(states, head, targets):  # logits of all places, in float32, as transformers has them
    F.cross_entropy((states @ head.t()).float(), targets, ignore_index=-100).backward()
def ours(states, head, targets):
    places = (targets != -100).nonzero().squeeze(1)
    ones = torch.ones(len(places))
    total, _ = HeadLoss.apply(states[places], head, targets[places], ones, 0.0)
    (total / len(places)).backward()
def status():
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

torch.manual_seed(0)
states = torch.randn({length}, {width}).bfloat16().requires_grad_()
head = (torch.randn({vocabulary}, {width}) * 0.02).bfloat16()
targets = torch.randint({vocabulary}, ({length},))
{kind}(states[:64].detach().requires_grad_(), head, targets[:64])  # libraries' own workspaces
targets = torch.where(torch.arange({length}) < {labelled}, targets, -100)
before = peak = status()
def watch():
    global peak
    while True:
        peak = max(peak, status())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
{kind}(states, head, targets)
print("figures", time.perf_counter() - start, (peak - before) / 1024)
"""


def head_figures(options: Options) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cases = {
        "naive": ("naive", options.length), "ours": ("ours", options.length),
        "ours_quarter_labelled": ("ours", options.length // 4),
    }  # fmt: skip
    for name, (kind, labelled) in cases.items():
        code = HEAD.format(
            kind=kind, labelled=labelled,
            length=options.length, width=options.width, vocabulary=options.vocabulary,
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        seconds, megabytes = map(float, done.stdout.split("figures")[1].split())
        found[name] = {"seconds": seconds, "peak_mb": megabytes}
        print("head", name, found[name], flush=True)
    found["memory_of_naive"] = found["ours"]["peak_mb"] / found["naive"]["peak_mb"]
    found["time_of_naive"] = found["ours"]["seconds"] / found["naive"]["seconds"]
    return found


if __name__ == "__main__":
    sys.exit(main())
