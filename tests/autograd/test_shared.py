"""Codes that several linear layers share, and the maxima that a norm or an activation function finds for them."""

from __future__ import annotations

import gc

import pytest
import torch

from coat_kernels.autograd import shared
from coat_kernels.autograd.activation import gated, gelu, swiglu
from coat_kernels.autograd.norm import layer_norm, rms_norm
from coat_kernels.ops import fp8_gemm

PRODUCERS = {
    "layer_norm": lambda x: layer_norm(x, group_size=32),
    "rms_norm": rms_norm,
    "gelu": lambda x: gelu(x, "tanh"),
    "swiglu": lambda x: swiglu(x, x + 1),
    "gated": lambda x: gated(x, "gelu", gate_first=False, fmt="none"),
}


@pytest.fixture
def x():
    return torch.randn(4, 9, 200, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16).requires_grad_()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_codes_from_the_producers_maxima_are_those_of_two_passes(monkeypatch, x, producer, per_row):
    monkeypatch.setattr(fp8_gemm, "gemm_mode", lambda device: "fp8")
    y = PRODUCERS[producer](x)
    assert y in shared._AMAX
    monkeypatch.setattr(shared, "quantize", None)  # the pass over y that finds the maxima is not needed
    codes, scale = shared.shared_codes(y, per_row)
    assert shared.shared_codes(y, per_row)[0] is codes
    expected, expected_scale, _ = torch.ops.coat_kernels.quantize_tensor(y.detach(), "e4m3", 128, per_row)
    assert torch.equal(codes, expected.view(codes.shape))
    assert torch.equal(scale, expected_scale.view(scale.shape))


def test_without_fp8_products_nobody_looks_for_maxima(x):
    assert gelu(x) not in shared._AMAX


def test_maxima_of_a_tensor_changed_in_place_are_not_used(monkeypatch, x):
    monkeypatch.setattr(fp8_gemm, "gemm_mode", lambda device: "fp8")
    y = gelu(x)
    with torch.no_grad():
        y.mul_(1000)
    _, scale = shared.shared_codes(y, False)
    _, expected, _ = torch.ops.coat_kernels.quantize_tensor(y.detach(), "e4m3", 128, False)
    assert torch.equal(scale, expected)


def test_entries_go_with_the_tensor(monkeypatch, x):
    monkeypatch.setattr(fp8_gemm, "gemm_mode", lambda device: "fp8")
    gc.collect()
    before = len(shared._AMAX), len(shared._CODES)
    y = gelu(x)
    shared.shared_codes(y, False)
    del y
    gc.collect()
    assert (len(shared._AMAX), len(shared._CODES)) == before


def test_a_users_buffer_is_encoded_anew(x):
    """It may be refilled without a trace, and it lives long."""
    buffer = x.detach().clone()
    first, _ = shared.shared_codes(buffer, False)
    buffer.data.copy_(x.detach() * -1)
    second, _ = shared.shared_codes(buffer, False)
    assert not torch.equal(first, second)
    assert buffer not in shared._CODES
