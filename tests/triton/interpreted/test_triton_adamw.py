"""The fused step in the interpreter against float64: the PyTorch reference from the same state, and torch's own AdamW."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.codecs import CODECS, STREAM_EXP_AVG_SQ, Codec, num_groups
from coat_kernels.formats.random import stream_key
from coat_kernels.formats.reference import decode_group, encode_group
from coat_kernels.ops.adamw_fp8 import Bucket, BucketState, Hyperparameters, StateFormat, reference
from coat_kernels.ops.adamw_fp8 import triton as kernel

E4M3, LOG8, FLOAT32 = CODECS["e4m3_expand"], CODECS["log8"], CODECS["float32"]
HYPER = Hyperparameters(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def fresh_state(params: list[Tensor], fmt: StateFormat) -> BucketState:
    state = BucketState(indices=list(range(len(params))))
    for p in params:
        groups = num_groups(p.numel(), fmt.group_size)
        state.exp_avgs.append(torch.zeros(p.shape, dtype=torch.uint8 if fmt.exp_avg.quantized else torch.float32))
        state.exp_avg_sqs.append(torch.zeros(p.shape, dtype=torch.uint8 if fmt.exp_avg_sq.quantized else torch.float32))
        state.amaxs.append(torch.zeros(groups, 2))
        state.k16s.append(torch.tensor([16, 1 if fmt.exp_avg_sq is LOG8 else 16], dtype=torch.uint8).repeat(groups, 1))
        state.steps.append(torch.zeros(()))
        if fmt.param_rounding == "split":
            state.residuals.append(torch.zeros(p.shape, dtype=torch.int8))
    return state


def step(params: list[Tensor], grads: list[Tensor], state: BucketState, fmt: StateFormat, hyper: Hyperparameters = HYPER) -> None:
    bucket = Bucket(params, grads, state, fmt, use_reference=True)
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
    before: BucketState,
    after: BucketState,
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
        # float32 rounding of the step and 4e-6 of the decoded moments, which the update sees in proportion to lr
        tolerance = 1e-6 * p.float().abs() + 3e-6 * hyper.lr
        if params[i].dtype != torch.float32:
            tolerance = tolerance + p.float().abs() * torch.finfo(p.dtype).eps
        assert bool(((params[i].float() - p.float()).abs() <= tolerance).all())
        for codec, got, expected, column in ((fmt.exp_avg, after.exp_avgs[i], m, 0), (fmt.exp_avg_sq, after.exp_avg_sqs[i], v, 1)):
            if not codec.quantized:
                # the sum of old moment and gradient may cancel: rounding counts against its terms
                assert bool(((got - expected).abs() <= 1e-6 * (expected.abs() + grad.float().abs())).all())
                continue
            # the new moment in float32 is off by its rounding and the decode's 4e-6: amax with it, k16 by a step at a boundary
            torch.testing.assert_close(after.amaxs[i][:, column], amax[:, column], rtol=5e-6, atol=0)
            step_off = (after.k16s[i][:, column].int() - k16[:, column].int()).abs()
            assert int(step_off.max(initial=0) if step_off.numel() == 0 else step_off.max()) <= 1
            same_k = (step_off == 0).repeat_interleave(fmt.group_size)[: got.numel()]
            off = (got.int() - expected.int()).abs()[same_k]
            assert int(off.max()) <= 1 if off.numel() else True
            # README.md, "How far backends may differ"
            assert int((off > 0).sum()) <= max(2, 0.004 * off.numel())


def copies(state: BucketState) -> BucketState:
    lists = (state.exp_avgs, state.exp_avg_sqs, state.amaxs, state.k16s, state.residuals, state.steps)
    return BucketState(*[[t.clone() for t in tensors] for tensors in lists], list(state.indices))


@pytest.mark.parametrize(
    "m, v", [(E4M3, E4M3), (E4M3, LOG8), (CODECS["e5m2_expand"], CODECS["e4m3"]), (FLOAT32, LOG8), (E4M3, FLOAT32), (FLOAT32, FLOAT32)],
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
