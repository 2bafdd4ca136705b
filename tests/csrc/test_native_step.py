"""The fused AdamW step in C++ against torch.optim.AdamW and the PyTorch reference, on every instruction set."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from coat_kernels._native import native
from coat_kernels.formats.codecs import CODECS, Codec, num_groups
from coat_kernels.formats.parameters import DTYPE_INDEX, PARAM_ROUNDINGS, split_decode, split_encode
from coat_kernels.formats.reference import decode_group
from coat_kernels.ops.adamw_fp8.reference import adamw_fp8 as reference_step
from coat_kernels.ops.adamw_fp8.settings import Hyperparameters, StateFormat
from tests.codes import places

pytestmark = pytest.mark.usefixtures("isa")

HYPER = Hyperparameters(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
# Moments' codes may differ by one step where float32 rounding of the decoded state meets a rounding boundary.
CODE_MISMATCH = 0.002
# float32 rounding of the update: decode 4e-6 in v (half of it in the root) and m, the rest a few units in the last place.
UPDATE_RTOL, STEP_ONE_RTOL = 8e-6, 1e-6

FORMATS = {
    "e4m3_expand": StateFormat(CODECS["e4m3_expand"], CODECS["e4m3_expand"]),
    "e4m3": StateFormat(CODECS["e4m3"], CODECS["e4m3"]),
    "e5m2_expand": StateFormat(CODECS["e5m2_expand"], CODECS["e5m2_expand"]),
    "log8": StateFormat(CODECS["e4m3_expand"], CODECS["log8"]),
    "log8 stochastic": StateFormat(CODECS["e4m3_expand"], CODECS["log8"], 128, "nearest", "stochastic", seed=77),
    "e4m3 stochastic": StateFormat(CODECS["e4m3_expand"], CODECS["e4m3_expand"], 64, "stochastic", "stochastic", seed=-5),
    "m float32": StateFormat(CODECS["float32"], CODECS["e4m3_expand"], 32),
    "v float32": StateFormat(CODECS["e4m3_expand"], CODECS["float32"], 256),
    "float32": StateFormat(CODECS["float32"], CODECS["float32"]),
    "softsign8": StateFormat(CODECS["softsign8"], CODECS["log8"]),
    "softsign8 stochastic": StateFormat(CODECS["softsign8"], CODECS["e4m3"], 64, "stochastic", "nearest", seed=3),
    "e2m1": StateFormat(CODECS["e2m1_expand"], CODECS["e2m1_expand"]),
    "e2m1 stochastic": StateFormat(CODECS["e2m1_expand"], CODECS["e2m1_expand"], 32, "stochastic", "stochastic", seed=5),
    "e2m1 plain": StateFormat(CODECS["e2m1"], CODECS["e2m1"], 256),
    "bfloat16": StateFormat(CODECS["bfloat16"], CODECS["bfloat16"]),
    "bfloat16 stochastic": StateFormat(CODECS["softsign8"], CODECS["bfloat16"], 128, "nearest", "stochastic", seed=11),
    "m bfloat16": StateFormat(CODECS["bfloat16"], CODECS["e2m1_expand"], 64, "stochastic", "stochastic", seed=1),
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


@dataclass
class State:
    """One tensor's parameter, gradient and state."""

    param: Tensor
    grad: Tensor
    fmt: StateFormat
    index: int = 0
    exp_avg: Tensor = field(init=False)
    exp_avg_sq: Tensor = field(init=False)
    amax: Tensor = field(init=False)
    k16: Tensor = field(init=False)
    residual: Tensor | None = None
    step: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        groups = num_groups(self.param.numel(), self.fmt.group_size)
        moments = (self.fmt.exp_avg, self.fmt.exp_avg_sq)
        self.exp_avg, self.exp_avg_sq = (torch.zeros(c.codes_shape(self.param.shape), dtype=c.array_dtype) for c in moments)
        self.amax, self.k16 = torch.zeros(groups, 2), torch.ones(groups, 2, dtype=torch.uint8)

    def tensors(self) -> list[Tensor]:
        return [self.param, self.exp_avg, self.exp_avg_sq, self.amax, self.k16, *([] if self.residual is None else [self.residual])]

    def row(self) -> list[int]:
        quantized = self.fmt.quantized
        pointers = [self.param, self.grad, self.exp_avg, self.exp_avg_sq]
        return [
            *(tensor.data_ptr() for tensor in pointers),
            self.amax.data_ptr() if quantized else 0,
            self.k16.data_ptr() if quantized else 0,
            0 if self.residual is None else self.residual.data_ptr(),
            self.step.data_ptr(),
            self.param.numel(),
            self.index,
        ]

    def moment(self, column: int, dtype: torch.dtype = torch.float64) -> Tensor:
        codec: Codec = (self.fmt.exp_avg, self.fmt.exp_avg_sq)[column]
        stored = (self.exp_avg, self.exp_avg_sq)[column]
        if not codec.quantized:
            return stored.to(dtype)
        amax, k16 = self.amax[:, column], self.k16[:, column]
        return decode_group(stored, amax, k16, codec, self.fmt.group_size, shape=self.param.shape, dtype=dtype)


def native_step(states: list[State], hyper: Hyperparameters = HYPER, threads: int = 1) -> None:
    fmt = states[0].fmt
    table = torch.tensor([state.row() for state in states])
    native.adamw_fp8(
        table=table.data_ptr(),
        n_tensors=len(states),
        param_dtype=DTYPE_INDEX[states[0].param.dtype],
        grad_dtype=DTYPE_INDEX[states[0].grad.dtype],
        exp_avg_codec=fmt.exp_avg.index,
        exp_avg_sq_codec=fmt.exp_avg_sq.index,
        group_size=fmt.group_size,
        stochastic_exp_avg=fmt.exp_avg_rounding == "stochastic",
        stochastic_exp_avg_sq=fmt.exp_avg_sq_rounding == "stochastic",
        param_rounding=PARAM_ROUNDINGS.index(fmt.param_rounding),
        seed=fmt.seed,
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        maximize=hyper.maximize,
        grad_scale=1.0 if hyper.grad_scale is None else float(hyper.grad_scale),
        threads=threads,
    )


def expected_step(state: State, hyper: Hyperparameters = HYPER) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return reference_step(
        state.param,
        state.grad,
        state.exp_avg,
        state.exp_avg_sq,
        state.amax,
        state.k16,
        state.residual,
        step=int(state.step) + 1,
        index=state.index,
        fmt=state.fmt,
        hyper=hyper,
        dtype=torch.float64,
    )


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_state(numel: int, fmt: StateFormat, seed: int = 0, index: int = 0) -> State:
    return State(randn(numel, seed=seed), randn(numel, seed=seed + 1000), fmt, index)


def assert_state_close(state: State, expected: tuple[Tensor | None, ...]) -> None:
    """State after a native step against the reference's, codes within one step for few elements, metadata to its last bit's rounding."""
    _, m, v, amax, k16, _ = expected
    for column, (codec, got, want) in enumerate(((state.fmt.exp_avg, state.exp_avg, m), (state.fmt.exp_avg_sq, state.exp_avg_sq, v))):
        if codec.array_dtype == torch.bfloat16:
            # a float32 result on the other side of a rounding boundary
            assert (got != want).float().mean() <= CODE_MISMATCH
            torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-22 * float(want.abs().max()))
            continue
        if not codec.quantized:
            # where beta * m and (1 - beta) * g cancel, their rounding is what is left
            torch.testing.assert_close(got, want, rtol=UPDATE_RTOL, atol=2**-22 * float(want.abs().max()))
            continue
        torch.testing.assert_close(state.amax[:, column], amax[:, column], rtol=UPDATE_RTOL, atol=0)
        # amin and amax of the group are float32 results here and float64 results there: k16 may fall on the other side of a step
        same = state.k16[:, column] == k16[:, column]
        assert same.float().mean() >= 0.99
        got, want = places(got, codec, state.param.shape), places(want, codec, state.param.shape)
        groups = same.repeat_interleave(state.fmt.group_size)[: got.numel()]
        differs = (got != want) & groups
        assert differs.float().mean() <= CODE_MISMATCH
        assert torch.all((got - want).abs()[differs] <= 1)


@every_format
@pytest.mark.parametrize("numel", [1, 127, 128, 1000, 5000])
def test_first_step_is_torch_s(fmt, numel):
    state = make_state(numel, fmt)
    param = torch.nn.Parameter(state.param.double())
    param.grad = state.grad.double()
    torch.optim.AdamW([param], lr=HYPER.lr, betas=(HYPER.beta1, HYPER.beta2), eps=HYPER.eps, weight_decay=HYPER.weight_decay).step()
    before = state.param.double()
    native_step([state])
    # the parameter's own rounding, half a unit in its last place, is not the update's error
    tolerance = STEP_ONE_RTOL * (param - before).abs() + 2**-23 * param.abs()
    assert torch.all((state.param.double() - param).abs() <= tolerance)
    assert state.step.item() == 1


@every_format
def test_later_steps_against_torch_on_decoded_state(fmt):
    """Before steps 2, 3 and 10 torch's optimizer gets what the state decodes to."""
    state = make_state(3000, fmt)
    for step in range(1, 11):
        state.grad = randn(3000, seed=step) * 10.0 ** -(step % 5)
        if step in (2, 3, 10):
            param = torch.nn.Parameter(state.param.double())
            param.grad = state.grad.double()
            torch_opt = torch.optim.AdamW(
                [param], lr=HYPER.lr, betas=(HYPER.beta1, HYPER.beta2), eps=HYPER.eps, weight_decay=HYPER.weight_decay
            )
            torch_opt.state[param] = {"step": torch.tensor(step - 1.0), "exp_avg": state.moment(0), "exp_avg_sq": state.moment(1)}
            before, expected = state.param.double(), expected_step(state)
            torch_opt.step()
            native_step([state])
            tolerance = UPDATE_RTOL * ((param - before).abs() + HYPER.lr) + 2**-23 * param.abs()
            assert torch.all((state.param.double() - param).abs() <= tolerance)
            assert_state_close(state, expected)
        else:
            native_step([state])
        assert state.step.item() == step


@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", PARAM_ROUNDINGS)
def test_16_bit_parameters(param_dtype, grad_dtype, rounding):
    if rounding == "split" and param_dtype != torch.bfloat16:
        pytest.skip("split is for bfloat16")
    fmt = StateFormat(CODECS["e4m3_expand"], CODECS["e4m3_expand"], param_rounding=rounding, seed=9)
    state = State(randn(3001, dtype=param_dtype), randn(3001, seed=1, dtype=grad_dtype), fmt, index=4)
    if rounding == "split":
        state.param, state.residual = split_encode(randn(3001))
    for step in range(3):
        expected = expected_step(state)
        native_step([state])
        if rounding == "split":
            got, want = split_decode(state.param, state.residual), split_decode(expected[0], expected[5])
            torch.testing.assert_close(got, want, rtol=2**-15, atol=0)  # one step of 24 bits
            assert (state.residual != expected[5]).float().mean() < 0.2, step
        else:
            # a float32 result on the other side of a rounding boundary: rare, and one step
            assert (state.param != expected[0]).float().mean() <= CODE_MISMATCH
            torch.testing.assert_close(state.param, expected[0], rtol=2 * torch.finfo(param_dtype).eps, atol=1e-6)
        state.grad = randn(3001, seed=step + 2, dtype=grad_dtype)


def test_stochastic_parameters_draw_by_index_and_step():
    fmt = StateFormat(CODECS["e4m3_expand"], CODECS["e4m3_expand"], param_rounding="stochastic", seed=9)
    one, other = (State(randn(4096, dtype=torch.bfloat16), randn(4096, seed=1), fmt, index=index) for index in (0, 1))
    native_step([one, other])
    assert (one.param != other.param).float().mean() > 0.01


@every_format
def test_many_tensors_are_one_call_each(fmt):
    """Sizes with short groups, an empty tensor and steps of their own; threads change nothing."""
    sizes = [1, 0, 31, 128, 129, 4096, 70_000, 3, 2048, 66_000, 200]
    together, alone, threaded = ([make_state(n, fmt, seed=i, index=i) for i, n in enumerate(sizes)] for _ in range(3))
    for states in (together, alone, threaded):
        states[3].step += 6
    for _ in range(2):
        native_step(together)
        native_step(threaded, threads=2)
        for state in alone:
            native_step([state])
    for a, b, c in zip(together, alone, threaded, strict=True):
        assert torch.equal(a.step, b.step)
        for x, y, z in zip(a.tensors(), b.tensors(), c.tensors(), strict=True):
            assert torch.equal(x, y) and torch.equal(x, z)


def test_empty_tensor_counts_its_step():
    state = make_state(0, FORMATS["e4m3_expand"])
    native_step([state])
    assert state.step.item() == 1


@every_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_gradient_touches_only_its_own_element(fmt, bad):
    good, spoilt = make_state(128 * 130, fmt), make_state(128 * 130, fmt)
    positions = torch.arange(128) * 129  # every position of a group of 128
    good.grad[positions] = 0.0  # what the group's metadata sees of a bad element
    for _ in range(2):
        spoilt.grad[positions] = bad
        native_step([good])
        native_step([spoilt])
    keep = torch.ones(good.param.numel(), dtype=torch.bool)
    keep[positions] = False
    assert torch.equal(good.param[keep], spoilt.param[keep])
    assert torch.all(spoilt.param[positions].isnan())
    for column in (0, 1):
        assert torch.equal(good.moment(column)[keep], spoilt.moment(column)[keep])
    assert torch.equal(good.amax, spoilt.amax) and torch.equal(good.k16, spoilt.k16)
    held = spoilt.moment(0)[positions]
    assert torch.all(~held.isfinite() if fmt.exp_avg.is_float8 or not fmt.exp_avg.quantized else held == 0)


@every_format
def test_overflowing_v_stands_still(fmt):
    state = make_state(256, fmt)
    state.grad[[3, 200]] = 1e30
    before = state.param.clone()
    native_step([state], Hyperparameters(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0))
    assert torch.equal(state.param[[3, 200]], before[[3, 200]])
    assert torch.all(state.moment(1).isfinite())
    top = torch.finfo(fmt.exp_avg_sq.array_dtype).max if not fmt.exp_avg_sq.quantized else torch.finfo(torch.float32).max
    torch.testing.assert_close(state.moment(1)[[3, 200]], torch.full((2,), top, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_params_and_grads(offset, dtype):
    fmt = FORMATS["e4m3_expand"]
    flat_param, flat_grad = randn(3000, dtype=dtype), randn(3000, seed=1, dtype=dtype)
    whole = State(flat_param[offset:].clone(), flat_grad[offset:].clone(), fmt)
    view = State(flat_param[offset:], flat_grad[offset:], fmt)
    untouched = flat_param[:offset].clone()
    for _ in range(2):
        native_step([whole])
        native_step([view])
    for a, b in zip(whole.tensors(), view.tensors(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(flat_param[:offset], untouched)


@every_format
def test_grad_scale_and_maximize(fmt):
    plain, scaled = make_state(1000, fmt), make_state(1000, fmt)
    scaled.grad *= -65536.0
    native_step([plain])
    native_step([scaled], Hyperparameters(HYPER.lr, 0.9, 0.999, 1e-8, 0.1, maximize=True, grad_scale=torch.tensor(65536.0)))
    for a, b in zip(plain.tensors(), scaled.tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [1e-18, 1e-21, 0.0])
def test_tiny_gradients(scale):
    """v down to subnormals, and groups of zeros: state decodes as the reference's for ten steps."""
    state = make_state(512, FORMATS["e4m3_expand"])
    for step in range(3):
        state.grad = randn(512, seed=step) * scale
        expected = expected_step(state)
        native_step([state])
        torch.testing.assert_close(state.param, expected[0], rtol=1e-6, atol=1e-9)
        top, want = state.amax, expected[3]
        assert torch.all((top - want).abs() <= UPDATE_RTOL * want + 2.0**-149 * 2)
        assert torch.equal(state.moment(1) > 0, decode_group(expected[2], want[:, 1], expected[4][:, 1], CODECS["e4m3_expand"], 128) > 0)


@pytest.mark.parametrize("codec_numbers", [(5, 5), (2, 11), (-1, 2), (6, 2), (2, 6), (2, 7)])
def test_refused_codecs(codec_numbers):
    m, v = codec_numbers
    fmt = StateFormat(Codec("m", m, bias=1), Codec("v", v))
    state = make_state(8, FORMATS["e4m3_expand"])
    state.fmt = fmt
    with pytest.raises(ValueError, match="log8 holds no signs|softsign8 is too narrow|unknown codec number"):
        native_step([state])


def test_split_is_for_bfloat16():
    state = make_state(8, StateFormat(CODECS["e4m3_expand"], CODECS["e4m3_expand"], param_rounding="split"))
    with pytest.raises(ValueError, match="'split' stores bfloat16 parameters"):
        native_step([state])


def test_reference_math_is_not_vacuous():
    """The tolerance of the first-step test catches a missing bias correction."""
    state = make_state(1000, FORMATS["float32"])
    state.step += 1
    before = state.param.clone()
    native_step([state])
    wrong = (state.param - before).abs().mean()
    state_one = make_state(1000, FORMATS["float32"])
    native_step([state_one])
    right = (state_one.param - before).abs().mean()
    assert not math.isclose(wrong, right, rel_tol=1e-2)
