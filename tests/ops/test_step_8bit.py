"""The blockwise 8-bit step as an op: every backend against the reference, torch's optimizers and Lion's formula; containment; errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.dynamic8 import BLOCK_SIZES, decode_blocks
from coat_kernels.formats.parameters import split_decode
from coat_kernels.ops.step_8bit import RULES, BlockwiseFormat, Hyperparameters8bit, Step8bitBucket, step_8bit_
from coat_kernels.ops.step_8bit.reference import step_8bit as reference_step

SIZES = [(0,), (1,), (63,), (64,), (65,), (255,), (256,), (257,), (), (33, 77), (5000,)]
HYPER = Hyperparameters8bit(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
#: Share of codes one step beside the float64 reference's: float32 rounding, 1e-7 of z, meets a threshold once in 2^-7 / 1e-7 elements.
#: Quotients of 16-bit gradients are few and simple, and more often lie on one.
MAY_DIFFER = {torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}
State = dict[str, Tensor]

every_rule = pytest.mark.parametrize("rule", RULES)
stored = pytest.mark.parametrize("quantized", [True, False], ids=["dynamic8", "float32"])


@dataclasses.dataclass
class Tensors:
    """Parallel lists of what one launch steps."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    fmt: BlockwiseFormat

    def step(self, hyper: Hyperparameters8bit = HYPER, **kwargs) -> None:
        Step8bitBucket(self.params, self.grads, self.states, list(range(len(self.params))), self.fmt, **kwargs).step(hyper, self.grads)

    def copy(self) -> Tensors:
        states = [{name: array.clone() for name, array in state.items()} for state in self.states]
        return Tensors([p.clone() for p in self.params], self.grads, states, self.fmt)

    def moment(self, i: int, name: str) -> Tensor:
        stored = self.states[i][name]
        if not self.fmt.quantized:
            return stored
        return decode_blocks(stored, self.states[i][f"{name}_absmax"], self.fmt.block_size, signed=name == "exp_avg")


def make(fmt: BlockwiseFormat, device: torch.device, shapes=SIZES, dtype=torch.float32, grad_dtype=torch.float32, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    spread = [torch.randn(s, generator=generator) * torch.exp(torch.randn(s, generator=generator)) for s in shapes]
    states = []
    for param in params:
        state = {a.name: torch.full(a.shape, a.fill, dtype=a.dtype, device=device) for a in fmt.arrays(param.shape)}
        states.append({**state, "step": torch.zeros((), device=device)})
    return Tensors(params, [g.mul(1e-2).to(device, grad_dtype) for g in spread], states, fmt)


def check_step(tensors: Tensors, hyper: Hyperparameters8bit = HYPER) -> None:
    """Steps, and holds the result to the float64 reference's."""
    old = tensors.copy()
    tensors.step(hyper)
    differ = total = 0
    for i, state in enumerate(tensors.states):
        before = [old.states[i].get(name) for name in Step8bitBucket.columns]
        step = int(old.states[i]["step"]) + 1
        assert state["step"] == step
        param, *after = reference_step(
            old.params[i], old.grads[i], *before, step=step, index=i, fmt=tensors.fmt, hyper=hyper, dtype=torch.float64
        )
        check_params(tensors, old, i, param, after[-1], hyper)
        for name, want in zip(Step8bitBucket.columns, after, strict=True):
            if want is None or want.numel() == 0 or name == "residual":
                continue
            got = state[name]
            if got.dtype == torch.uint8:
                off = (got.int() - want.int()).abs()
                assert off.max() <= 1
                differ, total = differ + int((off > 0).sum()), total + off.numel()
            else:  # an EMA may cancel: float32 rounding of its terms, not of what is left
                term = old.grads[i].abs().max().item() ** (2 if "sq" in name else 1)
                assert torch.allclose(got, want, rtol=1e-6, atol=3e-7 * max(term, want.abs().max().item()))
    assert differ <= MAY_DIFFER[tensors.grads[0].dtype] * total + 2


def check_params(tensors: Tensors, old: Tensors, i: int, want: Tensor, residual: Tensor | None, hyper: Hyperparameters8bit) -> None:
    got, before = tensors.params[i], old.params[i]
    if tensors.fmt.rule == "lion":  # where the signed sum all but cancels, its sign is rounding's
        m, g = old.moment(i, "exp_avg").double(), old.grads[i].double()
        clear = (hyper.beta1 * m + (1 - hyper.beta1) * g).abs() > 1e-6 * (m.abs() + g.abs())
        assert clear.float().mean() > 0.99 or clear.numel() < 100
        got, want, before = got[clear], want[clear], before[clear]
    if got.dtype == torch.float32:
        terms = want if tensors.fmt.rule == "momentum" else want - before
        assert torch.allclose(got, want, rtol=1.2e-7, atol=3e-6 * terms.abs().max().item() if terms.numel() else 0)
        return
    # an update whose float32 value lies within its last bits of a rounding boundary may be stored one step beside
    assert (got != want).sum() <= 2e-3 * got.numel() + 1
    assert torch.allclose(got.float(), want.float(), rtol=2.0**-7 if got.dtype == torch.bfloat16 else 2.0**-10, atol=1e-7)
    if residual is not None and tensors.fmt.rule != "lion":
        exact = split_decode(want, residual)
        assert ((split_decode(got, tensors.states[i]["residual"]) - exact).abs() <= 2.0**-15 * exact.abs() + 3e-6 * hyper.lr).all()


@every_rule
@stored
def test_agrees_with_the_reference(rule: str, quantized: bool, machine: torch.device) -> None:
    tensors = make(BlockwiseFormat(rule, quantized), machine)
    for step in range(5):
        for i, grad in enumerate(tensors.grads):
            grad.copy_(grad.roll(1 + i) * (-1) ** step)
        check_step(tensors)


@every_rule
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(rule: str, block_size: int, machine: torch.device) -> None:
    sizes = [(block_size - 1,), (block_size,), (block_size + 1,), (3 * block_size + 77,)]
    tensors = make(BlockwiseFormat(rule, block_size=block_size), machine, sizes)
    for _ in range(3):
        check_step(tensors)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_sixteen_bit_parameters(rule: str, dtype, rounding: str, grad_dtype, machine: torch.device) -> None:
    if rounding == "split" and dtype == torch.float16:
        pytest.skip("split extends bfloat16")
    tensors = make(BlockwiseFormat(rule, param_rounding=rounding, seed=3), machine, SIZES, dtype, grad_dtype)
    for _ in range(3):
        check_step(tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_updates(dtype, machine: torch.device) -> None:
    tensors = make(BlockwiseFormat("momentum"), machine, SIZES, dtype, torch.bfloat16)
    for _ in range(3):
        check_step(tensors)


@every_rule
def test_maximize_scale_and_nesterov(rule: str, machine: torch.device) -> None:
    tensors = make(BlockwiseFormat(rule), machine)
    hyper = dataclasses.replace(HYPER, maximize=True, nesterov=True, grad_scale=torch.full((1,), 0.37, device=machine))
    for _ in range(3):
        check_step(tensors, hyper)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "nesterov"])
@stored
def test_torchs_optimizers(optimizer: str, quantized: bool, machine: torch.device) -> None:
    """Step 1 is torch's to float32 rounding whatever the codec; without one every step is."""
    tensors = make(BlockwiseFormat("adamw" if optimizer == "adamw" else "momentum", quantized), machine)
    twins = [torch.nn.Parameter(p.double()) for p in tensors.params]
    if optimizer == "adamw":
        torchs: torch.optim.Optimizer = torch.optim.AdamW(twins, lr=HYPER.lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    else:
        torchs = torch.optim.SGD(twins, lr=1, momentum=0.9, nesterov=optimizer == "nesterov")
    hyper = dataclasses.replace(HYPER, nesterov=optimizer == "nesterov")
    for _ in range(1 if quantized else 5):
        before = [t.detach().clone() for t in twins]
        for twin, grad in zip(twins, tensors.grads, strict=True):
            twin.grad = grad.double()
        torchs.step()
        tensors.step(hyper)
        for p, twin, old in zip(tensors.params, twins, before, strict=True):
            want = twin if optimizer == "adamw" else old - twin
            assert torch.allclose(p.double(), want, rtol=5e-7, atol=2e-6 * HYPER.lr)


@stored
def test_lion_is_its_papers(quantized: bool, machine: torch.device) -> None:
    tensors = make(BlockwiseFormat("lion", quantized), machine, [(5000,)])
    p, m = tensors.params[0].double(), torch.zeros(5000, device=machine, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(1 if quantized else 5):
        tensors.grads[0].copy_(torch.randn(5000, generator=generator))
        g = tensors.grads[0].double()
        p = p * (1 - 1e-2 * 0.1) - 1e-2 * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        tensors.step()
        assert torch.allclose(tensors.params[0].double(), p, rtol=5e-7, atol=2e-8)


def test_lion_of_a_zero_gradient_only_decays(machine: torch.device) -> None:
    tensors = make(BlockwiseFormat("lion"), machine, [(300,)])
    before = tensors.params[0].clone()
    tensors.grads[0].zero_()
    tensors.step()
    assert torch.allclose(tensors.params[0], before * (1 - 1e-3), rtol=2e-7)
    tensors.grads[0].fill_(1e-45)  # the smallest denormal still has a sign
    before = tensors.params[0].clone()
    Step8bitBucket(tensors.params, tensors.grads, make(tensors.fmt, machine, [(300,)]).states, [0], tensors.fmt).step(
        dataclasses.replace(HYPER, beta1=0.0), tensors.grads
    )
    assert torch.allclose(tensors.params[0], before * (1 - 1e-3) - 1e-2, rtol=2e-7, atol=2e-9)


@every_rule
@stored
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_touches_its_own_element_only(rule: str, quantized: bool, bad: float, machine: torch.device) -> None:
    for position in (0, 1, 63, 64, 255, 256, 299):
        spoilt, clean = (make(BlockwiseFormat(rule, quantized), machine, [(300,)]) for _ in range(2))
        spoilt.grads[0][position] = bad
        clean.grads[0][position] = 0
        for _ in range(2):
            spoilt.step()
            clean.step()
        others = torch.arange(300, device=machine) != position
        assert torch.equal(spoilt.params[0][others], clean.params[0][others])
        for name in ("exp_avg", "exp_avg_sq"):
            if name in clean.states[0]:
                assert torch.equal(spoilt.moment(0, name)[others], clean.moment(0, name)[others])
        if rule != "lion" or math.isnan(bad):  # the sign of an infinity is finite
            assert not spoilt.params[0][position].isfinite()


@stored
def test_an_overflowing_second_moment_stands_still(quantized: bool, machine: torch.device) -> None:
    tensors = make(BlockwiseFormat("adamw", quantized), machine, [(128,)])
    tensors.grads[0][5] = 1e30  # finite, but its square is not
    start = tensors.params[0][5].item()
    for _ in range(3):
        tensors.step(dataclasses.replace(HYPER, weight_decay=0.0))
    assert tensors.params[0].isfinite().all()
    assert tensors.params[0][5].item() == pytest.approx(start, abs=1e-6)
    assert tensors.moment(0, "exp_avg_sq").isfinite().all()


def test_a_second_moment_never_becomes_zero(machine: torch.device) -> None:
    tensors = make(BlockwiseFormat("adamw"), machine, [(1000,)])
    tensors.grads[0].copy_(torch.logspace(0, -15, 1000))
    tensors.grads[0][::7] = 0
    tensors.step()
    assert torch.equal(tensors.states[0]["exp_avg_sq"] == 0, tensors.grads[0] == 0)


def test_found_inf_changes_nothing(machine: torch.device) -> None:
    tensors = make(BlockwiseFormat("adamw"), machine)
    before = tensors.copy()
    tensors.step(dataclasses.replace(HYPER, found_inf=torch.ones(1, device=machine)))
    assert all(map(torch.equal, tensors.params, before.params))
    for state, old in zip(tensors.states, before.states, strict=True):
        assert all(torch.equal(state[name], old[name]) for name in old)
    tensors.step(dataclasses.replace(HYPER, found_inf=torch.zeros(1, device=machine)))
    assert tensors.states[0]["step"] == 1


@every_rule
def test_many_tensors_in_one_launch_equal_one_at_a_time(rule: str, machine: torch.device) -> None:
    shapes = [(n,) for n in (1, 77, 255, 256, 257, 1023, 1025, 3072, 70_000)]
    together, alone = (make(BlockwiseFormat(rule), machine, shapes) for _ in range(2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for _ in range(3):
            together.step()
            for i in range(len(shapes)):
                Tensors([alone.params[i]], [alone.grads[i]], [alone.states[i]], alone.fmt).step()
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, together.params, alone.params))
    for state, other in zip(together.states, alone.states, strict=True):
        assert all(torch.equal(state[name], other[name]) for name in state)


def test_misaligned_parameters_and_gradients(machine: torch.device) -> None:
    plain, shifted = (make(BlockwiseFormat("adamw"), machine, [(1000,)]) for _ in range(2))
    shifted.params = [torch.empty(1003, device=machine)[3:].copy_(plain.params[0])]
    shifted.grads = [torch.empty(1001, device=machine)[1:].copy_(plain.grads[0])]
    plain.step()
    shifted.step()
    assert torch.equal(shifted.params[0], plain.params[0])
    assert torch.equal(shifted.states[0]["exp_avg"], plain.states[0]["exp_avg"])


def test_the_reference_bucket_is_the_reference() -> None:
    tensors = make(BlockwiseFormat("adamw"), torch.device("cpu"))
    twin = tensors.copy()
    tensors.step()
    twin.step(use_reference=True)
    for p, q in zip(tensors.params, twin.params, strict=True):
        assert torch.allclose(p, q, rtol=2.4e-7, atol=2e-6 * HYPER.lr)
    assert twin.states[0]["step"] == 1


def lists(tensors: Tensors) -> list[list[Tensor]]:
    names = (*Step8bitBucket.columns, "step")
    return [tensors.params, tensors.grads, *([s[name] for s in tensors.states if name in s] for name in names)]


@every_rule
def test_op_schema_and_opcheck(rule: str, device: torch.device) -> None:
    tensors = make(BlockwiseFormat(rule), device, [(300,), (5, 7)])
    twin = tensors.copy()
    arguments = (*lists(tensors), torch.tensor(1e-2), 0.9, 0.99, 1e-8, 0.1)
    torch.library.opcheck(step_8bit_.default, arguments, {"rule": rule})
    mutated = {a.name for a in step_8bit_.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert mutated == {"params", "exp_avgs", "exp_avg_sqs", "exp_avg_absmaxs", "exp_avg_sq_absmaxs", "residuals", "steps"}
    other = twin.copy()
    step_8bit_(*lists(twin), torch.tensor(1e-2), 0.9, 0.99, 1e-8, 0.1, rule=rule)
    other.step()
    assert all(map(torch.equal, twin.params, other.params))


def test_op_errors() -> None:
    tensors = make(BlockwiseFormat("adamw"), torch.device("cpu"), [(300,)])

    def call(position: int | None = None, value: list[Tensor] | None = None, **kwargs) -> None:
        arguments = lists(tensors)
        if position is not None:
            arguments[position] = value
        step_8bit_(*arguments, torch.tensor(1e-2), 0.9, 0.99, **kwargs)

    before = tensors.copy()
    with pytest.raises(ValueError, match="grads has 0 tensors and params 1"):
        call(1, [])
    with pytest.raises(TypeError, match=r"grads\[0\] has dtype torch.float64"):
        call(1, [tensors.grads[0].double()])
    with pytest.raises(ValueError, match=r"exp_avg_absmax\[0\] has shape \(2,\); \(5,\) is needed for a parameter of shape \(300,\)"):
        call(block_size=64)
    with pytest.raises(ValueError, match="not contiguous"):
        call(0, [torch.zeros(300, 2)[:, 0]])
    with pytest.raises(ValueError, match="unknown rule 'sgd'; choose one of 'adamw', 'lion', 'momentum'"):
        call(rule="sgd")
    with pytest.raises(ValueError, match="exp_avg_sq is no part of"):
        call(rule="lion")
    with pytest.raises(ValueError, match="residual has 0 tensors"):
        call(param_rounding="split")
    with pytest.raises(ValueError, match="exp_avg_sq_absmax is no part of"):
        call(4, [], quantized=False)
    assert torch.equal(tensors.params[0], before.params[0])
    with pytest.raises(ValueError, match="writes an update, no parameter"):
        BlockwiseFormat("momentum", param_rounding="split")
    with pytest.raises(ValueError, match="block size 100"):
        BlockwiseFormat("adamw", block_size=100)
