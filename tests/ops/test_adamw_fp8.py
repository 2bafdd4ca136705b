"""The fused AdamW step as an op: every backend against the reference and torch, schema, containment of bad numbers, errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from coat_kernels.formats import CODECS, get_codec, num_groups
from coat_kernels.formats.parameters import split_decode
from coat_kernels.formats.reference import decode_group
from coat_kernels.ops.adamw_fp8 import AdamWFP8Bucket, Hyperparameters, StateFormat, StateLists, adamw_fp8_
from coat_kernels.ops.adamw_fp8.reference import adamw_fp8 as reference_step
from tests.codes import places

SIZES = [(0,), (1,), (127,), (128,), (129,), (), (33, 77), (5000,)]
SECOND = ["e4m3_expand", "e5m2_expand", "e4m3", "e5m2", "log8", "float32", "e2m1_expand", "e2m1", "bfloat16"]
HYPER = Hyperparameters(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
#: Share of codes one step beside the reference's; an update by one last bit can also move one.
MAY_DIFFER = {"cpu": 2e-3, "cuda": 4e-3}


def make(shapes, fmt: StateFormat, device: torch.device, dtype=torch.float32, grad_dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    grads = [
        (torch.randn(s, generator=generator) * torch.exp(torch.randn(s, generator=generator))).mul(1e-2).to(device, grad_dtype)
        for s in shapes
    ]
    state = StateLists(indices=list(range(len(shapes))))
    for p in params:
        for codec, target in ((fmt.exp_avg, state.exp_avgs), (fmt.exp_avg_sq, state.exp_avg_sqs)):
            target.append(torch.zeros(codec.codes_shape(p.shape), dtype=codec.array_dtype, device=device))
        groups = num_groups(p.numel(), fmt.group_size) if fmt.quantized else 0
        state.amaxs.append(torch.zeros(groups, 2, device=device))
        state.k16s.append(torch.full((groups, 2), 16, dtype=torch.uint8, device=device))
        state.steps.append(torch.zeros((), device=device))
        if fmt.param_rounding == "split":
            state.residuals.append(torch.zeros(p.shape, dtype=torch.int8, device=device))
    return params, grads, state


def decoded(state: StateLists, fmt: StateFormat, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    moments = []
    for column, (codec, tensors) in enumerate(((fmt.exp_avg, state.exp_avgs), (fmt.exp_avg_sq, state.exp_avg_sqs))):
        tensor = tensors[i]
        if codec.quantized:
            tensor = decode_group(tensor, state.amaxs[i][:, column], state.k16s[i][:, column], codec, fmt.group_size, dtype=torch.float64)
        moments.append(tensor.double())
    return moments[0], moments[1]


def check_against_reference(before, grads, after, old: StateLists, new: StateLists, fmt, hyper, device) -> None:
    """One step of a backend from `old` equals the float64 reference's, code for code within a step."""
    differ = total = 0
    for i, (p, g) in enumerate(zip(before, grads, strict=True)):
        residual = old.residuals[i] if old.residuals else None
        step = int(old.steps[i]) + 1
        want = reference_step(
            p,
            g,
            old.exp_avgs[i],
            old.exp_avg_sqs[i],
            old.amaxs[i],
            old.k16s[i],
            residual,
            step=step,
            index=i,
            fmt=fmt,
            hyper=hyper,
            dtype=torch.float64,
        )
        assert new.steps[i] == step
        if residual is None and p.dtype == torch.float32:
            update = (want[0] - p).abs()
            assert ((after[i] - want[0]).abs() <= 2e-6 * update + 1.2e-7 * want[0].abs()).all()
        for got, codes, codec in ((new.exp_avgs[i], want[1], fmt.exp_avg), (new.exp_avg_sqs[i], want[2], fmt.exp_avg_sq)):
            if codec.quantized:
                difference = (places(got, codec, p.shape) - places(codes, codec, p.shape)).abs()
                assert difference.numel() == 0 or difference.max() <= 1
                differ, total = differ + int((difference > 0).sum()), total + difference.numel()
            elif codec.array_dtype == torch.bfloat16:
                assert (got != codes).sum() <= 2e-3 * got.numel() + 1
                assert torch.allclose(got, codes, rtol=2**-7, atol=0)
            else:
                assert torch.allclose(got, codes, rtol=1e-6, atol=0)
        if fmt.quantized:
            assert torch.allclose(new.amaxs[i], want[3], rtol=2e-6, atol=0)
            # the largest and smallest of a group may differ in the last bit, and k16 with them, by one
            assert (new.k16s[i].int() - want[4].int()).abs().amax().item() <= 1 if new.k16s[i].numel() else True
    assert differ <= MAY_DIFFER[device.type] * max(total, 1) + 2


def copy_state(state: StateLists) -> StateLists:
    fields = {f.name: [t.clone() if isinstance(t, torch.Tensor) else t for t in getattr(state, f.name)] for f in dataclasses.fields(state)}
    return StateLists(**fields)


@pytest.mark.parametrize("first", ["e4m3_expand", "e5m2", "float32", "softsign8", "e2m1_expand"])
@pytest.mark.parametrize("second", SECOND)
def test_agrees_with_the_reference_and_torch(first: str, second: str, device: torch.device) -> None:
    fmt = StateFormat(get_codec(first), get_codec(second))
    params, grads, state = make(SIZES, fmt, device)
    twins = [p.double().cpu() for p in params]
    moments = [[torch.zeros_like(t), torch.zeros_like(t)] for t in twins]
    bucket = AdamWFP8Bucket(params, grads, state.states(fmt), state.indices, fmt)
    for step in range(1, 11):
        before, old = [p.clone() for p in params], copy_state(state)
        bucket.step(HYPER, grads)
        check_against_reference(before, grads, params, old, state, fmt, HYPER, device)
        for t, g, (m, v), p in zip(twins, grads, moments, params, strict=True):
            g = g.double().cpu()
            t.mul_(1 - HYPER.lr * HYPER.weight_decay)
            m.lerp_(g, 1 - HYPER.beta1)
            v.mul_(HYPER.beta2).addcmul_(g, g, value=1 - HYPER.beta2)
            denominator = v.sqrt() / math.sqrt(1 - HYPER.beta2**step) + HYPER.eps
            t.addcdiv_(m, denominator, value=-HYPER.lr / (1 - HYPER.beta1**step))
            if step == 1:  # nothing has been encoded yet: float32 rounding is all there is
                assert torch.allclose(p.double().cpu(), t, rtol=2e-7, atol=2e-6 * HYPER.lr)
            elif step in (2, 3, 10) and first == "e4m3_expand" and second in ("e4m3_expand", "log8") and p.numel() > 100:
                # the same gradient over again: each update is near lr, and the codes move it by 3 % on average
                assert ((p.double().cpu() - t).abs().mean() <= 0.06 * HYPER.lr * step).all()


@pytest.mark.parametrize("second", ["e4m3_expand", "log8"])
@pytest.mark.parametrize("group_size", [32, 64, 256])
def test_group_sizes(second: str, group_size: int, device: torch.device) -> None:
    fmt = StateFormat(get_codec("e4m3_expand"), get_codec(second), group_size)
    params, grads, state = make(SIZES, fmt, device)
    bucket = AdamWFP8Bucket(params, grads, state.states(fmt), state.indices, fmt)
    for _ in range(3):
        before, old = [p.clone() for p in params], copy_state(state)
        bucket.step(HYPER, grads)
        check_against_reference(before, grads, params, old, state, fmt, HYPER, device)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "split"),
        (torch.float16, "nearest"),
        (torch.float16, "stochastic"),
    ],
)
def test_sixteen_bit_parameters(dtype, rounding: str, grad_dtype, device: torch.device) -> None:
    codec = get_codec("e4m3_expand")
    fmt = StateFormat(codec, codec, param_rounding=rounding, seed=3)
    params, grads, state = make(SIZES, fmt, device, dtype, grad_dtype)
    bucket = AdamWFP8Bucket(params, grads, state.states(fmt), state.indices, fmt)
    for step in range(1, 4):
        before, old = [p.clone() for p in params], copy_state(state)
        bucket.step(HYPER, grads)
        check_against_reference(before, grads, params, old, state, fmt, HYPER, device)
        for i, p in enumerate(params):
            residual = old.residuals[i] if old.residuals else None
            want = reference_step(
                before[i], grads[i], old.exp_avgs[i], old.exp_avg_sqs[i], old.amaxs[i], old.k16s[i], residual,
                step=step, index=i, fmt=fmt, hyper=HYPER, dtype=torch.float64,
            )  # fmt: skip
            moved = p != want[0]
            # an update whose float32 value lies within its last bits of a rounding boundary may be stored one step beside
            assert moved.float().sum() <= 2e-3 * p.numel() + 1
            assert torch.allclose(p.float(), want[0].float(), rtol=2.0**-7 if dtype == torch.bfloat16 else 2.0**-10, atol=1e-7)
            if rounding == "split":
                got, exact = split_decode(p, state.residuals[i]), split_decode(want[0], want[5])
                # one step of 24 bits, and what float32 loses where parameter and update cancel
                assert ((got - exact).abs() <= 2.0**-15 * exact.abs() + 2e-6 * HYPER.lr).all()


@pytest.mark.parametrize(
    ("first", "second"),
    [("e4m3_expand", "e4m3_expand"), ("e4m3_expand", "log8"), ("softsign8", "bfloat16"), ("e2m1", "e2m1_expand"), ("bfloat16", "e2m1")],
)
def test_stochastic_moments_draw_as_the_reference(first: str, second: str, device: torch.device) -> None:
    fmt = StateFormat(get_codec(first), get_codec(second), 128, "stochastic", "stochastic", seed=11)
    params, grads, state = make(SIZES, fmt, device)
    bucket = AdamWFP8Bucket(params, grads, state.states(fmt), state.indices, fmt)
    for _ in range(3):
        before, old = [p.clone() for p in params], copy_state(state)
        bucket.step(HYPER, grads)
        check_against_reference(before, grads, params, old, state, fmt, HYPER, device)


@pytest.mark.parametrize("second", ["e4m3_expand", "e4m3", "log8", "float32"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_touches_its_own_element_only(second: str, bad: float, device: torch.device) -> None:
    fmt = StateFormat(get_codec("e4m3_expand"), get_codec(second))
    for position in (0, 1, 63, 127, 128, 299):
        params, grads, state = make([(300,)], fmt, device)
        clean_params, clean_grads, clean_state = make([(300,)], fmt, device)
        grads[0][position] = bad
        # the neighbours must be as if that element had no part in its group
        clean_grads[0][position] = 0
        clean_params[0][position] = 0
        for _ in range(2):
            AdamWFP8Bucket(params, grads, state.states(fmt), state.indices, fmt).step(HYPER, grads)
            AdamWFP8Bucket(clean_params, clean_grads, clean_state.states(fmt), clean_state.indices, fmt).step(HYPER, clean_grads)
        others = torch.arange(300, device=device) != position
        # a group with a NaN code is decoded by a slower, exact path: the last bit may differ, and rarely a code with it
        assert torch.allclose(params[0][others], clean_params[0][others], rtol=2.4e-7, atol=2e-6 * HYPER.lr)
        assert params[0][position].isnan()
        for mine, clean in ((state.exp_avgs, clean_state.exp_avgs), (state.exp_avg_sqs, clean_state.exp_avg_sqs)):
            got, want = mine[0][others], clean[0][others]
            if got.dtype == torch.uint8:
                assert (got.int() - want.int()).abs().max() <= 1
                assert (got != want).sum() <= 2
            else:
                assert torch.allclose(got, want, rtol=4e-6)


def test_an_overflowing_second_moment_stands_still(device: torch.device) -> None:
    codec = get_codec("e4m3_expand")
    fmt = StateFormat(codec, codec)
    params, grads, state = make([(128,)], fmt, device)
    grads[0][5] = 1e30  # finite, but its square is not
    start = params[0][5].item()
    for _ in range(3):
        AdamWFP8Bucket(params, grads, state.states(fmt), state.indices, fmt).step(dataclasses.replace(HYPER, weight_decay=0.0), grads)
    assert params[0].isfinite().all()
    assert params[0][5].item() == pytest.approx(start, abs=1e-6)
    assert decoded(state, fmt, 0)[1].isfinite().all()


def test_found_inf_changes_nothing_and_scale_divides(device: torch.device) -> None:
    codec = get_codec("e4m3_expand")
    fmt = StateFormat(codec, codec)
    params, grads, state = make(SIZES, fmt, device)
    before, old = [p.clone() for p in params], copy_state(state)
    AdamWFP8Bucket(params, grads, state.states(fmt), state.indices, fmt).step(
        dataclasses.replace(HYPER, found_inf=torch.ones(1, device=device)), grads
    )
    assert all(map(torch.equal, params, before))
    for f in dataclasses.fields(state):
        if f.name != "indices":
            assert all(map(torch.equal, getattr(state, f.name), getattr(old, f.name)))
    plain_params, _, plain_state = make(SIZES, fmt, device)
    AdamWFP8Bucket(plain_params, grads, plain_state.states(fmt), plain_state.indices, fmt).step(HYPER, grads)
    scaled = [g * 1024 for g in grads]
    hyper = dataclasses.replace(HYPER, grad_scale=torch.full((1,), 1024.0, device=device), found_inf=torch.zeros(1, device=device))
    AdamWFP8Bucket(params, scaled, state.states(fmt), state.indices, fmt).step(hyper, scaled)
    assert all(map(torch.equal, params, plain_params))


def test_many_tensors_in_one_launch_equal_one_at_a_time(device: torch.device) -> None:
    fmt = StateFormat(get_codec("e4m3_expand"), get_codec("log8"), exp_avg_sq_rounding="stochastic")
    shapes = [(n,) for n in (1, 77, 128, 129, 512, 513, 1151, 3072, 70_000)]
    together, alone = make(shapes, fmt, device), make(shapes, fmt, device)
    for _ in range(3):
        AdamWFP8Bucket(together[0], together[1], together[2].states(fmt), together[2].indices, fmt).step(HYPER, together[1])
        for i in range(len(shapes)):
            single = StateLists(
                *([getattr(alone[2], f.name)[i]] if getattr(alone[2], f.name) else [] for f in dataclasses.fields(StateLists))
            )
            AdamWFP8Bucket([alone[0][i]], [alone[1][i]], single.states(fmt), single.indices, fmt).step(HYPER, [alone[1][i]])
    assert all(map(torch.equal, together[0], alone[0]))
    for name in ("exp_avgs", "exp_avg_sqs", "amaxs", "k16s"):
        assert all(map(torch.equal, getattr(together[2], name), getattr(alone[2], name)))


def test_misaligned_parameters_and_gradients(device: torch.device) -> None:
    codec = get_codec("e4m3_expand")
    fmt = StateFormat(codec, codec)
    params, grads, state = make([(1000,)], fmt, device)
    other = make([(1000,)], fmt, device)[2]
    shifted = [torch.empty(1003, device=device)[3:].copy_(params[0])]
    shifted_grads = [torch.empty(1001, device=device)[1:].copy_(grads[0])]
    AdamWFP8Bucket(params, grads, state.states(fmt), state.indices, fmt).step(HYPER, grads)
    AdamWFP8Bucket(shifted, shifted_grads, other.states(fmt), other.indices, fmt).step(HYPER, shifted_grads)
    assert torch.equal(shifted[0], params[0])
    assert torch.equal(other.exp_avgs[0], state.exp_avgs[0])


def call(params, grads, state: StateLists, **kwargs) -> None:
    lists = (state.exp_avgs, state.exp_avg_sqs, state.amaxs, state.k16s, state.residuals, state.steps)
    adamw_fp8_(params, grads, *lists, torch.tensor(1e-2), 0.9, 0.99, 1e-8, 0.1, **kwargs)


def test_opcheck_and_schema(device: torch.device) -> None:
    fmt = StateFormat(CODECS["e4m3_expand"], CODECS["e4m3_expand"])
    params, grads, state = make([(300,), (5, 7)], fmt, device)
    lists = (state.exp_avgs, state.exp_avg_sqs, state.amaxs, state.k16s, state.residuals, state.steps)
    torch.library.opcheck(adamw_fp8_.default, (params, grads, *lists, torch.tensor(1e-2), 0.9, 0.99, 1e-8, 0.1))
    mutated = {a.name for a in adamw_fp8_.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert mutated == {"params", "exp_avgs", "exp_avg_sqs", "amaxs", "k16s", "residuals", "steps"}


def test_op_errors() -> None:
    fmt = StateFormat(CODECS["e4m3_expand"], CODECS["e4m3_expand"])
    params, grads, state = make([(300,)], fmt, torch.device("cpu"))
    with pytest.raises(ValueError, match="grads has 0 tensors and params 1"):
        call(params, [], state)
    with pytest.raises(TypeError, match=r"grads\[0\] has dtype torch.float64"):
        call(params, [grads[0].double()], state)
    with pytest.raises(ValueError, match=r"amaxs\[0\] has shape \(3, 2\); \(2, 2\) is needed"):
        call(params, grads, state, group_size=256)
    with pytest.raises(ValueError, match="not contiguous"):
        call([torch.zeros(300, 2)[:, 0]], grads, state)
    with pytest.raises(ValueError, match="unknown codec 'e3m4'"):
        call(params, grads, state, exp_avg_codec="e3m4")
    with pytest.raises(ValueError, match="cannot hold exp_avg"):
        call(params, grads, state, exp_avg_codec="log8")
    with pytest.raises(ValueError, match="'softsign8' is too narrow for exp_avg_sq"):
        call(params, grads, state, exp_avg_sq_codec="softsign8")
    with pytest.raises(ValueError, match="'dynamic8' scales blocks, not groups"):
        call(params, grads, state, exp_avg_codec="dynamic8")
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] has shape \(300,\); \(150,\) is needed"):
        call(params, grads, state, exp_avg_codec="e2m1")
    with pytest.raises(TypeError, match=r"exp_avg_sqs\[0\] has dtype torch.uint8; one launch takes one dtype of torch.bfloat16"):
        call(params, grads, state, exp_avg_sq_codec="bfloat16")
    with pytest.raises(ValueError, match="residuals has 0 tensors"):
        call(params, grads, state, param_rounding="split")
    before = params[0].clone()
    assert torch.equal(params[0], before)
