"""Speed of tokenizing 2,000 documents with a BPE of realistic size, compared with a plain loop.

    python benchmarks/tokenize_jsonl.py --texts ../shared/data/pubmedqa/ori_pqal.json

Each document has one image of 1,024 codes and about 240 words. Baseline: json.loads, encode, list
building and json.dumps, one line at a time in one process, as in MedMax (without checks of codes).
A BPE of about 20,000 merges is trained on the texts first, outside of the timing. Both sides are
timed from reading the tokenizer to the complete file, without the start of Python.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from medley.data.image_token_store import partition_file, write_partition
from medley.data.token_dataset import TokenDataset
from medley.data.vocabulary import TextTokenizer, image_token_name
from medley.utils.cli_options import Alias, run_program

ROOT = Path(__file__).resolve().parents[1]
WORDS, CODES = 240, 1024
# Runs the command with a thread that polls the memory of each of its processes: anonymous memory,
# and the total that includes mapped files, which the kernel can drop.
MEASURE = """
import pathlib, re, sys, threading, time
import psutil
from tokenizer.tokenize_jsonl import main

peak = {"RssAnon": 0, "VmRSS": 0}
def watch():
    own = psutil.Process()
    while True:
        for process in [own, *own.children(recursive=True)]:
            try:
                status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                continue
            for name in peak:
                match = re.search(name + r":\\s+(\\d+)", status)
                peak[name] = max(peak[name], int(match[1]) if match else 0)
        time.sleep(0.1)
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
status = main()
seconds = time.perf_counter() - start
print("seconds", seconds, "peak", peak["RssAnon"] / 1024, peak["VmRSS"] / 1024)
sys.exit(status)
"""


@dataclass(frozen=True)
class Options:
    """Measures tokenizer.tokenize_jsonl against a plain loop.

    Args:
        texts: JSON file whose strings are used for the BPE and the documents
        documents: number of documents
        num_workers: number of Medley's processes
        runs: runs of each side; the fastest counts
        memory: measure the peak memory for these numbers of documents instead
    """

    aliases: ClassVar = {"workers": Alias("num_workers")}
    texts: Path
    documents: int = 2000
    num_workers: int = os.cpu_count() or 1
    runs: int = 3
    memory: list[int] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    return run_program("benchmarks/tokenize_jsonl.py", Options, work, argv)


def strings(value: Any) -> list[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for one in inner for text in strings(one)]


def make_tokenizer(folder: Path, texts: list[str]) -> Path:
    """Trains a byte-level BPE in Chameleon's id layout."""
    splitter = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = splitter
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=21_256, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    names = ["<s>", "<pad>", "</s>", "<unk>", *map(image_token_name, range(8192)), "<eoss>"]
    names += ["<racm3:break>", *(f"<reserved{i:05}>" for i in range(8198, 8707)), "<image>"]
    table = {name: i for i, name in enumerate(names)}
    pieces = {piece: len(names) + i for i, piece in enumerate(model["vocab"])}
    tokenizer = Tokenizer(models.BPE(table | pieces, [tuple(m) for m in model["merges"]]))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens(names)
    tokenizer.save(str(folder / "text_tokenizer.json"))
    print(f"BPE of {len(model['merges'])} merges")
    return folder / "text_tokenizer.json"


def write_documents(folder: Path, texts: list[str], count: int) -> None:
    """Writes docs.jsonl with inline codes, paths.jsonl with image paths, and codes of images."""
    words = " ".join(texts).split()
    rng = np.random.default_rng(0)
    paths = [f"images/{i}.png" for i in range(count)]
    with (
        open(folder / "docs.jsonl", "w", encoding="utf-8") as inline,
        open(folder / "paths.jsonl", "w", encoding="utf-8") as by_path,
    ):
        for partition, start in enumerate(range(0, count, 5000)):
            names = paths[start : start + 5000]
            codes = rng.integers(0, 8192, (len(names), CODES)).astype(np.uint16)
            write_partition(partition_file(folder / "codes", partition, 0), names, codes, [])
            for name, own in zip(names, codes.tolist(), strict=True):
                first = int(rng.integers(0, len(words) - WORDS))
                question = " ".join(words[first : first + 60])
                answer = " ".join(words[first + 60 : first + WORDS])
                text = f"<image>{question}<reserved08706>{answer}"
                row = {"text": text, "image_path": name, "source": "pubmedqa", "task": "VQA"}
                by_path.write(json.dumps(row) + "\n")
                inline.write(json.dumps({**row, "image_tokens": own}) + "\n")


def baseline(tokenizer_file: Path, source: Path, target: Path) -> float:
    start = time.perf_counter()
    tokenizer = TextTokenizer.from_file(tokenizer_file)
    vocabulary = tokenizer.vocabulary
    with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
        for line in lines:
            row = json.loads(line)
            ids = [vocabulary.bos]
            for part in re.split("(<image>|<reserved08706>)", row["text"]):
                if part == "<image>":
                    codes = [code + vocabulary.image_codes.start for code in row["image_tokens"]]
                    ids += [vocabulary.begin_image, *codes, vocabulary.end_image]
                elif part == "<reserved08706>":
                    ids.append(vocabulary.end_turn)
                elif part:
                    ids += tokenizer.plain.encode(part, add_special_tokens=False).ids
            row["tokens"] = [*ids, vocabulary.eos]
            out.write(json.dumps(row) + "\n")
    return time.perf_counter() - start


def run_medley(folder: Path, tokenizer_file: Path, source: str, target: str, workers: int) -> str:
    """Runs the command in a separate process; returns the line with its time and peak memory."""
    flags = ["--input_file", folder / source, "--tokenizer_file", tokenizer_file]
    flags += ["--output_file", folder / target, "--num_workers", workers]
    flags += ["--image_codes", folder / "codes"] if source == "paths.jsonl" else []
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def work(options: Options) -> None:
    texts = strings(json.loads(options.texts.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer_file = make_tokenizer(folder, texts)
        if options.memory:
            result = memory(options, folder, tokenizer_file, texts)
        else:
            result = speed(options, folder, tokenizer_file, texts)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({**result, "machine": machine}))


def speed(options: Options, folder: Path, tokenizer_file: Path, texts: list[str]) -> dict[str, Any]:
    write_documents(folder, texts, options.documents)
    plain = folder / "plain.jsonl"
    seconds = {
        "baseline": [baseline(tokenizer_file, folder / "docs.jsonl", plain)],
        "jsonl": [], "parquet": [], "jsonl, one process": [],
    }  # fmt: skip
    for _ in range(options.runs):
        seconds["baseline"].append(baseline(tokenizer_file, folder / "docs.jsonl", plain))
        for kind, source, target, workers in (
            ("jsonl", "docs.jsonl", "ours.jsonl", options.num_workers),
            ("jsonl, one process", "docs.jsonl", "one.jsonl", 1),
            ("parquet", "paths.jsonl", "ours.parquet", options.num_workers),
        ):
            line = run_medley(folder, tokenizer_file, source, target, workers)
            seconds[kind].append(float(line.split()[1]))
    same = all((folder / n).read_bytes() == plain.read_bytes() for n in ("ours.jsonl", "one.jsonl"))
    parquet, jsonl = TokenDataset(folder / "ours.parquet"), TokenDataset(plain)
    same_ids = all((a == b).all() for a, b in zip(parquet, jsonl, strict=True))
    cache = sum(p.stat().st_size for p in folder.glob(".ours.parquet.cache*"))
    best = {kind: options.documents / min(times) for kind, times in seconds.items()}
    return {
        "benchmark": "tokenize_jsonl", "documents": options.documents,
        "documents_per_second": best,
        "times_faster_jsonl": best["jsonl"] / best["baseline"],
        "times_faster_jsonl_one_process": best["jsonl, one process"] / best["baseline"],
        "times_faster_shards_to_parquet": best["parquet"] / best["baseline"],
        "byte_for_byte_the_same": same, "parquet_holds_the_same_ids": same_ids,
        "cache_bytes_per_token": cache / int(parquet.lengths.sum()),
    }  # fmt: skip


def memory(
    options: Options, folder: Path, tokenizer_file: Path, texts: list[str]
) -> dict[str, Any]:
    peaks: dict[str, dict[str, dict[str, float]]] = {"jsonl": {}, "parquet": {}}
    for count in options.memory:
        write_documents(folder, texts, count)
        for source, target in (("docs.jsonl", "o.jsonl"), ("paths.jsonl", "o.parquet")):
            line = run_medley(folder, tokenizer_file, source, target, options.num_workers)
            anonymous, total = map(float, line.split()[3:5])
            peaks[target.rpartition(".")[2]][str(count)] = {
                "anonymous_mb": anonymous, "with_mapped_files_mb": total
            }  # fmt: skip
        print(f"{count} documents: {peaks}")
    return {"benchmark": "tokenize_jsonl_memory", "peak_mb_of_the_largest_process": peaks}


if __name__ == "__main__":
    sys.exit(main())
