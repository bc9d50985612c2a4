"""Captured decode steps, played through without a GPU: devices, streams, size classes, budgets."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from device_checks import META, Operations
from torch import Tensor

import medley
import medley.generation.cuda_graph as cuda_graph
from medley.checkpoints.checkpoint import open_checkpoint
from medley.generation import Engine, GenerationOptions, Request
from medley.generation.cuda_graph import (
    MAX_GRAPHS,
    CapturedStep,
    GraphCache,
    GraphedForward,
    GraphedImageSteps,
    can_use_graph,
    decode_at,
    length_class,
    size_class,
)
from medley.generation.fused_decode import FusedDecoder
from medley.generation.grammar import TokenMasks
from medley.generation.kv_cache import LENGTH_STEP, KeyValueCache
from medley.generation.model_runner import ModelRunner
from medley.generation.packed_linear import PackedLinear
from medley.inference.model import Model

# --- a GPU of stubs -----------------------------------------------------------------------------


class FakeCuda:
    """CUDA's rules for streams and captures, for kernels that are Python functions.

    A kernel runs on the device of its tensors, on the current stream of that device. A capture
    records kernels of its own stream only; a stream belongs to one device.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.streams: dict[int, Any] = {}
        self.capturing: tuple[Any, Any] | None = None  # graph and stream
        self.made: list[Any] = []
        fake = self

        class Stream:
            def __init__(self, device: Any = None) -> None:
                self.device = fake.current if device is None else torch.device(device).index or 0
                fake.made.append(self)

            def wait_stream(self, other: Any) -> None:
                assert isinstance(other, Stream)

        class Graph:
            def __init__(self) -> None:
                self.kernels: list[Callable[[], None]] = []

            def replay(self) -> None:
                for kernel in self.kernels:
                    kernel()

        self.defaults = {index: Stream(torch.device("cuda", index)) for index in (0, 1)}

        @contextlib.contextmanager
        def on_device(device: Any) -> Iterator[None]:
            before, fake.current = fake.current, torch.device(device).index or 0
            yield
            fake.current = before

        @contextlib.contextmanager
        def on_stream(stream: Any) -> Iterator[None]:
            before = fake.stream_of(stream.device)
            fake.streams[stream.device] = stream
            yield
            fake.streams[stream.device] = before

        shared = Stream()  # torch's default for captures, of the device that was first
        self.made.clear()

        @contextlib.contextmanager
        def capture(
            graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
        ) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            stream = stream or shared
            fake.capturing = graph, stream
            with on_stream(stream):
                yield
            fake.capturing = None

        for name, value in (
            ("Stream", Stream), ("CUDAGraph", Graph), ("device", on_device), ("stream", on_stream),
            ("graph", capture), ("graph_pool_handle", lambda: "pool"),
            ("current_stream", lambda *_: fake.stream_of(fake.current)),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        cuda_graph._capture_stream.cache_clear()

    def stream_of(self, device: int) -> Any:
        return self.streams.get(device, self.defaults[device])

    def launch(self, device: int, kernel: Callable[[], None]) -> None:
        if self.capturing is not None and self.capturing[1] is self.stream_of(device):
            self.capturing[0].kernels.append(kernel)  # recorded, and not run
        else:
            kernel()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    yield FakeCuda(monkeypatch)
    cuda_graph._capture_stream.cache_clear()


@pytest.mark.parametrize("index", [0, 1])
def test_steps_on_any_gpu_are_captured_once_and_replayed(cuda: FakeCuda, index: int) -> None:
    ran = []
    devices = []

    def step() -> None:
        devices.append(cuda.current)
        cuda.launch(index, lambda: ran.append(len(ran)))

    device = torch.device("cuda", index)
    captured = CapturedStep(device)
    for _ in range(5):
        captured(step)
    assert ran == [0, 1, 2, 3, 4]  # each call runs the kernel once
    assert devices == [index, index]  # eagerly, then for the capture
    assert cuda.current == 0
    CapturedStep(device)(step)
    assert len(cuda.made) == 1  # one stream, and so one cuBLAS workspace, for all graphs


def test_a_capture_leaves_other_gpus_alone(cuda: FakeCuda) -> None:
    counts = [0, 0]

    def count(index: int) -> None:
        counts[index] += 1

    steps = [CapturedStep(torch.device("cuda", index)) for index in (0, 1)]
    for _ in range(4):
        for index, captured in enumerate(steps):
            captured(lambda i=index: cuda.launch(i, lambda: count(i)))  # type: ignore[misc]
    assert counts == [4, 4]


def test_steps_are_freed_at_once(model: Model) -> None:
    """The memory of a GPU's graph must not wait for the garbage collector."""
    cache = model.engine.runner.cache
    fused = model.engine.runner.fused
    assert fused is not None
    gc.disable()
    try:
        step = GraphedForward(fused, cache, torch.device("cpu"), 1, 1, 256, None)
        dead = weakref.ref(step)
        del step
        assert dead() is None
    finally:
        gc.enable()


# --- when there is a graph ----------------------------------------------------------------------


def test_decoders_of_every_layout_use_a_graph_on_cuda(layout: Any) -> None:
    decoder = open_checkpoint(layout / "input").decoder()
    assert can_use_graph(decoder, torch.device("cuda"))
    assert can_use_graph(decoder, torch.device("cuda", 1))
    assert not can_use_graph(decoder, torch.device("cpu"))
    decoder.lm_head._hf_hook = object()  # accelerate keeps the head on another device
    assert not can_use_graph(decoder, torch.device("cuda"))


@pytest.mark.parametrize("fuse", [True, False])
def test_a_model_runner_on_cuda_uses_the_graph(monkeypatch: pytest.MonkeyPatch, fuse: bool) -> None:
    decoder = open_checkpoint("tiny").decoder(torch.float32)
    vocabulary = open_checkpoint("tiny").text_tokenizer().vocabulary
    monkeypatch.setattr("medley.generation.model_runner.KeyValueCache", lambda *_: None)
    masks = TokenMasks(vocabulary, decoder.config.vocab_size, torch.device("cuda"))
    assert ModelRunner(decoder, masks, fuse, 2).use_cuda_graph == fuse


# --- size classes -------------------------------------------------------------------------------


def test_size_classes_are_few_and_waste_at_most_a_third() -> None:
    sizes = range(1, 97)
    classes = [size_class(size, 1000) for size in sizes]
    assert all(
        size <= found <= max(size, size * 1.5) for size, found in zip(sizes, classes, strict=True)
    )
    assert len(set(classes)) == 13
    assert size_class(7, 7) == 7  # not more than there are
    lengths = [length_class(length, 4096) for length in range(1, 4097)]
    assert len(set(lengths)) == 8
    assert set(lengths) <= set(range(LENGTH_STEP, 4097, LENGTH_STEP))


def test_graphs_are_kept_by_size_and_dropped_with_the_cache() -> None:
    graphs = GraphCache(torch.device("cpu"))
    made: list[int] = []

    def get(allocations: int, key: int) -> int:
        def make(pool: Any) -> int:
            made.append(key)
            return len(made)

        return graphs.get(allocations, key, make)

    assert get(0, 1) == get(0, 1) == 1
    assert get(0, 2) == 2
    assert get(1, 1) == 3  # the cache was reallocated
    for key in range(MAX_GRAPHS + 1):
        get(1, key)
        get(1, 0)  # used all the time
    assert made.count(0) == 1
    made.clear()
    get(1, 1)  # the one that was unused for the longest time
    assert made == [1]


@pytest.fixture(scope="module")
def model() -> Model:
    return medley.load("tiny", device="cpu")


def test_text_and_images_by_graph_equal_single_steps(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in text and in images that join and leave: other graphs, the same tokens."""
    decoder = open_checkpoint("tiny").decoder(torch.float32)
    options = [
        GenerationOptions(mode="text", max_new_tokens=40, text_greedy=True),
        GenerationOptions(min_images=1, max_images=1, max_new_tokens=150, seed=4),
        GenerationOptions(mode="image", image_greedy=True),
        GenerationOptions(mode="text", max_new_tokens=30, seed=3),
    ]
    texts = [f"Show me a {m} scan of the {o}." for m, o in (("CT", "head"), ("MR", "chest"))]
    known = [model.encode_prompt([text]) for text in texts]
    requests = [Request(known[i % 2], o, i) for i, o in enumerate(options * 2)]
    made: list[Any] = []

    def record(kind: Any) -> Callable[..., Any]:
        def make(*args: Any) -> Any:
            made.append(kind)
            return kind(*args)

        return make

    for kind in (GraphedForward, GraphedImageSteps):
        name = f"medley.generation.model_runner.{kind.__name__}"
        monkeypatch.setattr(name, record(kind))
    outputs = []
    for use_cuda_graph, speculation in ((False, "off"), (True, "off"), (True, 8)):
        engine = Engine(
            decoder, model.vocabulary, model.engine.scheduler.codes_per_image, fuse=True
        )
        engine.set_speculation(speculation)  # type: ignore[arg-type]
        engine.runner.use_cuda_graph = use_cuda_graph
        outputs.append([o.ids for o in engine.generate(requests, batch_size=3)])
        assert engine.runner.cache.num_slots == 0
    assert outputs[0] == outputs[1] == outputs[2]
    assert set(made) == {GraphedForward, GraphedImageSteps}
    assert len(made) <= MAX_GRAPHS


# --- one device, no host read, a budget of operations -------------------------------------------


@pytest.fixture
def on_meta() -> tuple[FusedDecoder, KeyValueCache, Any]:
    decoder = open_checkpoint("tiny").decoder(torch.bfloat16).to(META)
    cache = KeyValueCache(decoder.config, torch.bfloat16, META, 8)
    for _ in range(6):
        cache.add_slot()
    cache.reserve(512)
    return FusedDecoder(decoder), cache, decoder


@pytest.mark.parametrize("length", [256, 512])
def test_a_decode_step_stays_on_the_device_within_its_budget(
    on_meta: tuple[FusedDecoder, KeyValueCache, Any], length: int
) -> None:
    fused, cache, decoder = on_meta
    tokens, positions = torch.zeros(2, 6, dtype=torch.int64, device=META)
    with torch.inference_mode(), Operations() as operations:
        states = decode_at(fused, cache, tokens, positions, length)
    layers = decoder.config.num_hidden_layers
    assert states.shape == (6, decoder.config.hidden_size)
    assert operations.total <= 19 * layers + 20
    # The mask becomes numbers once, not in each layer.
    assert operations.counts["masked_fill_"] == 1
    assert operations.counts["where"] == 0


def test_steps_inside_of_images_stay_on_the_device_within_their_budget(
    on_meta: tuple[FusedDecoder, KeyValueCache, Any],
) -> None:
    fused, cache, decoder = on_meta
    head = PackedLinear(decoder.lm_head.weight[4:516], pack=False)
    steps = GraphedImageSteps(fused, cache, head, 4, 6, 2, 512, 32, None)
    with torch.inference_mode(), Operations() as operations:
        steps._decode()
    assert operations.total <= 19 * decoder.config.num_hidden_layers + 90


def test_prefill_stays_on_the_device_within_its_budget() -> None:
    decoder = open_checkpoint("tiny").decoder(torch.bfloat16).to(META)
    vocabulary = open_checkpoint("tiny").text_tokenizer().vocabulary
    masks = TokenMasks(vocabulary, decoder.config.vocab_size, META)
    runner = ModelRunner(decoder, masks, True, 2)
    branches = [runner._add_branch() for _ in range(2)]
    with torch.inference_mode(), Operations() as operations:
        states = runner._prefill_contexts(branches, [[0, 8720, 8730], [0, 8720]], [0, 0])
    assert states.shape == (2, decoder.config.hidden_size)
    assert operations.total <= 60 * decoder.config.num_hidden_layers + 40


def test_a_token_costs_one_host_read(model: Model) -> None:
    """Rows in text, greedy and sampled, and rows in images: one read for all of them."""
    options = [
        GenerationOptions(mode="text", text_greedy=True),
        GenerationOptions(mode="text", text_temperature=0.9, repetition_penalty=1.0),
        GenerationOptions(mode="image", guidance_scale_text=2.0, image_greedy=True),
        GenerationOptions(mode="image", guidance_scale_text=1.0, guidance_scale_image=1.0),
    ]
    prompt = model.encode_prompt(["Show me a CT scan of the head."])
    engine = model.engine
    for index, option in enumerate(options):
        engine.submit(Request(prompt, option, index))
    for _ in range(3):
        engine.step()
    reads = 0

    class Reads(Operations):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal reads
            reads += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero")
            return func(*args, **(kwargs or {}))

    lists = 0
    to_list = Tensor.tolist

    def count(self: Tensor) -> Any:
        nonlocal lists
        lists += 1
        return to_list(self)

    with pytest.MonkeyPatch.context() as patch, Reads():
        patch.setattr(Tensor, "tolist", count)
        engine.step()
    for ticket in range(1, 50):
        engine.cancel(ticket)
    assert (lists, reads) == (1, 0)
