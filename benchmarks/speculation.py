"""Speculative decoding of image codes: passes, time, and equality with sequential decoding.

    python benchmarks/speculation.py
    python benchmarks/speculation.py --images 16 --batches 1,8 --rounds 1

The embedded model on a CPU, one thread. Each case is measured with every setting in one run, the
settings in turn, and each case begins with a new policy of `auto`. Plain SJD (plain_sjd.py) is a
baseline in passes only: its implementation is not tuned.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from plain_sjd import image_distributions, image_logits, use_plain_sjd
from torch import Tensor

import medley
from medley.errors import UserError
from medley.generation import Engine, GenerationOptions, Request
from medley.generation.grammar import TokenMasks
from medley.generation.sampler import Logits, Sampler
from medley.generation.sampling import philox_uniforms
from medley.generation.sequence import Window
from medley.generation.speculation import Speculation, Speculator
from medley.inference.model import Model
from medley.utils.cli_options import run_program

PROMPTS = (
    "Draw a chest X-ray.",
    "Draw a brain MRI with a tumor.",
    "Show me a CT scan of the abdomen with a large marked abscess in the lower left.",
    "Show me a histology slide of the brain with a small marked cyst in the upper right.",
)
SETTINGS: tuple[Speculation, ...] = ("off", 8, 16, 32, "auto")
SAMPLING = ((0.7, 0.9), (1.0, 1.0))  # temperature and top-p: the defaults, the whole distribution
WINDOW = 16  # of SJD, the heat map and the comparison of roundings


@dataclass(frozen=True)
class Options:
    """Measures speculative decoding of image codes.

    Args:
        images: images of each case
        batches: numbers of images at the same time, with commas
        rounds: runs of each setting; the fastest counts
        rounding_images: images that are compared in float32 and bfloat16
        threads: threads of torch
    """

    images: int = 16
    batches: str = "1,2,4,8,16"
    rounds: int = 2
    rounding_images: int = 64
    threads: int = 1

    def check_batches(self) -> list[int]:
        """The batches. Raises UserError for a number below 1."""
        for name in ("images", "rounds", "rounding_images", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, expected 1 or more.")
        batches = self.batches.split(",")
        if not all(batch.strip().isdecimal() and int(batch) >= 1 for batch in batches):
            raise UserError(
                f"--batches is {self.batches!r}, expected numbers from 1 on with commas."
            )
        return [int(batch) for batch in batches]


def main(argv: list[str] | None = None) -> int:
    return run_program("benchmarks/speculation.py", Options, work, argv)


def work(options: Options) -> None:
    batches = options.check_batches()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    model = load_model("float32")
    result: dict[str, Any] = {"benchmark": "speculation", "images": options.images}
    result["cases"] = [
        measure_case(model, options, batch, is_guided, *sampling)
        for batch in batches
        for is_guided in (False, True)
        for sampling in SAMPLING
    ]
    result["plain_sjd"] = [
        measure_sjd(model, options.images, is_guided, *sampling)
        for is_guided in (False, True)
        for sampling in SAMPLING
    ]
    result["accepted_by_place"] = {
        name: heat_map(model, options.images, is_guided)
        for name, is_guided in (("unguided", False), ("guided", True))
    }
    result["rounding"] = [
        compare_roundings(load_model(dtype), dtype, options.rounding_images)
        for dtype in ("float32", "bfloat16")
    ]
    result["machine"] = f"{processor()}, {os.cpu_count()} cores"
    result |= {"threads": options.threads, "load_before": load, "load_after": os.getloadavg()[0]}
    print(json.dumps(result))


def load_model(dtype: str) -> Model:
    """A model of its own: the benchmark changes its engine."""
    return medley.load("tiny", device="cpu", dtype=dtype)


def processor() -> str:
    """Name of the processor where Linux gives it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def make_requests(
    model: Model, count: int, is_guided: bool, temperature: float = 0.7, top_p: float = 0.9
) -> list[Request]:
    scales = (3.0, 1.2) if is_guided else (1.0, 1.0)
    generation = GenerationOptions(
        mode="image", image_temperature=temperature, image_top_p=top_p,
        guidance_scale_text=scales[0], guidance_scale_image=scales[1],
    )  # fmt: skip
    prompts = [model.encode_prompt(prompt) for prompt in PROMPTS]
    return [Request(prompts[i % len(prompts)], generation, i) for i in range(count)]


# --- passes and time ------------------------------------------------------------------------------


@dataclass
class Run:
    """One run of all requests.

    `passes` are those that an image takes part in, `engine_passes` those of the engine divided by
    the images; they differ by the batch.
    """

    ids: list[list[int]]
    passes: float
    engine_passes: float
    wall_ms: float
    cpu_ms: float


def run(engine: Engine, requests: Sequence[Request], batch: int) -> Run:
    in_pass: list[int] = []
    decode = engine.runner.decode

    def count(windows: Sequence[Window]) -> Tensor:
        in_pass.append(len(windows))
        return decode(windows)

    with patch.object(engine.runner, "decode", count):
        start = time.perf_counter(), time.process_time()
        outputs = engine.generate(requests, batch)
        times = time.perf_counter() - start[0], time.process_time() - start[1]
    wall_ms, cpu_ms = (1000 * seconds / len(requests) for seconds in times)
    ids = [output.ids for output in outputs]
    number = len(requests)
    return Run(ids, sum(in_pass) / number, len(in_pass) / number, wall_ms, cpu_ms)


def measure_case(
    model: Model, options: Options, batch: int, is_guided: bool, temperature: float, top_p: float
) -> dict[str, Any]:
    """Every setting, compared with `off` of the same batch and with `off` of one at a time."""
    engine = model.engine
    engine.speculator = Speculator(engine.speculator.codes_per_image, can_measure=True)
    requests = make_requests(model, options.images, is_guided, temperature, top_p)
    run(engine, requests[:batch], batch)  # warms up caches, and `auto` a little
    engine.speculator = Speculator(engine.speculator.codes_per_image, can_measure=True)
    runs: dict[Speculation, list[Run]] = {setting: [] for setting in SETTINGS}
    for _ in range(options.rounds):
        for setting in SETTINGS:
            with engine.speculation(setting):
                runs[setting].append(run(engine, requests, batch))
    case: dict[str, Any] = {
        "batch": batch, "guided": is_guided, "temperature": temperature, "top_p": top_p,
    }  # fmt: skip
    print(case, flush=True)
    off = runs["off"]
    off_ms = min(r.cpu_ms for r in off)
    for setting, own in runs.items():
        row = {
            "passes": own[-1].passes,
            "engine_passes": own[-1].engine_passes,
            "wall_ms": min(r.wall_ms for r in own),
            "cpu_ms": min(r.cpu_ms for r in own),
            "first_cpu_ms": own[0].cpu_ms,  # `auto`: with its trials of widths
            "times_faster": off_ms / min(r.cpu_ms for r in own),
            "equal_to_off": num_same(off[0].ids, own[-1].ids),
        }
        case[str(setting)] = {name: round(value, 3) for name, value in row.items()}
        print(f"  {setting!s:>4}", case[str(setting)], flush=True)
    return case


def num_same(expected: Sequence[list[int]], found: Sequence[list[int]]) -> int:
    return sum(a == b for a, b in zip(expected, found, strict=True))


def measure_sjd(
    model: Model, images: int, is_guided: bool, temperature: float, top_p: float
) -> dict[str, Any]:
    """Passes of plain SJD at batch 1. Its images are other draws of the same distribution."""
    engine = model.engine
    before = engine.sampler, engine.speculator
    use_plain_sjd(engine, WINDOW)
    try:
        own = run(engine, make_requests(model, images, is_guided, temperature, top_p), 1)
    finally:
        engine.sampler, engine.speculator = before
    case = {
        "window": WINDOW, "guided": is_guided, "temperature": temperature, "top_p": top_p,
        "passes": round(own.passes, 3),
    }  # fmt: skip
    print("plain SJD", case, flush=True)
    return case


# --- where drafts are accepted --------------------------------------------------------------------


def heat_map(model: Model, images: int, is_guided: bool) -> list[list[float]]:
    """Fraction of images in which the code of a place was accepted as a draft, as rows of the grid.

    The places of an image sum to its codes without its passes: each pass ends with a draw that was
    no accepted draft.
    """
    engine = model.engine
    codes = engine.speculator.codes_per_image
    accepted = [0] * codes
    accept = engine.speculator.accept

    def record(windows: Sequence[Window], *rest: Any) -> list[list[int]]:
        confirmed = accept(windows, *rest)
        for window, tokens in zip(windows, confirmed, strict=True):
            first = window.sequence.grammar.codes_emitted
            if first is not None:
                for place in range(first, first + len(tokens) - 1):
                    accepted[place] += 1
        return confirmed

    with patch.object(engine.speculator, "accept", record), engine.speculation(WINDOW):
        engine.generate(make_requests(model, images, is_guided), 1)
    side = math.isqrt(codes)
    width = side if side * side == codes else codes
    rows = [
        [round(count / images, 3) for count in accepted[start : start + width]]
        for start in range(0, codes, width)
    ]
    print(f"accepted as drafts, % of {images} images, guided {is_guided}, window {WINDOW}:")
    for row in rows:
        print("  " + " ".join(f"{100 * value:3.0f}" for value in row), flush=True)
    return rows


# --- rounding -------------------------------------------------------------------------------------


class MarginSampler(Sampler):
    """Records how far each draw was from another code, in probability.

    Another rounding changes a draw only if the uniform number is close to an end of the code's
    interval, or if another set of codes is kept: a cumulative probability is close to top-p, or the
    last code that is kept and the first that is not are about equally probable.
    """

    def __init__(self, masks: TokenMasks) -> None:
        super().__init__(masks)
        self.margins: dict[tuple[int, int], float] = {}  # by number of the request and output place

    def __call__(
        self, windows: Sequence[Window], states: Tensor | None, logits: Logits
    ) -> list[list[int]]:
        drawn = super().__call__(windows, states, logits)
        for window, (token, *_) in zip(windows, drawn, strict=True):
            if states is not None and window.sequence.grammar.in_image:
                table = image_logits(self, window, states, logits)
                place = window.sequence.request.index, len(window.sequence.output.ids)
                self.margins[place] = margin(window, table, token - self.image_tokens.start)
        return drawn


def margin(window: Window, table: Tensor, code: int) -> float:
    """The margin of a draw from logits (1, C)."""
    request = window.sequence.request
    position = window.sequence.position
    uniform = float(philox_uniforms([request.options.seed], [request.index], [position]))
    kept = image_distributions(window, table)[0]
    end = float(kept[: code + 1].sum())
    distances = [abs(uniform - end), abs(uniform - end + float(kept[code]))]
    top_p = request.options.image_top_p
    if top_p < 1:
        ordered = table.softmax(-1)[0].sort(descending=True).values
        distances.append(float((ordered.cumsum(0) - top_p).abs().min()))
        count = int((kept > 0).sum())
        if count < len(ordered):
            distances.append(float(ordered[count - 1] - ordered[count]))
    return min(distances)


def differences(
    expected: Sequence[list[int]],
    found: Sequence[list[int]],
    margins: Mapping[tuple[int, int], float],
) -> dict[str, Any]:
    """Equal images and codes, and the largest margin of the first code that differs."""
    firsts = [
        (number, next(i for i, (a, b) in enumerate(zip(*both, strict=True)) if a != b))
        for number, both in enumerate(zip(expected, found, strict=True))
        if both[0] != both[1]
    ]
    equal = sum(
        a == b for both in zip(expected, found, strict=True) for a, b in zip(*both, strict=True)
    )
    return {
        "equal_images": len(expected) - len(firsts),
        "equal_tokens": round(equal / sum(map(len, expected)), 4),
        "largest_margin": max((margins[first] for first in firsts), default=None),
    }


def compare_roundings(model: Model, dtype: str, images: int) -> dict[str, Any]:
    """Guided images of `off` against those of windows, and against those of a batch of 8."""
    engine = model.engine
    requests = make_requests(model, images, is_guided=True)
    sampler = MarginSampler(engine.sampler.masks)
    with engine.speculation("off"):
        with patch.object(engine, "sampler", sampler):
            off = run(engine, requests, 1).ids
        batch = run(engine, requests, 8).ids
    with engine.speculation(WINDOW):
        window = run(engine, requests, 1).ids
    case: dict[str, Any] = {"dtype": dtype, "images": images}
    case["window_16"] = differences(off, window, sampler.margins)
    case["batch_8"] = differences(off, batch, sampler.margins)
    print(case, flush=True)
    return case


if __name__ == "__main__":
    sys.exit(main())
