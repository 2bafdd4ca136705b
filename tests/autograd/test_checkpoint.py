"""Checkpoints keep their boundary in 8 bits and still give every input and parameter its gradient."""

from __future__ import annotations

import pytest
import torch
from coat_train.memory import LiveStorages
from torch import nn

from coat_kernels.autograd.checkpoint import MemoryEfficientCheckpoint
from tests.accuracy import sqnr

WIDTH = 128


def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH))


@pytest.fixture
def x():
    return torch.randn(4, 32, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(out, x, module):
    return torch.autograd.grad(out.square().sum(), [x, *module.parameters()], retain_graph=True)


@pytest.mark.parametrize("fmt", ["e4m3", "auto"])
def test_gradients_of_inputs_and_parameters(x, fmt):
    module = block()
    torch.manual_seed(7)
    expected = gradients(module(x), x, module)
    torch.manual_seed(7)
    out = MemoryEfficientCheckpoint(module, fmt=fmt)(x)
    first, second = gradients(out, x, module), gradients(out, x, module)  # retain_graph: recomputed twice
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert min(sqnr(a, b) for a, b in zip(expected, first, strict=True)) > 25
    assert min(sqnr(a, b) for a, b in zip(expected, first, strict=True)) < 100  # the 8 bits are really read


def test_without_fp8_gradients_are_exact(x):
    module = block().eval()
    expected = gradients(module(x), x, module)
    actual = gradients(MemoryEfficientCheckpoint.checkpoint(module, x, use_fp8=False), x, module)
    assert all(torch.allclose(a, b) for a, b in zip(expected, actual, strict=True))


def test_the_boundary_costs_a_byte_an_element():
    modules = [block() for _ in range(3)]
    h = torch.randn(4, 32, WIDTH, requires_grad=True)
    with LiveStorages() as live:
        out = h
        for module in modules:
            out = MemoryEfficientCheckpoint.checkpoint(module, out)
    # two boundaries and the input's: codes and a float32 scale for each 128
    assert sum(live.alive((out, h)).values()) == 3 * (h.numel() + 4 * h.numel() // 128)


def test_keywords_several_outputs_and_other_arguments(x):
    other = torch.randn(4, 32, WIDTH, requires_grad=True)

    def function(a, factor, *, b, flag):
        return (a * b if flag else a), factor * b.sum()

    product, total = MemoryEfficientCheckpoint.checkpoint(function, x, 3.0, b=other, flag=True)
    (product.sum() + total).backward()
    assert sqnr(other.detach(), x.grad) > 25
    assert sqnr(x.detach() + 3, other.grad) > 25


def test_without_gradients_it_only_runs(x):
    module = block().eval()
    with torch.no_grad():
        assert torch.equal(MemoryEfficientCheckpoint(module)(x), module(x))


def test_what_needs_no_gradient_stays_exact(x):
    """Masks hold infinities, positions large integers: in 8 bits the one became NaN and the other was off by a tenth."""
    mask = torch.zeros(64, 64).masked_fill(torch.ones(64, 64).triu(1).bool(), float("-inf"))
    positions = torch.arange(8192.0)

    def function(h, mask, positions):
        heads = h.view(4, 32, 2, 64).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask[:32, :32]) * positions[-64:]

    expected = torch.autograd.grad(function(x, mask, positions).sum(), x)[0]
    actual = torch.autograd.grad(MemoryEfficientCheckpoint.checkpoint(function, x, mask, positions).sum(), x)[0]
    assert sqnr(expected, actual) > 25


def test_statistics_are_no_boundary():
    narrow = torch.randn(64, 128, 1, requires_grad=True)
    with LiveStorages() as live:
        out = MemoryEfficientCheckpoint.checkpoint(lambda t: t.exp(), narrow)
    assert "quantize_activation" not in str(live.alive((out,)))
