"""The fused 8-bit step in CUDA, emulated, against the PyTorch reference: states bit for bit, parameters within float32 rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.parameters import split_decode, split_encode
from coat_kernels.ops.step_8bit import BlockwiseFormat, Hyperparameters8bit, Step8bitBucket, cuda

pytestmark = pytest.mark.usefixtures("emulator")

SIZES = (0, 1, 9, 255, 256, 4096, 4103, 12801)
HYPER = Hyperparameters8bit(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
#: A root, a quotient, two corrections and three products: eight roundings of 6e-8 at most.
UPDATE_RTOL = 5e-7


class Tensors:
    """Parameters, gradients and fresh states of every size, and the bucket that steps them; `cuda` or the reference."""

    def __init__(
        self, fmt: BlockwiseFormat, param_dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype = torch.float32, offset: int = 0
    ) -> None:
        self.fmt, self.grad_dtype = fmt, grad_dtype
        generator = torch.Generator().manual_seed(3)
        total = sum(SIZES) + offset
        self.params = [p.contiguous() for p in torch.randn(total, generator=generator).to(param_dtype)[offset:].split(SIZES)]
        self.states = [self._state(p) for p in self.params]
        self.grads = self._grads(0, offset)
        self.offset = offset
        self.bucket = self._bucket()

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = {a.name: torch.full(a.shape, a.fill, dtype=a.dtype) for a in self.fmt.arrays(param.shape)}
        if "residual" in state:
            param.copy_(split_encode(param.float() + 1e-3)[0])
        return {**state, "step": torch.zeros(())}

    def _grads(self, step: int, offset: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(100 + step)
        flat = torch.randn(sum(SIZES) + offset, generator=generator)
        flat *= torch.randn(len(flat), generator=generator).mul(1.5).exp()
        flat[::11] = 0
        return list(flat.to(self.grad_dtype)[offset:].split(SIZES))

    def _bucket(self) -> Step8bitBucket:
        return Step8bitBucket(self.params, self.grads, self.states, list(range(len(SIZES))), self.fmt, use_reference=True)

    def set_grads(self, step: int) -> None:
        self.grads = self._grads(step, self.offset)
        self.bucket.set_grads(self.grads)

    def step(self, hyper: Hyperparameters8bit) -> None:
        self.bucket.step(hyper, self.grads)

    def step_cuda(self, hyper: Hyperparameters8bit) -> None:
        tiles = cuda.make_tiles([p.numel() for p in self.params], self.fmt.block_size)
        corrections = torch.full((len(self.params), 4), torch.nan)
        cuda.step(self.bucket.table.host, tiles, corrections, self.fmt, hyper, param_dtype=self.params[0].dtype, grad_dtype=self.grad_dtype)

    def copy_from(self, other: Tensors) -> None:
        for mine, theirs in zip([*self.params, *self._held()], [*other.params, *other._held()], strict=True):
            mine.copy_(theirs)

    def _held(self) -> list[Tensor]:
        return [state[name] for state in self.states for name in state]

    def values(self) -> list[Tensor]:
        """The parameters in float32, with their residuals."""
        if self.fmt.param_rounding == "split":
            return [split_decode(p, s["residual"]) for p, s in zip(self.params, self.states, strict=True)]
        return [p.to(torch.float32, copy=True) for p in self.params]


def compare(fmt: BlockwiseFormat, hyper: Hyperparameters8bit, *dtypes: torch.dtype, offset: int = 0, n_steps: int = 2) -> None:
    got, want = Tensors(fmt, *dtypes, offset=offset), Tensors(fmt, *dtypes, offset=offset)
    for step in range(1, n_steps + 1):
        got.copy_from(want)
        before = want.values()
        for tensors in (got, want):
            tensors.set_grads(step)
        got.step_cuda(hyper)
        want.step(hyper)
        for i, (g, w) in enumerate(zip(got.states, want.states, strict=True)):
            for name in g:
                if name != "residual":
                    assert torch.equal(g[name], w[name]), f"{name} of {SIZES[i]} elements at step {step}: {int((g[name] != w[name]).sum())}"
        for i, (g, w, old) in enumerate(zip(got.values(), want.values(), before, strict=True)):
            dtype = want.params[0].dtype
            # float32 roundings of what is subtracted and of the update; a 16-bit number may be its neighbour
            unit = {"split": 2.0**-15}.get(fmt.param_rounding, torch.finfo(dtype).eps)
            storage = 0 if dtype == torch.float32 else unit * 1.01
            error = (g - w).abs()
            bound = w.abs() * storage + (w.abs() + old.abs()) * 2.0**-24 + (w - old).abs() * UPDATE_RTOL + 1e-10
            assert bool((error <= bound).all()), f"{SIZES[i]} elements at step {step}: {float((error / bound).max()):.3g} of the bound"
            if dtype != torch.float32 and w.numel():
                assert float((g != w).float().mean()) <= (2e-3 if w.numel() > 500 else 0), "neighbours are the exception"


@pytest.mark.parametrize("rule", ["adamw", "lion", "momentum"])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_are_the_references(rule: str, quantized: bool, param_dtype: torch.dtype) -> None:
    grad_dtype = {torch.float32: torch.float32, torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[param_dtype]
    compare(BlockwiseFormat(rule, quantized), HYPER, param_dtype, grad_dtype, n_steps=3)


@pytest.mark.parametrize("block_size", [64, 128, 512, 1024, 2048, 4096])
def test_every_block_size(block_size: int) -> None:
    compare(BlockwiseFormat("adamw", block_size=block_size), HYPER, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("offset", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_gradients_aligned_to_their_elements_only(offset: int, dtype: torch.dtype) -> None:
    compare(BlockwiseFormat("adamw"), HYPER, dtype, dtype, offset=offset)


@pytest.mark.parametrize("rule", ["adamw", "lion"])
@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, "stochastic"), (torch.float16, "stochastic"), (torch.bfloat16, "split")])
def test_parameter_roundings(rule: str, dtype: torch.dtype, rounding: str) -> None:
    compare(BlockwiseFormat(rule, param_rounding=rounding, seed=-7), HYPER, dtype, dtype)


@pytest.mark.parametrize("rule", ["adamw", "lion", "momentum"])
def test_maximize_nesterov_and_scaled_gradients(rule: str) -> None:
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
    compare(BlockwiseFormat(rule), hyper, torch.float32, torch.float32)


@pytest.mark.parametrize("quantized", [True, False])
def test_nothing_changes_where_inf_was_found(quantized: bool) -> None:
    got, want = Tensors(BlockwiseFormat("adamw", quantized)), Tensors(BlockwiseFormat("adamw", quantized))
    got.step_cuda(Hyperparameters8bit(1e-2, 0.9, 0.99, found_inf=torch.ones(1)))
    for g, w in zip([*got.params, *got._held()], [*want.params, *want._held()], strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("quantized", [True, False])
def test_bad_gradients_stay_where_they_are(quantized: bool) -> None:
    """NaN and inf reach their own parameters alone; a gradient whose square overflows is held at the largest float32."""
    got, want = (Tensors(BlockwiseFormat("adamw", quantized)) for _ in range(2))
    for tensors in (got, want):
        for grad in tensors.grads:
            for i, value in enumerate((torch.nan, torch.inf, 1e30, -torch.inf, 3e38)):
                grad[100 * i + 7 :: 1500] = value
    got.step_cuda(HYPER)
    want.step(HYPER)
    for g, w in zip(got.params, want.params, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-7, atol=1e-7, equal_nan=True)
    for g, w in zip(got._held(), want._held(), strict=True):
        assert torch.equal(g.nan_to_num(-1) if g.is_floating_point() else g, w.nan_to_num(-1) if w.is_floating_point() else w)


def test_step_one_is_torchs() -> None:
    ours = Tensors(BlockwiseFormat("adamw"))
    theirs = [torch.nn.Parameter(p.clone()) for p in ours.params]
    for p, g in zip(theirs, ours.grads, strict=True):
        p.grad = g.clone()
    torch.optim.AdamW(theirs, lr=HYPER.lr, betas=(HYPER.beta1, HYPER.beta2), eps=HYPER.eps, weight_decay=HYPER.weight_decay).step()
    ours.step_cuda(HYPER)
    for p, q in zip(ours.params, theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=UPDATE_RTOL, atol=1e-8)


def test_tiles_cover_every_element_once() -> None:
    tiles = cuda.make_tiles(SIZES, 256)
    covered = [sum(min(n - cuda.TILE * t, cuda.TILE) for row, t in tiles.tolist() if row == i) for i, n in enumerate(SIZES)]
    assert covered == list(SIZES) and len(tiles) == sum(math.ceil(n / cuda.TILE) for n in SIZES)
    with pytest.raises(ValueError, match="block size 3000 does not divide"):
        cuda.make_tiles(SIZES, 3000)
