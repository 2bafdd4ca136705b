"""PyTorch reference of the blockwise 8-bit step: a pure function of one tensor and its state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...formats.codecs import STREAM_PARAM
from ...formats.dynamic8 import decode_blocks, encode_blocks
from ...formats.parameters import round_stochastic, split_decode, split_encode
from ...formats.random import stream_key
from .settings import BlockwiseFormat, Hyperparameters8bit

_FLOAT32_MAX = torch.finfo(torch.float32).max
Result = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def step_8bit(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor | None,
    exp_avg_absmax: Tensor | None,
    exp_avg_sq_absmax: Tensor | None,
    residual: Tensor | None,
    *,
    step: int,
    index: int,
    fmt: BlockwiseFormat,
    hyper: Hyperparameters8bit,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """One step from encoded state to encoded state.

        adamw     m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p = (1 - lr wd) p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
        lion      p = (1 - lr wd) p - lr sign(b1 m + (1 - b1) g), NaN kept;  m = b2 m + (1 - b2) g
        momentum  m = b1 m + g;  p = m, or g + b1 m with `nesterov`: the update itself, p's old value is not read

    Args:
        param: float32, bfloat16 or float16.
        grad: float32, bfloat16 or float16, shape of param.
        exp_avg, exp_avg_sq: uint8 dynamic8 codes (signed, unsigned) or float32 values, shape of param; exp_avg_sq for "adamw" alone.
        exp_avg_absmax, exp_avg_sq_absmax: float32 [n_blocks] beside codes, else None.
        residual: int8, shape of param, for `param_rounding="split"`.
        step: the count this step reaches, from 1.
        index: the tensor's number in the generator's key.
        dtype: of the arithmetic.

    Returns:
        New param, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, residual; None where None came in. The update uses the moments
        before they are encoded.
    """
    p = (split_decode(param, residual) if residual is not None else param).to(dtype)
    g = grad.to(dtype)
    if hyper.grad_scale is not None:
        g = g / float(hyper.grad_scale)
    if hyper.maximize:
        g = -g
    m = _decode(exp_avg, exp_avg_absmax, fmt, signed=True).to(dtype)
    v = None if exp_avg_sq is None else _decode(exp_avg_sq, exp_avg_sq_absmax, fmt, signed=False).to(dtype)

    p, m, v = _advance(p, g, m, v, step, fmt, hyper)
    if v is not None:
        v = torch.where(torch.isfinite(g), v.clamp(max=_FLOAT32_MAX), v)
    m_stored, m_absmax = _encode(m, exp_avg_absmax, fmt, signed=True)
    v_stored, v_absmax = (None, None) if v is None else _encode(v, exp_avg_sq_absmax, fmt, signed=False)

    p = p.to(torch.float32)
    new_residual = None
    if fmt.param_rounding == "split":
        p, new_residual = split_encode(p)
    elif fmt.param_rounding == "stochastic":
        p = round_stochastic(p, param.dtype, stream_key(fmt.seed, step, index, STREAM_PARAM))
    return p.to(param.dtype), m_stored, v_stored, m_absmax, v_absmax, new_residual


def _advance(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor | None, step: int, fmt: BlockwiseFormat, hyper: Hyperparameters8bit
) -> tuple[Tensor, Tensor, Tensor | None]:
    lr, beta1, beta2 = float(hyper.lr), hyper.beta1, hyper.beta2
    if fmt.rule == "momentum":
        m = beta1 * m + g
        return (g + beta1 * m if hyper.nesterov else m), m, None
    p = p * (1 - lr * hyper.weight_decay)
    if fmt.rule == "lion":
        update = beta1 * m + (1 - beta1) * g
        sign = torch.where(update.isnan(), update, torch.sign(update))  # torch's sign of NaN is 0, which would hide it
        return p - lr * sign, beta2 * m + (1 - beta2) * g, None
    assert v is not None
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    return p - lr / (1 - beta1**step) * m / (v.sqrt() / math.sqrt(1 - beta2**step) + hyper.eps), m, v


def _decode(state: Tensor, absmax: Tensor | None, fmt: BlockwiseFormat, *, signed: bool) -> Tensor:
    return state if absmax is None else decode_blocks(state, absmax, fmt.block_size, signed=signed)


def _encode(value: Tensor, absmax: Tensor | None, fmt: BlockwiseFormat, *, signed: bool) -> tuple[Tensor, Tensor | None]:
    value = value.to(torch.float32)
    return (value, None) if absmax is None else encode_blocks(value, fmt.block_size, signed=signed, keep_nonzero=not signed)
