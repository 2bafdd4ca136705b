"""The fused 8-bit step in CUDA, emulated or on a GPU, against the PyTorch reference: states bit for bit, parameters within rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.parameters import split_decode
from coat_kernels.ops.state import Array
from coat_kernels.ops.step_8bit import BlockwiseFormat, Hyperparameters8bit, Step8bitBucket, cuda

SIZES = (0, 1, 9, 255, 256, 4096, 4103, 12801)
HYPER = Hyperparameters8bit(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
#: Two corrections and four products, rounded (6e-8 each), and a root and a reciprocal of the special function unit (1.2e-7 each).
UPDATE_RTOL = 6e-7


class Tensors:
    """Parameters, gradients and fresh states of every size on one device.

    Args:
        offset: elements that precede the first parameter in its storage, likewise the gradient: 0 leaves the last ones aligned.
    """

    def __init__(self, fmt: BlockwiseFormat, *dtypes: torch.dtype, offset: int = 0, device: torch.device | str = "cpu") -> None:
        self.fmt, self.offset, self.device = fmt, offset, device
        self.param_dtype, self.grad_dtype = dtypes or (torch.float32, torch.float32)
        self.params = self._split(torch.randn(self._total(), generator=torch.Generator().manual_seed(3)), self.param_dtype)
        self.states = [self._state(p) for p in self.params]
        self.grads: list[Tensor] = []
        self.set_grads(0)
        held = (self.params, self.grads, self.states, list(range(len(SIZES))))
        self.bucket = Step8bitBucket(*held, fmt, use_reference=True)

    def _total(self) -> int:
        return sum(SIZES) + self.offset

    def _split(self, flat: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return list(flat.to(self.device, dtype)[self.offset :].split(SIZES))

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        arrays = [*self.fmt.arrays(param.shape), Array("step", torch.float32, ())]
        return {a.name: torch.full(a.shape, a.fill, dtype=a.dtype, device=self.device) for a in arrays}

    def set_grads(self, step: int) -> None:
        generator = torch.Generator().manual_seed(100 + step)
        flat = torch.randn(self._total(), generator=generator)
        flat *= torch.randn(len(flat), generator=generator).mul(1.5).exp()
        flat[::11] = 0
        self.grads = self._split(flat, self.grad_dtype)
        if step:
            self.bucket.set_grads(self.grads)

    def step(self, hyper: Hyperparameters8bit) -> None:
        """By the reference."""
        self.bucket.step(hyper, self.grads)

    def step_cuda(self, hyper: Hyperparameters8bit) -> None:
        table = self.bucket.table.host.to(self.device)
        tiles = cuda.make_tiles([p.numel() for p in self.params], self.fmt.block_size).to(self.device)
        corrections = torch.full((len(self.params), 4), torch.nan, device=self.device)
        moved = {name: value.to(self.device) for name, value in vars(hyper).items() if isinstance(value, Tensor)}
        dtypes = {"param_dtype": self.param_dtype, "grad_dtype": self.grad_dtype}
        cuda.step(table, tiles, corrections, self.fmt, replace(hyper, **moved), **dtypes)

    def copy_from(self, other: Tensors) -> None:
        for mine, theirs in zip(self.everything(), other.everything(), strict=True):
            mine.copy_(theirs)

    def everything(self) -> list[Tensor]:
        return [*self.params, *(array for state in self.states for array in state.values())]

    def values(self) -> list[Tensor]:
        """The parameters in float32 on the CPU, with their residuals."""
        if self.fmt.param_rounding == "split":
            return [split_decode(p, s["residual"]).cpu() for p, s in zip(self.params, self.states, strict=True)]
        return [p.to("cpu", torch.float32, copy=True) for p in self.params]


def compare(
    device: torch.device, fmt: BlockwiseFormat, hyper: Hyperparameters8bit, *dtypes: torch.dtype, offset: int = 0, n_steps: int = 2
) -> None:
    """Steps by the kernels and by the reference, each time from the reference's state."""
    got, want = Tensors(fmt, *dtypes, offset=offset, device=device), Tensors(fmt, *dtypes, offset=offset)
    for step in range(1, n_steps + 1):
        got.copy_from(want)
        before = want.values()
        for tensors in (got, want):
            tensors.set_grads(step)
        got.step_cuda(hyper)
        want.step(hyper)
        for n, state, expected in zip(SIZES, got.states, want.states, strict=True):
            for name in expected:
                wrong = int((state[name].cpu() != expected[name]).sum())
                assert name == "residual" or not wrong, f"{name} of {n} elements at step {step}: {wrong} differ"
        for n, g, w, old in zip(SIZES, got.values(), want.values(), before, strict=True):
            # float32 roundings of what is subtracted and of the update; a 16-bit number may be its neighbour
            unit = 2.0**-15 if fmt.param_rounding == "split" else torch.finfo(want.param_dtype).eps
            storage = 0 if want.param_dtype == torch.float32 else unit * 1.01
            error = (g - w).abs()
            bound = w.abs() * storage + (w.abs() + old.abs()) * 2.0**-24 + (w - old).abs() * UPDATE_RTOL + 1e-10
            assert bool((error <= bound).all()), f"{n} elements at step {step}: {float((error / bound).max()):.3g} of the bound"
            if want.param_dtype != torch.float32 and n:
                assert float((g != w).float().mean()) <= (2e-3 if n > 500 else 0), "neighbours are the exception"


@pytest.mark.parametrize("rule", ["adamw", "lion", "momentum"])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_are_the_references(rule: str, quantized: bool, param_dtype: torch.dtype, device: torch.device) -> None:
    grad_dtype = {torch.float32: torch.float32, torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[param_dtype]
    compare(device, BlockwiseFormat(rule, quantized), HYPER, param_dtype, grad_dtype, n_steps=3)


@pytest.mark.parametrize("block_size", [64, 128, 512, 1024, 2048, 4096])
def test_every_block_size(block_size: int, device: torch.device) -> None:
    compare(device, BlockwiseFormat("adamw", block_size=block_size), HYPER, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("offset", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_gradients_aligned_to_their_elements_only(offset: int, dtype: torch.dtype, device: torch.device) -> None:
    compare(device, BlockwiseFormat("adamw"), HYPER, dtype, dtype, offset=offset)


@pytest.mark.parametrize("rule", ["adamw", "lion"])
@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, "stochastic"), (torch.float16, "stochastic"), (torch.bfloat16, "split")])
def test_parameter_roundings(rule: str, dtype: torch.dtype, rounding: str, device: torch.device) -> None:
    compare(device, BlockwiseFormat(rule, param_rounding=rounding, seed=-7), HYPER, dtype, dtype)


@pytest.mark.parametrize("rule", ["adamw", "lion", "momentum"])
def test_maximize_nesterov_and_scaled_gradients(rule: str, device: torch.device) -> None:
    hyper = Hyperparameters8bit(
        torch.tensor(3e-3),
        0.95,
        0.98,
        1e-6,
        0.01,
        maximize=True,
        nesterov=True,
        grad_scale=torch.tensor([1024.0]),
        found_inf=torch.zeros(1),
    )
    compare(device, BlockwiseFormat(rule), hyper, torch.float32, torch.float32)


@pytest.mark.parametrize("quantized", [True, False])
def test_nothing_changes_where_inf_was_found(quantized: bool, device: torch.device) -> None:
    got, want = (Tensors(BlockwiseFormat("adamw", quantized), device=device) for _ in range(2))
    got.step_cuda(Hyperparameters8bit(1e-2, 0.9, 0.99, found_inf=torch.ones(1)))
    for g, w in zip(got.everything(), want.everything(), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("quantized", [True, False])
def test_bad_gradients_stay_where_they_are(quantized: bool, device: torch.device) -> None:
    """NaN and inf reach their own parameters alone; a gradient whose square overflows is held at the largest float32."""
    got, want = (Tensors(BlockwiseFormat("adamw", quantized), device=where) for where in (device, "cpu"))
    for tensors in (got, want):
        for grad in tensors.grads:
            for i, value in enumerate((torch.nan, torch.inf, 1e30, -torch.inf, 3e38)):
                grad[100 * i + 7 :: 1500] = value
    got.step_cuda(HYPER)
    want.step(HYPER)
    for g, w in zip(got.params, want.params, strict=True):
        torch.testing.assert_close(g.cpu(), w, rtol=2e-7, atol=1e-7, equal_nan=True)
    for g, w in zip(got.everything()[len(SIZES) :], want.everything()[len(SIZES) :], strict=True):
        torch.testing.assert_close(g.cpu(), w, rtol=0, atol=0, equal_nan=True)


def test_step_one_is_torchs(device: torch.device) -> None:
    ours = Tensors(BlockwiseFormat("adamw"), device=device)
    theirs = [torch.nn.Parameter(p.clone()) for p in ours.params]
    for p, g in zip(theirs, ours.grads, strict=True):
        p.grad = g.clone()
    torch.optim.AdamW(theirs, lr=HYPER.lr, betas=(HYPER.beta1, HYPER.beta2), eps=HYPER.eps, weight_decay=HYPER.weight_decay).step()
    ours.step_cuda(HYPER)
    for p, q in zip(ours.params, theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=UPDATE_RTOL, atol=2e-8)  # 2e-6 of lr: torch rounds the root apart


def test_tiles_cover_every_element_once() -> None:
    tiles = cuda.make_tiles(SIZES, 256)
    covered = [sum(min(n - cuda.TILE * t, cuda.TILE) for row, t in tiles.tolist() if row == i) for i, n in enumerate(SIZES)]
    assert covered == list(SIZES) and len(tiles) == sum(math.ceil(n / cuda.TILE) for n in SIZES)
    with pytest.raises(ValueError, match="block size 3000 does not divide"):
        cuda.make_tiles(SIZES, 3000)
