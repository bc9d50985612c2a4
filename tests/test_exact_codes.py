"""float32 image codes are equal on every device: precision settings, near ties, memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device_checks import META, Operations
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import enable_tf32

import medley.vqgan.image_tokenizer as image_tokenizer
from medley.checkpoints.checkpoint import open_checkpoint
from medley.vqgan import VQGAN, VQGANConfig
from medley.vqgan.group_norm import _grouped, norm, norm_swish
from medley.vqgan.image_tokenizer import ImageTokenizer
from medley.vqgan.model import TIE
from medley.vqgan.precision import exact_float32
from medley.vqgan.reference import ReferenceEncoder

CPU = torch.device("cpu")
# The old and the new interface of torch, one after the other.
SETTERS: list[Any] = [torch.set_float32_matmul_precision, lambda _: enable_tf32(True)]
PRODUCTS = [
    *[("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn")],
    *[("mkldnn", "matmul"), ("mkldnn", "conv")],
]


def precisions() -> list[str]:
    return [getattr(getattr(torch.backends, b), p).fp32_precision for b, p in PRODUCTS]


@pytest.fixture(autouse=True)
def default_precisions() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    torch._C._set_cudnn_allow_tf32(True)


@pytest.fixture
def tokenizer() -> ImageTokenizer:
    return open_checkpoint("tiny").image_tokenizer()


def some_pixels(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: enable_tf32(True),
        lambda: [set_precision("high") for set_precision in SETTERS],
        lambda: enable_tf32(False),
    ],
    ids=["default", "medium", "legacy", "transformers", "mixed", "ieee"],
)
def test_encoding_and_decoding_use_exact_float32_whatever_is_set(
    tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch, setting: Any
) -> None:
    pixels = some_pixels(1, tokenizer.size)
    expected = tokenizer.encode_pixels(pixels)
    setting()
    before, seen = precisions(), []
    for module in (tokenizer.vqgan.quant_conv, tokenizer.vqgan.post_quant_conv):
        module.register_forward_pre_hook(lambda *_: seen.append(precisions()))
    assert torch.equal(tokenizer.encode_pixels(pixels), expected)
    tokenizer.decode_pixels(expected)
    assert seen == [["ieee"] * len(PRODUCTS)] * 2
    assert precisions() == before


def test_precision_follows_later_settings_after_the_block() -> None:
    enable_tf32(True)
    with exact_float32(CPU):
        pass
    enable_tf32(False)
    assert precisions()[0] == "ieee"


def test_precision_stays_exact_until_the_last_thread_has_finished() -> None:
    torch.set_float32_matmul_precision("medium")
    before = precisions()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with exact_float32(CPU):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with exact_float32(CPU):
        thread.start()
        assert entered.wait(60)
    assert set(precisions()) == {"ieee"}  # of the other thread
    leave.set()
    thread.join(60)
    assert precisions() == before


def test_autocast_does_not_reach_the_encoder(tokenizer: ImageTokenizer) -> None:
    pixels = some_pixels(4, tokenizer.size)
    expected = tokenizer.encode_pixels(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode_pixels(pixels), expected)


# --- near ties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_recorded_codes_do_not_depend_on_the_number_of_threads(layout: Path, threads: int) -> None:
    expected = load_file(layout / "expected.safetensors")
    tokenizer = ImageTokenizer.from_checkpoint(layout / "input")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(tokenizer.encode_pixels(expected["vq_pixels"]), expected["vq_codes"])
    finally:
        torch.set_num_threads(before)


def with_ties(vqgan: VQGAN, pixels: Tensor) -> None:
    """Changes the codebook so that each position of an image lies between two vectors.

    The distances of their two codes differ by less than float32 can tell.
    """
    reference = ReferenceEncoder(vqgan, CPU)
    with torch.no_grad():
        z = reference._latents(pixels)[0].flatten(1).T  # (N, E)
        offset = torch.zeros_like(z)
        offset[:, 0] = 0.1
        pairs = torch.stack([z + offset, z - offset * (1 + 1e-7)], 1).reshape(-1, z.shape[1])
        vqgan.quantize.embedding.weight[: len(pairs)] = pairs.float()
        vqgan.quantize.embedding.weight[len(pairs) :] = 100.0


@pytest.mark.parametrize("device_type", ["cpu", "accelerator"])
def test_near_ties_are_settled_in_float64(
    monkeypatch: pytest.MonkeyPatch, device_type: str
) -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(32, (1, 2), 1, 16, 8, 8, 256))
    pixels = some_pixels(3, 16)
    with_ties(vqgan, pixels[1:2])
    tokenizer = ImageTokenizer(vqgan)
    reference = ReferenceEncoder(vqgan, CPU)
    expected = reference.codes(pixels)
    if device_type == "accelerator":
        # Kernels with more rounding, as those of a GPU with another order of additions.
        rounding = torch.Generator().manual_seed(2)
        latents = vqgan.latents

        def rounded(given: Tensor) -> Tensor:
            exact = latents(given)
            return exact * (1 + 1e-5 * torch.randn(exact.shape, generator=rounding))

        monkeypatch.setattr(vqgan, "latents", rounded)
        monkeypatch.setattr(ImageTokenizer, "_tie_limit", 1e-3)
    settled: list[int] = []
    codes_of = ReferenceEncoder.codes

    def record(self: ReferenceEncoder, given: Tensor) -> Tensor:
        settled.append(len(given))
        return codes_of(self, given)

    monkeypatch.setattr(ReferenceEncoder, "codes", record)
    assert torch.equal(tokenizer.encode_pixels(pixels), expected)
    # One image at a time: the one with the tie, and with more rounding others too.
    assert 1 <= len(settled) <= (1 if device_type == "cpu" else len(pixels))


def test_the_limit_of_ties_follows_the_rounding_of_a_device(
    tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokenizer._tie_limit == TIE
    latents = tokenizer.vqgan.latents
    with torch.inference_mode():
        assert TIE <= tokenizer._measure_tie_limit() < 3 * TIE
        noise = torch.Generator().manual_seed(0)

        def rounded(pixels: Tensor) -> Tensor:
            exact = latents(pixels)
            return exact * (1 + 1e-4 * torch.randn(exact.shape, generator=noise))

        monkeypatch.setattr(tokenizer.vqgan, "latents", rounded)
        assert tokenizer._measure_tie_limit() > 10 * TIE


# --- another device -----------------------------------------------------------------------------


def on_meta(config: VQGANConfig, dtype: torch.dtype = torch.float32) -> ImageTokenizer:
    tokenizer = ImageTokenizer(VQGAN(config), dtype=dtype)
    tokenizer.vqgan.to(META)
    tokenizer.device = META
    return tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_starts_without_waiting_for_the_device(dtype: torch.dtype) -> None:
    config = VQGANConfig(32, (1, 1, 2), 2, 32, 16, 16, 64, attn_resolutions=(16,))
    tokenizer = on_meta(config, dtype)
    with Operations() as operations:
        result = tokenizer.start_encoding(torch.zeros(3, 32, 32, 3, dtype=torch.uint8))
    convolutions = sum(isinstance(m, nn.Conv2d) for m in tokenizer.vqgan.encoder.modules())
    assert operations.counts["conv2d"] == convolutions + 1  # and quant_conv
    assert operations.total <= 5 * convolutions
    if dtype == torch.bfloat16:
        assert result().device == META


def test_decoding_runs_on_one_device() -> None:
    tokenizer = on_meta(VQGANConfig(32, (1, 1, 2), 2, 32, 16, 16, 64))
    with torch.inference_mode(), Operations() as operations:
        codes = torch.zeros(3, 64, dtype=torch.int64, device=META)
        pixels = torch.cat([tokenizer.vqgan.decode(part) for part in tokenizer._split(codes)])
    assert pixels.shape == (3, 3, 32, 32)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in tokenizer.vqgan.decoder.modules())
    assert operations.counts["conv2d"] == convolutions + 1
    assert operations.total <= 5 * convolutions


def test_norms_keep_the_layout_on_other_devices() -> None:
    """A norm that changes the layout makes the next convolution copy the map."""
    layer = nn.GroupNorm(32, 64, eps=1e-6, device=META)
    x = torch.empty(2, 64, 8, 8, device=META).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), Operations() as operations:
        for function in (norm, norm_swish):
            assert function(x, layer).is_contiguous(memory_format=torch.channels_last)
    assert not {"clone", "contiguous", "group_norm"} & set(operations.counts)
    assert operations.counts["var_mean"] == operations.counts["addcmul"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_group_norm_of_other_devices_is_accurate(
    dtype: torch.dtype, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "medley.vqgan.group_norm._blocked",
        lambda x, layer, swish: (
            nn.functional.silu(_grouped(x, layer)) if swish else _grouped(x, layer)
        ),
    )
    torch.manual_seed(0)
    layer = nn.GroupNorm(32, 64, eps=1e-6).to(dtype)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = (torch.randn(2, 64, 34, 30) + offset).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        double = nn.functional.group_norm(
            x.double(), 32, layer.weight.double(), layer.bias.double(), 1e-6
        )
        found, swished = norm(x, layer), norm_swish(x, layer)
    tolerance = (2e-6 + offset * 1e-6) if dtype == torch.float32 else 0.05
    assert (found - double).abs().max() < tolerance
    assert (swished - double * torch.sigmoid(double)).abs().max() < 2 * tolerance
    for result in (found, swished):
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("free_gb", "resolution", "sizes"),
    [
        (80, 512, [32, 32]),  # 64 images are 2 ** 31 elements: one too many for 32-bit indices
        (24, 512, [22, 21, 21]),
        (1, 512, [1] * 64),
        (0, 512, [1] * 64),
        (80, 64, [64]),
    ],
)
def test_batches_are_split_by_the_memory_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, free_gb: float, resolution: int, sizes: list[int]
) -> None:
    config = VQGANConfig(128, (1, 1, 2, 2, 4), 1, resolution, 32, 8, 64)
    with META:
        vqgan = VQGAN(config)
    monkeypatch.setattr(image_tokenizer, "token_space_fingerprint", lambda vqgan: "")
    tokenizer = ImageTokenizer(vqgan, device=META)
    tokenizer.device = torch.device("cuda", 1)
    asked = []

    def free(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return int(free_gb * 0.75e9), int(80e9)

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(free_gb * 0.35e9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(free_gb * 0.1e9))
    parts = tokenizer._split(torch.empty(64, 1, device=META))
    assert [len(part) for part in parts] == sizes
    assert asked == [tokenizer.device]
