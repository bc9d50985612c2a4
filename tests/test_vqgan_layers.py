"""Medley's layers against torch's in double precision."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medley.vqgan.group_norm import norm, norm_swish
from medley.vqgan.winograd import Conv3x3


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # Winograd runs on one thread only
    yield
    torch.set_num_threads(before)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("offset", [0.0, 30.0, -1000.0])
def test_group_norm_is_accurate_for_large_offsets(offset: float) -> None:
    torch.manual_seed(0)
    layer = nn.GroupNorm(32, 64, eps=1e-6)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = channels_last(torch.randn(2, 64, 70, 66) + offset)
    with torch.no_grad():
        expected = copy.deepcopy(layer).double()(x.double())
        # The input has the rounding error of one float32 number.
        tolerance = 2e-6 + abs(offset) * 1e-6
        assert (norm(x, layer) - expected).abs().max() < tolerance
        swished = expected * torch.sigmoid(expected)
        assert (norm_swish(x, layer) - swished).abs().max() < 2 * tolerance
        assert norm_swish(x, layer).is_contiguous(memory_format=torch.channels_last)
        half = norm_swish(x.bfloat16(), layer.bfloat16())
        assert half.dtype == torch.bfloat16


def test_layers_with_gradients_are_torchs() -> None:
    layer, x = nn.GroupNorm(32, 32), channels_last(torch.randn(1, 32, 4, 4))
    assert torch.equal(norm(x, layer), layer(x))
    convolution = Conv3x3(32, 8)
    convolution.freeze()
    reference = nn.functional.conv2d(x, convolution.weight, convolution.bias, padding=1)
    assert torch.equal(convolution(x), reference)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([3, 8, 32]),
    batch=st.integers(1, 2),
)
def test_winograd_equals_the_convolution_at_all_sizes(
    height: int, width: int, channels: int, batch: int
) -> None:
    torch.manual_seed(height * 41 + width)
    convolution = Conv3x3(channels, 16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = channels_last(torch.randn(batch, channels, height, width))
    exact = copy.deepcopy(convolution).double()(x.double())
    convolution.freeze()
    with torch.no_grad():
        got = convolution(x)
    assert got.shape == exact.shape
    assert (got - exact).abs().max() < 5e-6


def test_freeze_updates_the_transformed_weights() -> None:
    convolution, x = Conv3x3(8, 8), channels_last(torch.randn(1, 8, 6, 6))
    convolution.freeze()
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.freeze()
        assert torch.allclose(convolution(x), convolution.bias.view(1, -1, 1, 1).expand(1, 8, 6, 6))
