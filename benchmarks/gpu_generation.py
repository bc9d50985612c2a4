"""The sections of benchmarks/gpu.py that encode images and generate."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from random_models import (
    SIZES,
    make_decoder,
    make_vqgan,
    num_weights,
    random_squares,
    tiny_vocabulary,
)
from torch.utils.flop_counter import FlopCounterMode

from medley.errors import UserError
from medley.generation import Engine, GenerationOptions, Request
from medley.generation.prefix_cache import shared_prefix_length
from medley.inference.devices import resolve_device
from medley.modeling.quantization import Quantize, quantize_layers
from medley.trainer.preflight import measure_peak_flops
from medley.vqgan.image_tokenizer import ImageTokenizer
from medley.vqgan.model import VQGAN, VQGANConfig

if TYPE_CHECKING:
    from gpu import Report

    from medley.generation import GenerationOutput

BF16 = torch.bfloat16
BATCHES = (1, 8, 32)
PROMPT = 16  # tokens
WARM_UP = 8  # steps
SPECULATION = (4, 16)  # draws in a pass; random weights accept few drafts
FRACTION_OF_LIMIT = 0.8  # a goal counts as reached at this fraction of what the device allows
# Relative difference of a feed-forward block's output that rounded weights explain.
CLOSE: dict[Quantize, float] = {"8bit": 0.05, "4bit": 0.25}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, function: Callable[[], Any]) -> float:
    """Seconds of a call, with all work that it has started on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


# --- images to codes ------------------------------------------------------------------------------


def encode_images(report: Report) -> None:
    """Images per second, the device's limit for them, and the codes against those of the CPU."""
    config, device = SIZES[report.size].vqgan, report.device
    is_gpu = device.type == "cuda"
    squares = random_squares(64 if is_gpu else 2, config.resolution)
    few = squares[:2]
    on_cpu = ImageTokenizer(make_vqgan(config)).encode_bytes(few)
    report.add("codes in use on the CPU", on_cpu.unique().numel())
    operations = encoder_operations(config)
    for dtype, goal in ((torch.float32, 122), (BF16, 1800)):
        tokenizer = ImageTokenizer(make_vqgan(config), device=device, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        equal = float((tokenizer.encode_bytes(few).cpu() == on_cpu).float().mean())
        if dtype == torch.float32:
            report.check("float32 codes equal those of the CPU", equal == 1, equal)
        else:
            report.add(f"{name} codes equal to those of the CPU", equal)
        tokenizer.encode_bytes(squares)  # warm-up
        rounds = 3 if is_gpu else 1
        seconds = timed(device, lambda: [tokenizer.encode_bytes(squares) for _ in range(rounds)])  # noqa: B023
        limit = measure_peak_flops(device, dtype) / operations
        report.add(f"{name} limit by matrix products", limit, "images/s")
        reached = rounds * len(squares) / seconds
        report.add(
            f"{name} encode", reached, "images/s", at_least=min(goal, FRACTION_OF_LIMIT * limit)
        )


def encoder_operations(config: VQGANConfig) -> int:
    """Floating-point operations of encoding one image, counted on the meta device."""
    with torch.device("meta"), torch.inference_mode():
        vqgan = VQGAN(config)
        counter = FlopCounterMode(display=False)
        with counter:
            vqgan.encode(torch.empty(1, 3, config.resolution, config.resolution))
    return counter.get_total_flops()


# --- text -----------------------------------------------------------------------------------------


def make_engine(report: Report, size: str | None = None, seed: int = 0) -> Engine:
    own = SIZES[size or report.size]
    decoder = make_decoder(own, report.device, BF16, seed)
    engine = Engine(
        decoder, tiny_vocabulary(), own.vqgan.codes_per_image, fuse=True,
        codebook_size=own.vqgan.n_embed,
    )  # fmt: skip
    # Its windows follow from measured times, and other windows round differently in bfloat16.
    engine.set_speculation("off")
    return engine


def prompts(count: int, length: int = PROMPT) -> list[list[int]]:
    vocabulary = tiny_vocabulary()
    words = sorted(vocabulary.text_tokens)
    return [
        [vocabulary.bos, *(words[(7 * i + 13 * j) % len(words)] for j in range(length))]
        for i in range(count)
    ]


def greedy(tokens: int) -> GenerationOptions:
    return GenerationOptions(
        mode="text", text_greedy=True, repetition_penalty=1, max_new_tokens=tokens
    )


def time_steps(engine: Engine, batch: int, steps: int) -> tuple[float, list[list[int]]]:
    """Seconds of one decode step after a warm-up, and the tokens of each sequence."""
    engine.set_max_num_seqs(max(engine.max_num_seqs, batch))
    options = greedy(2 * WARM_UP + steps)
    tickets = [engine.submit(Request(p, options, i)) for i, p in enumerate(prompts(batch))]

    def run(count: int) -> None:
        for _ in range(count):
            engine.step()

    run(WARM_UP)
    seconds = timed(engine.runner.device, lambda: run(steps)) / steps
    tokens = [[s.token for s in engine.poll(t) if s.token is not None] for t in tickets]
    for ticket in tickets:
        engine.cancel(ticket)
    return seconds, tokens


def decode_text(report: Report) -> None:
    """Milliseconds of a step against the memory's bandwidth, with and without CUDA graphs."""
    device, is_gpu = report.device, report.device.type == "cuda"
    bandwidth = copy_bandwidth(device)
    report.add("bandwidth of a copy", bandwidth / 1e9, "GB/s")
    dims = SIZES[report.size].decoder
    # The embedding's matrix is not read as a whole.
    nbytes = 2 * (num_weights(dims) - dims.vocabulary_size * dims.width)
    report.add("step at the limit of the bandwidth", 1000 * nbytes / bandwidth, "ms")
    engine = make_engine(report)
    steps = 64 if is_gpu else 4
    with_graph: dict[int, tuple[float, list[list[int]]]] = {}
    for batch in BATCHES:
        with_graph[batch] = seconds, _ = time_steps(engine, batch, steps)
        goal = 5.0 if batch == 1 else None
        report.add(f"step at batch {batch}", 1000 * seconds, "ms", at_most=goal)
        report.add(f"weights read at batch {batch}", nbytes / seconds / 1e9, "GB/s")
        report.add(f"text at batch {batch}", batch / seconds, "tokens/s")
    report.add("CUDA graphs", str(engine.runner.use_cuda_graph))
    engine.runner.use_cuda_graph = False
    for batch in (1, 8):
        seconds, tokens = time_steps(engine, batch, steps)
        report.add(f"step at batch {batch} without graphs", 1000 * seconds, "ms")
        prefixes = [
            shared_prefix_length(a, b) for a, b in zip(tokens, with_graph[batch][1], strict=True)
        ]
        # Other sizes round differently, and after one other token all following ones differ.
        same = statistics.median(prefixes)
        report.check(f"tokens without graphs at batch {batch} are equal", same >= WARM_UP, same)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes that a copy reads and writes in a second."""
    count = 1 << 30 if device.type == "cuda" else 1 << 24
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    rounds = 10
    seconds = timed(device, lambda: [target.copy_(source) for _ in range(rounds)])
    return 2 * count * rounds / seconds


def decode_quantized(report: Report) -> None:
    """A step with matrices of 8 and 4 bits, and the change of the results."""
    own, device = SIZES[report.size], report.device
    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(1, PROMPT, own.decoder.width, generator=generator, device=device)
    states = states.to(BF16)
    ids = torch.tensor(prompts(1), device=device)
    expected = outputs(make_decoder(own, device, BF16), ids, states)
    for kind, limit in CLOSE.items():
        decoder = make_decoder(own, device, BF16)
        decoder.model.layers.to("cpu")  # bitsandbytes packs weights on their way to the device
        quantize_layers(decoder, kind, BF16)
        decoder.to(device)
        if device.type == "cuda":
            report.add(f"{kind} memory", torch.cuda.memory_allocated(device) / 1e9, "GB")
        found = outputs(decoder, ids, states)
        logits, block = (
            float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)
        )
        report.add(f"{kind} change of the logits", logits)
        report.check(f"{kind} feed-forward block is close", block < limit, block)
        engine = Engine(decoder, tiny_vocabulary(), own.vqgan.codes_per_image, fuse=True)
        seconds, _ = time_steps(engine, 1, 16 if device.type == "cuda" else 2)
        report.add(f"{kind} step at batch 1", 1000 * seconds, "ms")
        del decoder, engine


@torch.inference_mode()
def outputs(decoder: Any, ids: torch.Tensor, states: torch.Tensor) -> list[torch.Tensor]:
    """Logits of ids, and the output of the first feed-forward block for states, in float32."""
    logits = decoder(input_ids=ids, use_cache=False).logits
    return [logits.float(), decoder.model.layers[0].mlp(states).float()]


# --- generated images -----------------------------------------------------------------------------


def generate_images(report: Report) -> None:
    """Seconds of one guided image, and of eight at the same time."""
    engine, codes = make_engine(report), SIZES[report.size].vqgan.codes_per_image
    report.add("codes per image", codes)
    options = image_options(codes)
    one = Request(prompts(1)[0], options)
    first = engine.generate([one])  # warm-up, with the capture of the graphs
    again: list[GenerationOutput] = []
    seconds = timed(report.device, lambda: again.extend(engine.generate([one])))
    report.add("guided image at batch 1", seconds, "s", at_most=5.6)
    report.check("the same image again", again[0].ids == first[0].ids)
    complete = len([i for i in again[0].ids if i in tiny_vocabulary().image_codes]) == codes
    report.check("the image is complete", complete)
    several = [Request(p, options, i) for i, p in enumerate(prompts(8))]
    images: list[GenerationOutput] = []
    seconds = timed(report.device, lambda: images.extend(engine.generate(several)))
    report.add("guided images at batch 8", seconds, "s")
    report.add("guided images at batch 8, each", seconds / 8, "s")
    report.check("all images end", all(i.finish_reason == "stop" for i in images))
    for draws in SPECULATION:
        engine.set_speculation(draws)
        engine.generate([one])  # warm-up
        found: list[GenerationOutput] = []
        seconds = timed(report.device, lambda: found.extend(engine.generate([one])))  # noqa: B023
        report.add(f"guided image with {draws} draws in a pass", seconds, "s")
        equal = shared_prefix_length(found[0].ids, first[0].ids)
        report.add(f"codes equal to those without speculation, {draws} draws", equal)


def image_options(codes: int) -> GenerationOptions:
    return GenerationOptions(mode="image", max_images=1, max_new_tokens=codes + 2)


# --- faults ---------------------------------------------------------------------------------------


def provoke_faults(report: Report) -> None:
    """Memory that runs out ends one request; streams and threads do not change results."""
    check_out_of_memory(report)
    check_streams(report)
    try:
        resolve_device("cuda:99")
        report.check("a GPU that does not exist is refused in one line", False)
    except UserError as error:
        refused = "\n" not in str(error)
        report.check("a GPU that does not exist is refused in one line", refused, str(error))


def check_out_of_memory(report: Report) -> None:
    engine, device = make_engine(report), report.device
    short = Request(prompts(1)[0], greedy(24))
    expected = engine.generate([short])[0].ids
    long_prompt = prompts(1, engine.max_seq_len - 32)[0]
    running = engine.submit(short)
    for _ in range(4):
        engine.step()
    with no_memory(device):
        failing = engine.submit(Request(long_prompt, greedy(8), 1))
        failed = finish(engine, failing)
    report.check("the request without memory ends", failed.finish_reason == "error", failed.error)
    survivor = finish(engine, running)
    report.check("the other request continues", survivor.ids == expected)
    again = engine.generate([short])[0]
    long = engine.generate([Request(long_prompt, greedy(8), 1)])[0]
    report.check("requests work afterwards", again.ids == expected and long.error is None)


def finish(engine: Engine, ticket: int) -> GenerationOutput:
    """Runs the engine until a request ends."""
    while True:
        for step in engine.poll(ticket):
            if step.token is None:
                return step.output
        engine.step()


@contextlib.contextmanager
def no_memory(device: torch.device) -> Iterator[None]:
    """The device has half a gigabyte left for this process; a CPU's cache cannot grow."""
    if device.type != "cuda":
        error = torch.OutOfMemoryError("simulated")
        with patch("medley.generation.kv_cache._resize", side_effect=error):
            yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    limit = (torch.cuda.memory_reserved(device) + 5e8) / total
    torch.cuda.set_per_process_memory_fraction(limit, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def check_streams(report: Report) -> None:
    """An image on a second stream, and two models in two threads, against one after another."""
    device = report.device
    codes = SIZES["tiny"].vqgan.codes_per_image
    request = Request(prompts(1)[0], image_options(codes))
    engines = [make_engine(report, "tiny", seed) for seed in (0, 1)]
    expected = [engine.generate([request])[0].ids for engine in engines]
    stream: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if device.type == "cuda":
        synchronize(device)
        stream = torch.cuda.stream(torch.cuda.Stream(device))
    with stream:
        found = make_engine(report, "tiny").generate([request])[0].ids
    report.check("the same image on a second stream", found == expected[0])
    results = in_threads([lambda e=engine: e.generate([request])[0].ids for engine in engines])
    report.check("the same images in two threads", results == expected)


def in_threads(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(functions)

    def run(index: int) -> None:
        results[index] = functions[index]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
