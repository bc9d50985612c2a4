"""The choice of the attention kernel on machines with CUDA, played through without a GPU."""

from __future__ import annotations

import importlib.util
import inspect
import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medley.checkpoints.checkpoint import open_checkpoint
from medley.errors import UserError
from medley.modeling import attention
from medley.modeling.attention import Documents, set_attention, unavailable_reason


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch reports a GPU; what runs on it runs on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device = torch.device
    monkeypatch.setattr(torch, "device", lambda *a: device("cpu") if "cuda" in a else device(*a))
    hide(monkeypatch, "xformers")
    return monkeypatch


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Makes modules appear as not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in modules else find_spec(name)
    )


def varlen_by_sdpa(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, starts_k: Tensor,
    longest: int, longest_k: int, *, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """torch's `varlen_attn` for states (N, H, K), by one call of sdpa for each document."""
    assert starts.dtype == starts_k.dtype == torch.int32
    assert window_size == (-1, 0)
    bounds = starts.tolist()
    assert max(b - a for a, b in pairwise(bounds)) == longest == longest_k
    parts = []
    for a, b in pairwise(bounds):
        q, k, v = (t[a:b].transpose(0, 1) for t in (query, key, value))
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        parts.append(output.transpose(0, 1))
    return torch.cat(parts)


def old_varlen(query: Tensor, *args: Any, is_causal: bool = False) -> Tensor:
    """As in torch 2.10, without `scale` and `window_size`."""
    return query


def unsupported(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nTrace")


def nonfinite(query: Tensor, *_: Any, **__: Any) -> Tensor:
    return query * math.nan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_training_start_gets_a_kernel(
    cuda: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    cuda.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_sdpa)
    decoder = open_checkpoint("tiny").decoder(torch.float32)
    assert set_attention(decoder, "auto", dtype) == "flash"
    assert set_attention(decoder, "flash", dtype) == "flash"
    assert set_attention(decoder, "sdpa", dtype) == "sdpa"
    assert set_attention(decoder, "flex", dtype) == "flex"


def test_transformers_accepts_the_name_of_every_kernel() -> None:
    decoder = open_checkpoint("tiny").decoder(torch.float32)
    for name in attention._NAMES.values():
        decoder.set_attn_implementation(name)
        assert decoder.config._attn_implementation == name


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (old_varlen, "TypeError: .*scale"),
        (unsupported, "only supports Ampere"),
        (nonfinite, "NaN or infinite"),
    ],
)
def test_a_kernel_that_fails_its_trial_is_passed_over_with_a_warning(
    cuda: pytest.MonkeyPatch, kernel: Any, reason: str
) -> None:
    cuda.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    decoder = open_checkpoint("tiny").decoder(torch.float32)
    with pytest.warns(UserWarning, match=f"flash is not used. A trial on 16 tokens.*{reason}"):
        assert set_attention(decoder, "auto", torch.bfloat16) == "sdpa"
    with pytest.raises(UserError, match=f"--attention flash: A trial.*{reason}") as caught:
        set_attention(decoder, "flash", torch.bfloat16)
    message = str(caught.value)
    assert "Install torch 2.11" in message
    assert "sdpa, flex" in message
    assert "\n" not in message


def test_a_kernel_that_is_not_installed_names_what_to_install(cuda: pytest.MonkeyPatch) -> None:
    hide(cuda, "xformers", "torch.nn.attention.varlen")
    decoder = open_checkpoint("tiny").decoder(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set_attention(decoder, "auto", torch.bfloat16) == "sdpa"
    for name, package in (("flash", "torch 2.11"), ("xformers", "release of xformers")):
        with pytest.raises(UserError, match=f"{name}.* is not installed. Install .*{package}"):
            set_attention(decoder, name, torch.bfloat16)  # type: ignore[arg-type]
    for name in ("flash", "xformers"):
        reason = unavailable_reason(name, torch.float32)
        assert reason is not None
        assert "--bf16 or --fp16" in reason


def test_the_flash_kernel_equals_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_sdpa)
    torch.manual_seed(0)
    documents = Documents.of(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    query, key, value = torch.randn(3, 1, 4, 10, 8)
    for scale in (None, 0.3):
        expected = attention._sdpa(query, key, value, documents, scale)
        assert torch.allclose(
            attention._flash(query, key, value, documents, scale), expected, atol=1e-6
        )


def test_torchs_kernel_has_the_parameters_of_the_stub() -> None:
    """The flash kernel is called with parameters that this torch has."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    parameters = inspect.signature(varlen.varlen_attn).parameters
    assert {"scale", "window_size"} <= set(parameters)


def test_flash_runs_on_the_meta_device() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    assert varlen is not None
    documents = Documents((9, 7), torch.tensor([0, 9, 16], dtype=torch.int32, device="meta"))
    states = torch.empty(3, 1, 4, 16, 64, dtype=torch.bfloat16, device="meta")
    output = attention._flash(states[0], states[1], states[2], documents, None)
    assert output.shape == states[0].shape
    assert output.device.type == "meta"
