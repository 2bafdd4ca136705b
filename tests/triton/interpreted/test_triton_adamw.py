"""The fused step in the interpreter against float64: the PyTorch reference from the same state, and torch's own AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.codecs import CODECS, STREAM_EXP_AVG_SQ, Codec, num_groups
from coat_kernels.formats.random import stream_key
from coat_kernels.formats.reference import decode_group, encode_group
from coat_kernels.ops.adamw_fp8 import AdamWFP8Bucket, Hyperparameters, StateFormat, StateLists, reference
from coat_kernels.ops.adamw_fp8 import triton as kernel
from tests.codes import places

E4M3, LOG8, FLOAT32 = CODECS["e4m3_expand"], CODECS["log8"], CODECS["float32"]
HYPER = Hyperparameters(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def fresh_state(params: list[Tensor], fmt: StateFormat) -> StateLists:
    state = StateLists(indices=list(range(len(params))))
    for p in params:
        groups = num_groups(p.numel(), fmt.group_size)
        state.exp_avgs.append(torch.zeros(fmt.exp_avg.codes_shape(p.shape), dtype=fmt.exp_avg.array_dtype))
        state.exp_avg_sqs.append(torch.zeros(fmt.exp_avg_sq.codes_shape(p.shape), dtype=fmt.exp_avg_sq.array_dtype))
        state.amaxs.append(torch.zeros(groups, 2))
        state.k16s.append(torch.tensor([16, 1 if fmt.exp_avg_sq is LOG8 else 16], dtype=torch.uint8).repeat(groups, 1))
        state.steps.append(torch.zeros(()))
        if fmt.param_rounding == "split":
            state.residuals.append(torch.zeros(p.shape, dtype=torch.int8))
    return state


def step(params: list[Tensor], grads: list[Tensor], state: StateLists, fmt: StateFormat, hyper: Hyperparameters = HYPER) -> None:
    bucket = AdamWFP8Bucket(params, grads, state.states(fmt), state.indices, fmt, use_reference=True)
    tiles = kernel.make_tiles([p.numel() for p in params], fmt.group_size)
    corrections = torch.full((len(params), 4), torch.nan)
    kernel.step(bucket.table.host, tiles, corrections, fmt, hyper, param_dtype=params[0].dtype, grad_dtype=grads[0].dtype)


def gradients(numel: int, seed: int) -> Tensor:
    """Groups of several widths, one of zeros, one of equal magnitudes, zeros among the rest."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(numel, generator=generator) * torch.exp(torch.randn(numel, generator=generator))
    g[::50] = 0
    g[128:256] = 0
    g[384:512] = 0.25
    g[512:640] *= 1e-3
    return g


def compare_with_reference(
    params: list[Tensor],
    old: list[Tensor],
    grads: list[Tensor],
    before: StateLists,
    after: StateLists,
    fmt: StateFormat,
    hyper: Hyperparameters,
) -> None:
    for i, grad in enumerate(grads):
        residual = before.residuals[i] if before.residuals else None
        want = reference.adamw_fp8(
            old[i], grad, before.exp_avgs[i], before.exp_avg_sqs[i], before.amaxs[i], before.k16s[i], residual,
            step=int(after.steps[i]), index=i, fmt=fmt, hyper=hyper, dtype=torch.float64,
        )  # fmt: skip
        p, m, v, amax, k16, _ = want
        # float32 rounding of the step and 4e-6 of the decoded moments, which the update sees in proportion to lr, or to itself: a second
        # moment of seven magnitudes makes updates of many lr
        tolerance = 1e-6 * p.float().abs() + 3e-6 * hyper.lr + 6e-6 * (p.float() - old[i].float()).abs()
        if params[i].dtype != torch.float32:
            tolerance = tolerance + p.float().abs() * torch.finfo(p.dtype).eps
        assert bool(((params[i].float() - p.float()).abs() <= tolerance).all())
        for codec, got, expected, column in ((fmt.exp_avg, after.exp_avgs[i], m, 0), (fmt.exp_avg_sq, after.exp_avg_sqs[i], v, 1)):
            if codec.array_dtype == torch.bfloat16:
                # a float32 result on the other side of a rounding boundary, which 16-bit gradients often lie at
                assert int((got != expected).sum()) <= 0.01 * got.numel()
                torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6 * float(grad.float().abs().max()))
                continue
            if not codec.quantized:
                # the sum of old moment and gradient may cancel: rounding counts against its terms
                assert bool(((got - expected).abs() <= 1e-6 * (expected.abs() + grad.float().abs())).all())
                continue
            # the new moment in float32 is off by its rounding and the decode's 4e-6: amax with it, k16 by a step at a boundary
            torch.testing.assert_close(after.amaxs[i][:, column], amax[:, column], rtol=5e-6, atol=0)
            step_off = (after.k16s[i][:, column].int() - k16[:, column].int()).abs()
            assert int(step_off.max(initial=0) if step_off.numel() == 0 else step_off.max()) <= 1
            got, expected = places(got, codec, grad.shape), places(expected, codec, grad.shape)
            same_k = (step_off == 0).repeat_interleave(fmt.group_size)[: got.numel()]
            off = (got - expected).abs()[same_k]
            assert int(off.max()) <= 1 if off.numel() else True
            # README.md, "How far backends may differ"
            assert int((off > 0).sum()) <= max(2, 0.004 * off.numel())


def copies(state: StateLists) -> StateLists:
    lists = (state.exp_avgs, state.exp_avg_sqs, state.amaxs, state.k16s, state.residuals, state.steps)
    return StateLists(*[[t.clone() for t in tensors] for tensors in lists], list(state.indices))


@pytest.mark.parametrize(
    "m, v", [
        (E4M3, E4M3), (E4M3, LOG8), (CODECS["e5m2_expand"], CODECS["e4m3"]), (FLOAT32, LOG8), (E4M3, FLOAT32), (FLOAT32, FLOAT32),
        (CODECS["softsign8"], LOG8), (CODECS["e2m1_expand"], CODECS["e2m1_expand"]), (CODECS["e2m1"], CODECS["bfloat16"]),
        (CODECS["bfloat16"], CODECS["e2m1"]),
    ],
    ids=lambda codec: codec.name,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_agree_with_the_reference(m: Codec, v: Codec, dtype: torch.dtype) -> None:
    fmt = StateFormat(m, v)
    params = [torch.randn(1030).to(dtype)]
    state = fresh_state(params, fmt)
    for t in range(1, 11):
        grads = [gradients(1030, t).to(dtype)]
        before, old = copies(state), [p.clone() for p in params]
        step(params, grads, state, fmt)
        assert int(state.steps[0]) == t
        if t in (1, 2, 3, 10):
            compare_with_reference(params, old, grads, before, state, fmt, HYPER)


@pytest.mark.parametrize("m, v", [("softsign8", "log8"), ("softsign8", "bfloat16"), ("e2m1_expand", "e2m1_expand"), ("bfloat16", "e2m1")])
def test_codes_rounded_by_chance(m: str, v: str) -> None:
    """Three whole tiles and an odd tail; the draws are the reference's."""
    fmt = StateFormat(CODECS[m], CODECS[v], 64, "stochastic", "stochastic", seed=5)
    params = [torch.randn(1603)]
    state = fresh_state(params, fmt)
    for t in range(1, 4):
        grads = [gradients(1603, t)]
        before, old = copies(state), [p.clone() for p in params]
        step(params, grads, state, fmt)
        compare_with_reference(params, old, grads, before, state, fmt, HYPER)


@pytest.mark.parametrize("v", [E4M3, LOG8], ids=lambda codec: codec.name)
def test_the_first_step_is_torchs(v: Codec) -> None:
    g = gradients(1500, 0)
    p = torch.nn.Parameter(torch.zeros(1500))
    p.grad = g.clone()
    torch.optim.AdamW([p], lr=HYPER.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01).step()
    got = [torch.zeros(1500)]
    fmt = StateFormat(E4M3, v)
    step(got, [g], fresh_state(got, fmt), fmt)
    torch.testing.assert_close(got[0], p.data, rtol=1e-6, atol=0)


def run(params: list[Tensor], fmt: StateFormat, steps: int = 3, hyper: Hyperparameters = HYPER) -> StateLists:
    state = fresh_state(params, fmt)
    for t in range(steps):
        step(params, [gradients(p.numel(), 10 * i + t).to(p.dtype) for i, p in enumerate(params)], state, fmt, hyper)
    return state


@pytest.mark.parametrize("group_size", [32, 128, 256])
@pytest.mark.parametrize("fmt", [StateFormat(E4M3, E4M3), StateFormat(E4M3, LOG8, exp_avg_sq_rounding="stochastic", seed=7)])
def test_many_ragged_tensors_equal_one_at_a_time(fmt: StateFormat, group_size: int, request: pytest.FixtureRequest) -> None:
    from coat_kernels.formats import triton_ptx

    fmt = StateFormat(fmt.exp_avg, fmt.exp_avg_sq, group_size, "nearest", fmt.exp_avg_sq_rounding, "nearest", fmt.seed)
    sizes = [0, 1, 127, 128, 129, 512, 600]
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator) for n in sizes]
    alone = [p.clone() for p in params]
    together = run(params, fmt, steps=2)
    exact = kernel.instruction_set(params[0]) == triton_ptx.PORTABLE.value
    assert all(bool((p != old).all()) for p, old in zip(params, alone, strict=True))
    for i, p in enumerate(alone):
        state = fresh_state([p], fmt)
        state.indices = [i]
        for t in range(2):
            step([p], [gradients(p.numel(), 10 * i + t)], state, fmt)
        assert float(together.steps[i]) == 2
        if exact:
            assert torch.equal(p, params[i]) and torch.equal(state.exp_avgs[0], together.exp_avgs[i])
            assert torch.equal(state.exp_avg_sqs[0], together.exp_avg_sqs[i]) and torch.equal(state.amaxs[0], together.amaxs[i])
            assert torch.equal(state.k16s[0], together.k16s[i])
        else:
            # the assembly's results carry random errors here: a code may be one off, worth a fraction of an update
            torch.testing.assert_close(p, params[i], rtol=0, atol=0.2 * HYPER.lr)


def test_the_checked_path_gives_what_the_plain_one_does() -> None:
    """One gradient at an odd address sends whole tiles through the checked path."""
    fmt = StateFormat(E4M3, LOG8)
    buffer = torch.zeros(1025)
    plain, checked = [torch.randn(1024)], [buffer[1:]]
    assert checked[0].data_ptr() % 16 == 4
    checked[0].copy_(plain[0])
    a, b = run(plain, fmt, steps=1), run(checked, fmt, steps=1)
    torch.testing.assert_close(plain[0], checked[0], rtol=1e-6, atol=1e-6 * HYPER.lr)
    torch.testing.assert_close(a.amaxs[0], b.amaxs[0], rtol=1e-6, atol=0)
    for x, y in ((a.exp_avgs[0], b.exp_avgs[0]), (a.exp_avg_sqs[0], b.exp_avg_sqs[0])):
        off = (x.int() - y.int()).abs()
        assert int(off.max()) <= 1 and int((off > 0).sum()) <= 4


@pytest.mark.parametrize("v", [E4M3, LOG8], ids=lambda codec: codec.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_touches_its_own_element_only(v: Codec, bad: float) -> None:
    fmt = StateFormat(E4M3, v)
    clean, dirty = [torch.ones(640)], [torch.ones(640)]
    g = [gradients(640, t) for t in range(3)]
    state_clean, state_dirty = fresh_state(clean, fmt), fresh_state(dirty, fmt)
    at = torch.tensor([3, 130, 639])
    for t in range(3):
        spoilt = g[t].clone()
        quiet = g[t].clone()
        quiet[at] = 0
        if t == 1:
            spoilt[at] = bad
        else:
            spoilt[at] = 0
        step(clean, [quiet], state_clean, fmt)
        step(dirty, [spoilt], state_dirty, fmt)
        others = torch.ones(640, dtype=torch.bool)
        others[at] = False
        torch.testing.assert_close(dirty[0][others], clean[0][others], rtol=0, atol=0.02 * HYPER.lr)
        torch.testing.assert_close(state_dirty.amaxs[0], state_clean.amaxs[0], rtol=1e-4, atol=0)
        if t >= 1:
            assert bool(dirty[0][at].isnan().all() if bad != bad else (~torch.isfinite(dirty[0][at]) | (dirty[0][at] == 1)).all())
            assert bool((state_dirty.exp_avgs[0][at] == 0x7F).all())
            values = decode_group(state_dirty.exp_avgs[0], state_dirty.amaxs[0][:, 0], state_dirty.k16s[0][:, 0], E4M3, 128)
            assert bool(values[at].isnan().all()) and bool(torch.isfinite(values[others]).all())


def test_a_square_that_overflows_stands_still() -> None:
    fmt = StateFormat(E4M3, LOG8)
    params, g = [torch.ones(512)], torch.ones(512)
    g[7] = 3e30
    state = fresh_state(params, fmt)
    step(params, [g], state, fmt)
    assert float(params[0][7]) == pytest.approx(1 - 1e-4) and float(state.amaxs[0][0, 1]) == torch.finfo(torch.float32).max
    assert bool(torch.isfinite(params[0]).all())


@pytest.mark.parametrize("scale", [1e-24, 1e-21, 1e12, 1e19])
def test_gradients_of_any_size(scale: float) -> None:
    """Adam does not know the unit of its gradients: squares that are subnormal or huge move parameters as ordinary ones do."""
    fmt, hyper = StateFormat(E4M3, LOG8), Hyperparameters(1e-2, 0.9, 0.999, 1e-8 * scale, 0.0)
    big, plain = [torch.zeros(512)], [torch.zeros(512)]
    big_state, state = fresh_state(big, fmt), fresh_state(plain, fmt)
    for t in range(3):
        g = torch.randn(512, generator=torch.Generator().manual_seed(t))
        step(big, [g * scale], big_state, fmt, hyper)
        step(plain, [g], state, fmt, Hyperparameters(1e-2, 0.9, 0.999, 1e-8, 0.0))
    # squares of 1e-24 underflow in float32, as they do for torch: what holds there is that nothing blows up
    if scale >= 1e-18:
        torch.testing.assert_close(big[0], plain[0], rtol=0, atol=1e-3)
    assert bool(torch.isfinite(big[0]).all())


def test_moments_die_away_on_the_plain_path() -> None:
    """Rows without gradients decay through the subnormals: no NaN, no code but 0 for what is 0, and parameters stand still."""
    fmt = StateFormat(E4M3, E4M3)
    params = [torch.ones(512)]
    state = fresh_state(params, fmt)
    hyper = Hyperparameters(1e-3, 0.1, 0.2, 1e-8, 0.0)
    step(params, [gradients(512, 0)], state, fmt, hyper)
    for _ in range(40):
        step(params, [torch.zeros(512)], state, fmt, hyper)
    assert bool(torch.isfinite(params[0]).all()) and bool((state.amaxs[0] < 1e-20).all())
    before = params[0].clone()
    step(params, [torch.zeros(512)], state, fmt, hyper)
    assert torch.equal(before, params[0])


def test_found_inf_changes_nothing() -> None:
    fmt = StateFormat(E4M3, LOG8)
    params = [torch.randn(600)]
    state = fresh_state(params, fmt)
    old, before = params[0].clone(), copies(state)
    hyper = Hyperparameters(1e-2, 0.9, 0.999, 1e-8, 0.01, found_inf=torch.ones(1), grad_scale=torch.ones(1))
    step(params, [gradients(600, 0)], state, fmt, hyper)
    assert torch.equal(params[0], old) and float(state.steps[0]) == 0 and torch.equal(state.amaxs[0], before.amaxs[0])
    step(params, [gradients(600, 0)], state, fmt, Hyperparameters(1e-2, 0.9, 0.999, 1e-8, 0.01, found_inf=torch.zeros(1)))
    assert not torch.equal(params[0], old) and float(state.steps[0]) == 1


def test_tensor_lr_grad_scale_and_maximize() -> None:
    fmt = StateFormat(E4M3, LOG8)
    plain, other = [torch.ones(1000)], [torch.ones(1000)]
    g = gradients(1000, 3)
    step(plain, [g], fresh_state(plain, fmt), fmt, Hyperparameters(1e-2, 0.9, 0.999, 1e-8, 0.01))
    hyper = Hyperparameters(torch.tensor(1e-2), 0.9, 0.999, 1e-8, 0.01, maximize=True, grad_scale=torch.tensor([1024.0]))
    step(other, [-g * 1024], fresh_state(other, fmt), fmt, hyper)
    # a tensor holds lr in float32, a number in double: the step may differ by a last bit, and with it the parameter (1.2e-7)
    torch.testing.assert_close(plain[0], other[0], rtol=1.3e-7, atol=1e-6 * 1e-2)


@pytest.mark.parametrize("hyper", [Hyperparameters(0.0, 0.9, 0.999, 1e-8, 0.01), Hyperparameters(torch.tensor(0.0), 0.9, 0.999, 1e-8, 0.1)])
def test_lr_zero_moves_nothing(hyper: Hyperparameters) -> None:
    fmt = StateFormat(E4M3, LOG8)
    params = [torch.randn(700)]
    old = params[0].clone()
    run(params, fmt, hyper=hyper)
    assert torch.equal(params[0], old)


@pytest.mark.parametrize(
    "eps, beta1, beta2", [(0.0, 0.9, 0.999), (1e-30, 0.9, 0.999), (1e-8, 0.0, 0.999), (1e-8, 0.0, 0.0), (1e6, 0.9, 0.99999)]
)
def test_edges_of_the_hyperparameters(eps: float, beta1: float, beta2: float) -> None:
    fmt, hyper = StateFormat(E4M3, E4M3), Hyperparameters(1e-2, beta1, beta2, eps, 0.0)
    g = gradients(600, 1)
    g = torch.where(g == 0, 1e-3, g)
    p = torch.nn.Parameter(torch.zeros(600))
    p.grad = g.clone()
    torch.optim.AdamW([p], lr=1e-2, betas=(beta1, beta2), eps=eps, weight_decay=0.0).step()
    got = [torch.zeros(600)]
    step(got, [g], fresh_state(got, fmt), fmt, hyper)
    torch.testing.assert_close(got[0], p.data, rtol=1.5e-6, atol=0)


def test_split_parameters_keep_24_bits() -> None:
    fmt = StateFormat(E4M3, LOG8, param_rounding="split")
    wide, split = [torch.ones(1000)], [torch.ones(1000, dtype=torch.bfloat16)]
    g = gradients(1000, 2).to(torch.bfloat16)
    state, state_split = fresh_state(wide, StateFormat(E4M3, LOG8)), fresh_state(split, fmt)
    for _ in range(3):
        step(wide, [g.float()], state, StateFormat(E4M3, LOG8))
        step(split, [g], state_split, fmt)
    bits = (split[0].view(torch.int16).int() << 16) + (state_split.residuals[0].int() << 8)
    # 2^-16 of a value a step, beside a code that may differ by one
    torch.testing.assert_close(bits.view(torch.float32), wide[0], rtol=3 * 2.0**-16, atol=0.01 * HYPER.lr)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_parameters_take_the_generators_draws(dtype: torch.dtype) -> None:
    fmt = StateFormat(FLOAT32, FLOAT32, param_rounding="stochastic", seed=11)
    params = [torch.randn(900).to(dtype), torch.randn(700).to(dtype)]
    state = fresh_state(params, fmt)
    for t in range(1, 3):
        grads = [gradients(p.numel(), t).to(dtype) for p in params]
        before, old = copies(state), [p.clone() for p in params]
        step(params, grads, state, fmt)
        for i in range(2):
            want = reference.adamw_fp8(
                old[i], grads[i], before.exp_avgs[i], before.exp_avg_sqs[i], before.amaxs[i], before.k16s[i], None,
                step=t, index=i, fmt=fmt, hyper=HYPER, dtype=torch.float64,
            )[0]  # fmt: skip
            # equal but where the float32 value's last bit decides
            assert int((params[i] != want).sum()) <= 0.01 * len(want)


def test_stochastic_moments_take_the_generators_draws() -> None:
    fmt = StateFormat(CODECS["e4m3_expand"], LOG8, 128, "stochastic", "stochastic", "nearest", 5)
    params = [torch.zeros(1024), torch.zeros(600)]
    state = fresh_state(params, fmt)
    grads = [gradients(p.numel(), i) for i, p in enumerate(params)]
    step(params, grads, state, fmt)
    for i, g in enumerate(grads):
        for values, codes, codec, stream in (
            (0.1 * g, state.exp_avgs[i], E4M3, 0),
            (0.001 * g * g, state.exp_avg_sqs[i], LOG8, STREAM_EXP_AVG_SQ),
        ):
            key = stream_key(5, 1, i, stream)
            want, _, _ = encode_group(values, codec, 128, signed=stream == 0, rounding="stochastic", key=key, dtype=torch.float64)
            nearest, _, _ = encode_group(values, codec, 128, signed=stream == 0, dtype=torch.float64)
            assert int((codes != want).sum()) <= 0.01 * len(g) < 0.1 * int((nearest != want).sum())


def test_tiles() -> None:
    tiles = kernel.make_tiles([0, 1, 512, 1100, 2**32], 128)
    assert tiles.dtype == torch.int32
    assert tiles[:5].tolist() == [[~1, 0], [2, 0], [3, 0], [3, 4], [~3, 8]]
    assert len(tiles) == 5 + 2**23 and tiles[-1].tolist() == [4, 2**25 - 4]


def test_without_eps_a_zero_gradient_is_its_own_undoing_only() -> None:
    """0/0, as in torch; the kernel's shared reciprocals must not hand it to a neighbour."""
    fmt, hyper = StateFormat(E4M3, E4M3), Hyperparameters(1e-2, 0.9, 0.999, 0.0, 0.0)
    g, params = torch.full((512,), 0.5), [torch.zeros(512)]
    g[100] = 0
    step(params, [g], fresh_state(params, fmt), fmt, hyper)
    assert bool(params[0][100].isnan())
    torch.testing.assert_close(params[0][g != 0], torch.full((511,), -1e-2), rtol=1e-6, atol=0)
