"""PyTorch reference of the fused AdamW step: a pure function of one tensor and its state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...formats.codecs import STREAM_EXP_AVG, STREAM_EXP_AVG_SQ, STREAM_PARAM
from ...formats.parameters import round_stochastic, split_decode, split_encode
from ...formats.random import stream_key
from ...formats.reference import decode_group, encode_group, round_bfloat16
from .settings import Hyperparameters, StateFormat

_FLOAT32_MAX = torch.finfo(torch.float32).max


def adamw_fp8(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    amax: Tensor,
    k16: Tensor,
    residual: Tensor | None,
    *,
    step: int,
    index: int,
    fmt: StateFormat,
    hyper: Hyperparameters,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """One AdamW step (arXiv 1711.05101, as `torch.optim.AdamW`) from encoded state to encoded state.

    Args:
        param: float32, bfloat16 or float16.
        grad: float32, bfloat16 or float16, shape of param.
        exp_avg, exp_avg_sq: as their codecs store them: `Codec.array_dtype` and `codes_shape`.
        amax: float32 [n_groups, 2], column 0 of exp_avg, 1 of exp_avg_sq; unused where neither is quantized.
        k16: uint8 [n_groups, 2], likewise.
        residual: int8, shape of param, for `param_rounding="split"`.
        step: the count this step reaches, from 1.
        index: the tensor's number in the generator's key.
        dtype: of the arithmetic.

    Returns:
        New param, exp_avg, exp_avg_sq, amax, k16, residual. The update uses the moments before they are encoded.
    """
    lr = float(hyper.lr)
    p = (split_decode(param, residual) if residual is not None else param).to(dtype)
    g = grad.to(dtype)
    if hyper.grad_scale is not None:
        g = g / float(hyper.grad_scale)
    if hyper.maximize:
        g = -g
    m, v = (
        decode_group(state, amax[:, column], k16[:, column], codec, fmt.group_size, shape=param.shape, dtype=dtype)
        if codec.quantized
        else state.to(dtype)
        for column, (state, codec) in enumerate(((exp_avg, fmt.exp_avg), (exp_avg_sq, fmt.exp_avg_sq)))
    )

    p = p * (1 - lr * hyper.weight_decay)
    m = hyper.beta1 * m + (1 - hyper.beta1) * g
    v = hyper.beta2 * v + (1 - hyper.beta2) * g * g
    step_size = lr / (1 - hyper.beta1**step)
    p = p - step_size * m / (v.sqrt() / math.sqrt(1 - hyper.beta2**step) + hyper.eps)

    v = torch.where(torch.isfinite(g), v.clamp(max=_FLOAT32_MAX), v).to(torch.float32)
    new_amax, new_k16 = amax.clone(), k16.clone()
    codes = []
    for column, (value, codec, rounding, stream) in enumerate(
        (
            (m.to(torch.float32), fmt.exp_avg, fmt.exp_avg_rounding, STREAM_EXP_AVG),
            (v, fmt.exp_avg_sq, fmt.exp_avg_sq_rounding, STREAM_EXP_AVG_SQ),
        )
    ):
        key = stream_key(fmt.seed, step, index, stream) if rounding == "stochastic" else 0
        if codec.quantized:
            value, new_amax[:, column], new_k16[:, column] = encode_group(
                value, codec, fmt.group_size, signed=column == 0, rounding=rounding, key=key, dtype=dtype
            )
        elif codec.array_dtype == torch.bfloat16:
            value = round_bfloat16(value, rounding, key)
        codes.append(value)
    stored, new_residual = _store(p.to(torch.float32), param.dtype, fmt, step, index)
    return stored, codes[0], codes[1], new_amax, new_k16, new_residual


def _store(p: Tensor, dtype: torch.dtype, fmt: StateFormat, step: int, index: int) -> tuple[Tensor, Tensor | None]:
    if fmt.param_rounding == "split":
        return split_encode(p)
    if fmt.param_rounding == "stochastic":
        return round_stochastic(p, dtype, stream_key(fmt.seed, step, index, STREAM_PARAM)), None
    return p.to(dtype), None
