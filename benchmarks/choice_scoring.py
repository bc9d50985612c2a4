"""Speed of choice scoring, compared with one plain forward pass for each choice.

    python benchmarks/choice_scoring.py [--questions 300] [--device cuda]

The embedded model and questions about phantoms, each with yes and no, and with four findings as
choices. The images are encoded before. Ends with one JSON line: questions per second of both, and
the largest difference of their log-likelihoods per token.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import medley
from medley.data.document import Document, ImagePart, Turn
from medley.inference.model import Model
from medley.phantoms import Phantom, questions
from medley.utils.cli_options import run_program

CHOICES = {
    "yes_no": ("yes", "no"),
    "findings": ("a cyst", "a nodule in the left half", "a bright calcification", "no finding"),
}


@dataclass(frozen=True)
class Options:
    """Measures choice scoring.

    Args:
        questions: number of questions
        batch_size: questions of a batch
        rounds: runs of each variant; the fastest counts
        device: auto, cpu, cuda or mps
    """

    questions: int = 300
    batch_size: int = 32
    rounds: int = 3
    device: str = "auto"


def make_prompts(model: Model, count: int) -> list[Document]:
    """One random question about a random phantom each, with its image codes."""
    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(count):
        scan = Phantom.random(rng)
        pairs = questions(scan)
        part = model.tokenize_image(ImagePart(image=scan.image(64)))
        prompts.append(Document((Turn("user", (part, pairs[rng.integers(len(pairs))][0])),)))
    return prompts


@torch.inference_mode()
def plain_scores(
    model: Model, prompts: Sequence[Document], choices: Sequence[str]
) -> list[list[float]]:
    decoder: Any = model.decoder
    ends = [model.vocabulary.eos, model.vocabulary.end_turn]
    scores = []
    for prompt in prompts:
        ids = model.encode_prompt(prompt)
        row = []
        for choice in choices:
            own = model.text_tokenizer.encode(choice)
            tokens = torch.tensor([[*ids, *own]], device=model.engine.runner.device)
            logits = decoder(input_ids=tokens, logits_to_keep=len(own) + 1).logits[0]
            values = logits.float().log_softmax(-1)
            total = values[torch.arange(len(own)), own].sum() + values[-1, ends].logsumexp(0)
            row.append(total.item())
        scores.append(row)
    return scores


def fastest(work: Any, rounds: int) -> tuple[float, Any]:
    """The seconds of the fastest run, and the result of the last one."""
    times, result = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        result = work()  # numbers on the host, so that the device has finished
        times.append(time.perf_counter() - start)
    return min(times), result


def work(options: Options) -> None:
    model = medley.load("tiny", device=options.device, dtype="float32")
    prompts = make_prompts(model, options.questions)
    result: dict[str, Any] = {"benchmark": "choice_scoring", "questions": len(prompts)}
    for name, choices in CHOICES.items():
        plain, expected = fastest(
            lambda choices=choices: plain_scores(model, prompts, choices), options.rounds
        )
        own, scores = fastest(
            lambda choices=choices: model.score_batch(prompts, choices, options.batch_size),
            options.rounds,
        )
        tokens = [len(model.text_tokenizer.encode(choice)) + 1 for choice in choices]
        found = [[score.logprob for score in row] for row in scores]
        difference = np.abs((np.array(found) - np.array(expected)) / np.array(tokens)).max()
        result[name] = {
            "plain_per_second": round(len(prompts) / plain, 1),
            "ours_per_second": round(len(prompts) / own, 1),
            "speedup": round(plain / own, 2), "largest_difference": float(f"{difference:.1e}"),
        }  # fmt: skip
        print(json.dumps({name: result[name]}), file=sys.stderr, flush=True)
    device = model.engine.runner.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    result["machine"] = f"{kind}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(json.dumps(result))


def main(argv: list[str] | None = None) -> int:
    return run_program("benchmarks/choice_scoring.py", Options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
