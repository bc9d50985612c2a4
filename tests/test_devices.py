"""Devices that users name, layers on several GPUs, adapters and quantization at load."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import medley
from medley.checkpoints.checkpoint import open_checkpoint
from medley.commands.tokenize_images import TokenizeImagesOptions, tokenize_images
from medley.errors import UserError
from medley.generation.kv_cache import bytes_per_token
from medley.generation.model_runner import BRANCHES
from medley.inference.devices import balanced_map, describe_device, resolve_device
from medley.inference.memory import MemoryEstimate
from medley.modeling import quantization
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.trainer.parameters import trainable_model
from medley.vqgan import VQGAN, VQGANConfig
from medley.vqgan.losses import CodebookAverage, training_step

GB = 10**9


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


# --- names --------------------------------------------------------------------------------------

TOO_OLD = RuntimeError(
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU\n"
    "driver by downloading and installing a new version from the URL: http://..."
)
NO_DRIVER = RuntimeError("Found no NVIDIA driver on your system. Please check that you have one.")


@pytest.mark.parametrize(
    ("built_for", "count", "problem", "name", "message"),
    [
        (None, 0, None, "cuda", "built without it. Install a torch with CUDA"),
        ("13.0", 0, NO_DRIVER, "cuda:0", "Found no NVIDIA driver on your system. Update the"),
        ("13.0", 0, TOO_OLD, "cuda", r"driver .* too old \(found version 11040\). Update the"),
        ("13.0", 0, None, "cuda", "no GPU was found"),
        ("13.0", 2, None, "cuda:2", "does not exist .expected cuda:0 to cuda:1"),
        ("13.0", 1, None, "cuda:7", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, count: int,
    problem: Exception | None, name: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "init", raising(problem) if problem else lambda: None)
    with pytest.raises(UserError, match=f"--device {name}: .*{message}") as caught:
        resolve_device(name)
    assert "\n" not in str(caught.value)


def test_devices_that_exist_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert describe_device(torch.device("cuda", 1)) == "GPU 1"
    for name in ("gpu", "cuda:x", "cudax", "xpu", ""):
        with pytest.raises(UserError, match=f"--device {name}: Unknown device"):
            resolve_device(name)


@pytest.mark.parametrize(
    ("free_gb", "fits", "too_large"),
    [
        (15, ["bfloat16", "8bit", "4bit"], []),
        (10, ["8bit", "4bit"], ["bfloat16"]),
        (6, ["4bit"], ["bfloat16", "8bit"]),
        (1, [], ["bfloat16", "8bit", "4bit"]),
    ],
)
def test_a_card_that_is_too_small_is_told_what_fits(
    free_gb: int, fits: list[str], too_large: list[str]
) -> None:
    config = seven_billion()
    device = torch.device("cuda", 0)
    estimate = MemoryEstimate.of(config, torch.float32, None, device)
    smaller = MemoryEstimate.smaller(config, torch.float32, None, device)
    with pytest.raises(UserError, match=rf"need 2\d\.\d GB, cuda:0 has {free_gb}.0 GB") as caught:
        estimate.check(free_gb * GB, device, smaller)
    message = str(caught.value)
    assert "\n" not in message
    for name in fits:
        assert f"{name} (" in message
    for name in too_large:
        assert f"{name} (" not in message
    if not fits:
        assert "4bit needs" in message
        assert "auto_map" in message


# --- several GPUs -------------------------------------------------------------------------------


def seven_billion() -> transformers.ChameleonConfig:
    config = open_checkpoint("tiny").config()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 4096, 11008, 32
    config.num_attention_heads = config.num_key_value_heads = 32
    config.vocab_size = 65536
    return config


@pytest.mark.parametrize(
    ("gpus", "gpu_gb"), [(1, 79), (2, 79), (2, 12), (4, 24), (8, 79)], ids=lambda v: str(v)
)
def test_layers_are_spread_evenly_with_room_for_the_cache(gpus: int, gpu_gb: int) -> None:
    config = seven_billion()
    with torch.device("meta"):
        decoder = ChameleonForConditionalGeneration(config).to(torch.bfloat16)
    per_token = bytes_per_token(config, torch.bfloat16)
    cache = BRANCHES * config.max_position_embeddings * per_token
    memory: dict[int | str, int] = {**dict.fromkeys(range(gpus), gpu_gb * GB), "cpu": 200 * GB}
    devices = balanced_map(decoder, memory, cache)
    used: dict[int | str, int] = dict.fromkeys(memory, 0)
    for name, parameter in decoder.named_parameters():
        place = next(
            d
            for part, d in devices.items()
            if name == part or part == "" or name.startswith(f"{part}.")
        )
        used[place] += parameter.nbytes
    total = sum(used.values())
    assert used["cpu"] == 0
    for gpu in range(gpus):
        assert used[gpu] + cache // gpus <= gpu_gb * GB
        assert 0 < used[gpu] < 1.6 * total / gpus


def test_what_does_not_fit_beside_the_cache_goes_to_the_cpu() -> None:
    config = seven_billion()
    with torch.device("meta"):
        decoder = ChameleonForConditionalGeneration(config).to(torch.bfloat16)
    devices = balanced_map(decoder, {0: 8 * GB, 1: 8 * GB, "cpu": 200 * GB}, 6 * GB)
    assert set(devices.values()) == {0, 1, "cpu"}


# --- adapters and quantization ------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = open_checkpoint("tiny")
    torch.manual_seed(0)
    trained = trainable_model(
        base.decoder(torch.float32), "lora", base.text_tokenizer().vocabulary, "tiny",
        rank=2, alpha=4, dropout=0.0, targets=["q_proj", "down_proj"],
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    trained.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_at_load_as_exactly_as_it_is_applied(
    adapter: Path, dtype: str
) -> None:
    from medley.checkpoints.adapter import load_adapter

    ids = torch.tensor([[0, 8720, 8730, 8710, 8740]])
    with torch.inference_mode():
        exact = load_adapter(open_checkpoint("tiny").decoder(torch.float32), adapter)
        expected = exact(input_ids=ids).logits
        applied = load_adapter(open_checkpoint("tiny").decoder(getattr(torch, dtype)), adapter)
        rounding = (applied(input_ids=ids).logits - expected).pow(2).mean().sqrt()
        model = medley.load(adapter, device="cpu", dtype=dtype)
        found = (model.decoder(input_ids=ids).logits - expected).pow(2).mean().sqrt()
    assert model.engine.runner.fused is not None
    assert float(found) < max(1e-4, 1.3 * float(rounding))
    base = open_checkpoint("tiny").decoder(torch.float32)(input_ids=ids).logits
    assert not torch.allclose(expected, base, atol=1e-3)


def test_an_adapter_of_tied_matrices_stays_unmerged() -> None:
    from medley.inference.loading import merge_adapter

    decoder = open_checkpoint("tiny").decoder(torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    decoder.config.tie_word_embeddings = True
    adapted = peft.get_peft_model(decoder, config)
    assert merge_adapter(adapted) is adapted


def test_8_bit_layers_keep_outliers() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = medley.load("tiny", device="cpu", quantize="8bit")
    layers = [m for m in model.decoder.modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)]
    assert layers
    assert {layer.state.threshold for layer in layers} == {6.0}


def test_a_missing_library_is_reported_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = open_checkpoint("tiny")
    monkeypatch.setattr(type(checkpoint), "decoder", raising(AssertionError("weights were read")))
    monkeypatch.setattr(
        quantization, "require_extra", lambda *_: (_ for _ in ()).throw(UserError("not installed"))
    )
    for kind in ("8bit", "4bit"):
        with pytest.raises(UserError, match="not installed"):
            medley.load("tiny", device="cpu", quantize=kind)


# --- records ------------------------------------------------------------------------------------


def tokenize(folder: Path, images: Path, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenize_images(
            TokenizeImagesOptions(input=images, output=folder, ckpt="tiny", device="cpu", **options)
        )
    return [str(w.message) for w in caught if "another device" in str(w.message)]


@pytest.mark.parametrize(("dtype", "effect"), [("float32", "float64"), ("bfloat16", "Use one dev")])
def test_resuming_on_another_device_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, effect: str
) -> None:
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for index in range(2):
        Image.new("RGB", (70, 64), (index * 90, 50, 20)).save(images / f"{index}.png")
    output = tmp_path / "codes"
    assert tokenize(output, images, dtype=dtype) == []
    assert tokenize(output, images, dtype=dtype) == []
    monkeypatch.setattr(
        "medley.commands.tokenize_images.describe_device", lambda device: "Some GPU"
    )
    (message,) = tokenize(output, images, dtype=dtype)
    assert "was cpu, now Some GPU" in message
    assert effect in message


# --- training a VQGAN ---------------------------------------------------------------------------


def test_a_new_vqgan_trains_on_one_device() -> None:
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig(32, (1, 2), 1, 16, 8, 8, 64))
    pixels = torch.empty(2, 3, 16, 16, device="meta")
    generator = torch.Generator().manual_seed(0)
    step = training_step(vqgan, pixels, quantize=True, commitment=0.25)
    average = CodebookAverage.start(vqgan, step.latents, 64, generator)
    for tensor in (step.loss, step.codes, step.latents, average.count, average.total):
        assert tensor.device.type == "meta"
    assert training_step(vqgan, pixels, quantize=False, commitment=0.0).codes.device.type == "meta"
