"""The work of a 7B owner at its real size on a CPU: seconds and memory of each command.

    python benchmarks/real_size.py
    python benchmarks/real_size.py --scale 1/64
    python benchmarks/real_size.py --size 34b --folder DIR

Writes a random bfloat16 checkpoint of the size in Chameleon's layout and runs the commands on it,
each in a process of its own: both conversions, the merge of a random adapter, validation and
tokenization with the whole vocabulary, image tokenization, words, one step of LoRA, words with
matrices of 8 and 4 bits, and a response with text and an image. The memory and disk that the
steps need are printed first, and a machine without them is refused in one line. The baselines are
the figures of Medley 61a4e67 on a machine of 2 cores and 24 GB (docs/log.md). Memory is the
largest sum over the processes of a command: of anonymous pages, and of all resident pages, which
include those of mapped files, which the kernel can drop.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from measured_command import Measurement, StepFailed, measure
from random_checkpoints import (
    write_documents,
    write_images,
    write_random_adapter,
    write_random_checkpoint,
    write_training_tokens,
)
from random_models import SIZES, ModelSize, num_weights, resized, scaled

from medley.errors import PartialFailure, UserError
from medley.utils.cli_options import run_program
from medley.utils.files import nearest_parent

GB = 1e9
PYTHON_BYTES = 1.5e9  # of a command that has imported torch, and its workspaces
ANSWER_TEXT = 24  # text tokens of the response with an image


@dataclass(frozen=True)
class Options:
    """Measures the commands at the size of a published model, or at a fraction of it.

    Args:
        steps: names of the steps, separated by commas; by default those that make sense at a size
        size: 7b or 34b; of 34b only the conversions and the merge are run by default
        scale: fraction of the size, such as 1/64; layers and widths shrink by its cube root
        layers: number of layers instead
        width: width instead, a multiple of the width of a head
        answer_layers: layers of the model that generates text and an image, which takes 1,024
            steps; 32 are all of 7b
        documents: documents to tokenize
        images: images to tokenize
        limit: seconds after which a command is ended
        folder: folder for the checkpoints, which keeps them for other steps; by default a
            temporary one
    """

    steps: str | None = None
    size: Literal["7b", "34b"] = "7b"
    scale: str = "1"
    layers: int | None = None
    width: int | None = None
    answer_layers: int = 4
    documents: int = 2000
    images: int = 4
    limit: float = 3600
    folder: Path | None = None


@dataclass(frozen=True)
class Work:
    """What the steps work with.

    Attributes:
        size: sizes of the model
        folder: where the checkpoints are
    """

    options: Options
    size: ModelSize
    folder: Path

    @property
    def weight_bytes(self) -> int:
        return 2 * num_weights(self.size.decoder)

    @property
    def pth(self) -> Path:
        return self.folder / "pth"

    @property
    def hf(self) -> Path:
        return self.folder / "hf"


@dataclass(frozen=True)
class Step:
    """A step of the benchmark.

    Attributes:
        commands: the arguments of Python, for each command; called when the step begins
        memory: anonymous bytes that it needs, and `disk` bytes of files beside the checkpoint
        output: a checkpoint of full size that is deleted after the step
        creates: pattern of a file that it must create
        threads: number of each process's threads; torch's default if not given
        baseline: seconds, and gigabytes with what they count, before this benchmark existed
    """

    commands: Callable[[Work], list[list[Any]]]
    memory: Callable[[Work], float]
    disk: Callable[[Work], float] = lambda work: 0
    needs_hf: bool = False
    output: str | None = None
    creates: str | None = None
    threads: int | None = None
    baseline: tuple[float, float, str] | None = None


def main(argv: list[str] | None = None) -> int:
    return run_program("benchmarks/real_size.py", Options, work, argv)


# --- steps ----------------------------------------------------------------------------------------


def _streaming(work: Work) -> float:
    """A conversion has a few tensors in memory, and the pages that wait for the disk."""
    dims = work.size.decoder
    largest = max(dims.vocabulary_size, dims.feed_forward) * dims.width
    return PYTHON_BYTES + 12 * largest


def _loaded(work: Work) -> float:
    return PYTHON_BYTES + 1.1 * work.weight_bytes


def _packed(work: Work) -> float:
    """Matrices are packed one after another, once all of them are loaded."""
    return _loaded(work) + 1e9


def pth_to_bin(work: Work) -> list[list[Any]]:
    return [["-m", "conversion.pth_to_bin", "--input_dir", work.pth, "--output_dir", work.hf]]


def bin_to_pth(work: Work) -> list[list[Any]]:
    return [[
        "-m", "conversion.bin_to_pth", "--trained_ckpt", work.hf, "--original_ckpt", work.pth,
        "--new_ckpt", work.folder / "new_pth",
    ]]  # fmt: skip


def merge(work: Work) -> list[list[Any]]:
    adapter = work.folder / "adapter"
    write_random_adapter(adapter, work.size.decoder, work.hf)
    return [[
        "-m", "conversion.merge_lora", "--ckpt_path", adapter, "--base_path", work.hf,
        "--output_dir", work.folder / "merged",
    ]]  # fmt: skip


def tokenize(work: Work) -> list[list[Any]]:
    write_documents(work.folder, work.size, work.options.documents)
    files = ["--input_file", work.folder / "docs.jsonl"]
    files += ["--tokenizer_file", work.pth / "tokenizer" / "text_tokenizer.json"]
    output = work.folder / "docs.parquet"
    output.unlink(missing_ok=True)
    return [
        ["-m", "medley", "validate", *files],
        ["-m", "tokenizer.tokenize_jsonl", *files, "--output_file", output],
    ]


def encode(work: Work) -> list[list[Any]]:
    """One rank of one thread for each core, which is the fastest way on a CPU."""
    count = work.options.images
    write_images(work.folder / "images", count, work.size.vqgan.resolution)
    ranks = min(count, os.cpu_count() or 1)
    return [[
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
        "-m", "tokenizer.image_tokenization", "--input", work.folder / "images" / "list.csv",
        "--output", fresh(work.folder / "codes"), "--ckpt", work.pth, "--device", "cpu",
        "--partition_size", -(-count // ranks),
    ]]  # fmt: skip


def _generate(work: Work, ckpt: Path, mode: str, tokens: int, *flags: Any) -> list[Any]:
    return [
        "-m", "medley", "generate", "--ckpt", ckpt, "--output", fresh(work.folder / "responses"),
        "--prompt", "What is seen in this scan?", "--mode", mode, "--max_new_tokens", tokens,
        "--dtype", "bfloat16", "--device", "cpu", *flags,
    ]  # fmt: skip


def words(work: Work, *flags: Any) -> list[list[Any]]:
    return [_generate(work, work.pth, "text", 12, *flags)]


def answer(work: Work) -> list[list[Any]]:
    size = resized(work.size, work.options.answer_layers, None)
    folder = work.folder / "few_layers"
    if not folder.is_dir():
        write_random_checkpoint(folder, size, torch.bfloat16)
    tokens = size.vqgan.codes_per_image + 2 + ANSWER_TEXT
    return [_generate(work, folder, "any", tokens, "--min_images", 1, "--max_images", 1)]


def train(work: Work) -> list[list[Any]]:
    tokens = work.folder / "tokens.jsonl"
    length = write_training_tokens(tokens, work.pth)
    print(f"train: a document of {length} tokens", flush=True)
    return [[
        "-m", "medley", "train", "--train_data", tokens, "--ckpt", work.pth, "--output_dir",
        fresh(work.folder / "run"), "--bf16", "--steps", 1, "--gradient_checkpointing",
        "--save_strategy", "no", "--trainer", '{"disable_tqdm": true, "use_cpu": true}',
    ]]  # fmt: skip


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _few_layers(work: Work) -> int:
    return 2 * num_weights(resized(work.size, work.options.answer_layers, None).decoder)


STEPS = {
    "pth_to_bin": Step(pth_to_bin, _streaming, baseline=(47, 12.7, "resident")),
    "bin_to_pth": Step(
        bin_to_pth,
        _streaming,
        lambda w: w.weight_bytes,
        True,
        "new_pth",
        baseline=(85, 2.8, "resident"),
    ),
    "merge": Step(
        merge,
        _streaming,
        lambda w: w.weight_bytes,
        True,
        "merged",
        baseline=(84, 3.5, "resident"),
    ),
    "tokenize": Step(tokenize, lambda w: 2 * PYTHON_BYTES),
    "encode": Step(encode, lambda w: 2 * PYTHON_BYTES * (os.cpu_count() or 1), threads=1),
    "words": Step(words, _loaded, baseline=(34, 0, "")),
    # A checkpointed layer's activations are small beside the weights and the logits.
    "train": Step(train, lambda w: _loaded(w) + 2e9, baseline=(169, 17.7, "resident")),
    "int8": Step(lambda w: words(w, "--quantize", "8bit"), _packed),
    "int4": Step(lambda w: words(w, "--quantize", "4bit"), _packed),
    "answer": Step(
        answer,
        lambda w: 2 * PYTHON_BYTES + 1.1 * _few_layers(w),
        _few_layers,
        creates="responses/**/*.png",
    ),
}
CONVERSIONS = ("pth_to_bin", "bin_to_pth", "merge")  # what is run of 34b by default


# --- the run --------------------------------------------------------------------------------------


def work(options: Options) -> None:
    size = resized(scaled(SIZES[options.size], parse_scale(options.scale)), options.layers,
                   options.width)  # fmt: skip
    steps = choose_steps(options)
    if options.folder is None:
        with tempfile.TemporaryDirectory() as name:
            result = run_steps(Work(options, size, Path(name)), steps)
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        result = run_steps(Work(options, size, options.folder.resolve()), steps)
    print(json.dumps(result))
    if failed := [name for name, one in result["steps"].items() if "error" in one]:
        raise PartialFailure(f"These steps failed: {', '.join(failed)}.")


def parse_scale(text: str) -> Fraction:
    try:
        scale = Fraction(text)
    except (ValueError, ZeroDivisionError):
        scale = Fraction(0)
    if not 0 < scale <= 1:
        raise UserError(f"--scale: Out of range (got {text}, expected a fraction such as 1/64).")
    return scale


def choose_steps(options: Options) -> list[str]:
    known = list(STEPS)
    if options.steps is None:
        return known if options.size == "7b" else list(CONVERSIONS)
    chosen = options.steps.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(
            f"--steps: No such step (got {', '.join(unknown)}, expected some of "
            f"{', '.join(known)})."
        )
    return [name for name in known if name in chosen]


def run_steps(work: Work, steps: list[str]) -> dict[str, Any]:
    dims, is_whole = work.size.decoder, work.size == SIZES["7b"]
    result: dict[str, Any] = {
        "benchmark": "real_size", "size": work.size.name, "layers": dims.layers,
        "width": dims.width, "vocabulary": dims.vocabulary_size,
        "weights": num_weights(dims), "answer_layers": work.options.answer_layers,
        **check_machine(work, steps), "steps": {},
    }  # fmt: skip
    if not (work.pth / "models").is_dir():
        start = time.perf_counter()
        write_random_checkpoint(fresh(work.pth), work.size, torch.bfloat16)
        result["make_seconds"] = round(time.perf_counter() - start, 1)
        print(f"a random checkpoint was written in {result['make_seconds']} s", flush=True)
    for name in steps:
        step = STEPS[name]
        try:
            if step.needs_hf and not work.hf.is_dir():
                measure(pth_to_bin(work)[0], work.options.limit)
            if name == "pth_to_bin":
                fresh(work.hf)
            runs = [measure(c, work.options.limit, step.threads) for c in step.commands(work)]
            own = summarize(step, runs, is_whole)
            if step.creates is not None and not list(work.folder.glob(step.creates)):
                raise StepFailed(f"No {step.creates} was written.")
        except StepFailed as error:
            own = {"error": str(error)}
        if step.output is not None:
            fresh(work.folder / step.output)
        result["steps"][name] = own
        print(f"{name}: {own}", flush=True)
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    return result


def check_machine(work: Work, steps: list[str]) -> dict[str, float]:
    """Prints what the steps need. Raises UserError if the machine does not have it."""
    memory = {name: STEPS[name].memory(work) for name in steps}
    # The checkpoint, its other layout, the largest output beside them, and small files.
    copies = 1 + any(STEPS[name].needs_hf or name == "pth_to_bin" for name in steps)
    disk = copies * work.weight_bytes + max(STEPS[name].disk(work) for name in steps) + 5e8
    if (work.pth / "models").is_dir():
        disk -= work.weight_bytes
    if work.hf.is_dir():
        disk -= work.weight_bytes
    free = psutil.virtual_memory().available
    free_disk = shutil.disk_usage(nearest_parent(work.folder)).free
    listed = ", ".join(f"{name} {nbytes / GB:.1f}" for name, nbytes in memory.items())
    print(
        f"memory: {free / GB:.1f} GB available (estimates: {listed}); disk: {free_disk / GB:.1f} "
        f"GB free in {work.folder}, {max(disk, 0) / GB:.1f} GB needed",
        flush=True,
    )
    too_large = [name for name, nbytes in memory.items() if nbytes > free]
    if too_large or disk > free_disk:
        fits = ",".join(name for name in steps if name not in too_large)
        raise UserError(
            f"This machine is too small: {', '.join(too_large) or 'no step'} exceeds the "
            f"{free / GB:.1f} GB of free memory, and {max(disk, 0) / GB:.1f} GB of disk are needed "
            f"of {free_disk / GB:.1f} GB free. Use --steps {fits or 'tokenize'}, another --folder, "
            "or a smaller --scale."
        )
    return {"available_gb": round(free / GB, 1), "free_disk_gb": round(free_disk / GB, 1)}


def summarize(step: Step, runs: list[Measurement], is_whole: bool) -> dict[str, Any]:
    """The figures of a step, and its baseline if the model has its whole size."""
    result: dict[str, Any] = {
        "seconds": round(sum(run.seconds for run in runs), 1),
        "anonymous_gb": round(max(run.anonymous_gb for run in runs), 2),
        "resident_gb": round(max(run.resident_gb for run in runs), 2),
    }
    if step.baseline is not None and is_whole:
        seconds, gigabytes, kind = step.baseline
        result |= {"baseline_seconds": seconds, "times_faster": seconds / result["seconds"]}
        if kind:
            result[f"baseline_{kind}_gb"] = gigabytes
    return result


if __name__ == "__main__":
    sys.exit(main())
