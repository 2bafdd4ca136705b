"""The fused AdamW step on a GPU: one launch for all tensors of a bucket, over its device table of pointers.

A program is one warp on 512 elements (four groups of 128): 16 elements a thread, so a group's reductions are three shuffles and
need no barrier. Whole tiles of regular numbers take the plain path, without masks and special cases. What is left (tails,
parameters or gradients at unaligned addresses, groups with NaN, inf, subnormals or a range over 32 octaves) is done again from
memory by the checked path, one group at a time so that it costs the plain one no registers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats.codecs import STREAM_EXP_AVG, STREAM_EXP_AVG_SQ, STREAM_PARAM
from ...formats.parameters import PARAM_ROUNDINGS
from ...formats.triton import (
    array_dtype,
    code_offset,
    codec_constant,
    decode_checked,
    decode_plain,
    encode_checked,
    encode_plain,
    has_plain_form,
    inverse_of_unit,
    is_dithered_in_tiles,
    load_codes,
    plain_range,
    sqrt_of_unit,
    store_codes,
)
from ...formats.triton_launch import device_guard, instruction_set, signed32, tl_dtype
from ...formats.triton_params import PARAM_SPLIT, PARAM_STOCHASTIC, load_param, round_bfloat16, store_param, stream_key, to_float32
from ...formats.triton_ptx import bits_of, float_of, reciprocal, scaled_reciprocal, sqrt
from .settings import COLUMNS, Hyperparameters, StateFormat

_TILE = tl.constexpr(512)
_ROWS_A_PROGRAM = 32
#: Two denominators share a reciprocal on the plain path: their product must neither vanish nor overflow.
_MIN_EPS, _MAX_EPS = tl.constexpr(2.0**-60), tl.constexpr(2.0**40)
_COLUMNS = tl.constexpr(len(COLUMNS))
_PARAM, _GRAD = tl.constexpr(COLUMNS.index("param")), tl.constexpr(COLUMNS.index("grad"))
_EXP_AVG, _EXP_AVG_SQ = tl.constexpr(COLUMNS.index("exp_avg")), tl.constexpr(COLUMNS.index("exp_avg_sq"))
_AMAX, _K16, _RESIDUAL = tl.constexpr(COLUMNS.index("amax")), tl.constexpr(COLUMNS.index("k16")), tl.constexpr(COLUMNS.index("residual"))
_STEP, _NUMEL, _INDEX = tl.constexpr(COLUMNS.index("step")), tl.constexpr(COLUMNS.index("numel")), tl.constexpr(COLUMNS.index("index"))
_STREAM_M, _STREAM_V, _STREAM_P = tl.constexpr(STREAM_EXP_AVG), tl.constexpr(STREAM_EXP_AVG_SQ), tl.constexpr(STREAM_PARAM)
_FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def advance_kernel(
    table_ptr,  # int64 [n_rows, 10]
    corrections_ptr,  # float32 [n_rows, 4]
    n_rows,
    lr,  # float32, or a pointer to one
    found_inf_ptr,  # float32 [1] or None
    log_beta1,
    log_beta1_rest,
    log_beta2,
    log_beta2_rest,
    weight_decay,
    LR_IS_TENSOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    """step += 1; corrections = lr/(1 - beta1^step), 1/sqrt(1 - beta2^step), 1 - lr·weight_decay.

    In float64: 1 - beta^t cancels. ln(beta) comes as two float32.
    """
    if found_inf_ptr is not None and tl.load(found_inf_ptr) != 0:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < n_rows
    step_ptr = tl.load(table_ptr + row.to(tl.int64) * _COLUMNS + _STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=mask, other=0.0) + 1.0
    tl.store(step_ptr, step, mask=mask)
    if LR_IS_TENSOR:
        lr = tl.load(lr)
    t = step.to(tl.float64)
    correction1 = 1.0 - tl.exp(t * log_beta1 + t * log_beta1_rest)
    correction2 = 1.0 - tl.exp(t * log_beta2 + t * log_beta2_rest)
    out = corrections_ptr + row.to(tl.int64) * 4
    tl.store(out, (lr / correction1).to(tl.float32), mask=mask)
    tl.store(out + 1, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=mask)
    tl.store(out + 2, step * 0.0 + (1.0 - lr * weight_decay), mask=mask)


@triton.jit
def _address(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE))


@triton.jit
def _decode(state, amax, k16, beta, CODEC: tl.constexpr, SIGNED: tl.constexpr, PLAIN: tl.constexpr, ISA: tl.constexpr):
    """beta · moment / unit [rows, G], unit and `irregular` [rows]; the unit is 1 but in the plain form."""
    if PLAIN:
        return decode_plain(state, amax * beta, k16, CODEC, SIGNED, ISA)
    else:
        one = (k16 * 0).to(tl.float32) + 1.0
        if not codec_constant(CODEC, "quantized"):
            return to_float32(state) * beta, one, k16 * 0 - 1
        else:
            return decode_checked(state, amax, k16, CODEC, ISA) * beta, one, k16 * 0 - 1


@triton.jit
def _step_groups(
    pointers,  # param, grad, exp_avg, exp_avg_sq, amax, k16, residual at the first group
    first,  # element number of the first group's start, int64
    left,  # elements from there to the tensor's end
    corrections,  # step_size, root, decay: a row of `advance_kernel`'s
    grad_factor,
    betas,  # beta1, 1 - beta1, beta2, 1 - beta2
    eps,
    keys,  # of the streams of exp_avg, exp_avg_sq, param
    M_CODEC: tl.constexpr,
    V_CODEC: tl.constexpr,
    M_STOCHASTIC: tl.constexpr,
    V_STOCHASTIC: tl.constexpr,
    PARAM_ROUNDING: tl.constexpr,
    SCALED_GRAD: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    CHECKED: tl.constexpr,
    ISA: tl.constexpr,
):
    """AdamW on ROWS groups; returns a non-negative int32, with nothing stored, where they must be done by CHECKED instead.

    CHECKED takes any numbers and masks what lies past the tensor's end; the plain form does neither.
    """
    param_ptr, grad_ptr, m_ptr, v_ptr, amax_ptr, k16_ptr, residual_ptr = pointers
    step_size, root, decay = corrections
    beta1, rest1, beta2, rest2 = betas
    m_key, v_key, param_key = keys
    QUANTIZED: tl.constexpr = codec_constant(M_CODEC, "quantized") or codec_constant(V_CODEC, "quantized")
    M_PLAIN: tl.constexpr = not CHECKED and has_plain_form(M_CODEC)
    V_PLAIN: tl.constexpr = not CHECKED and has_plain_form(V_CODEC)
    rows = tl.arange(0, ROWS)
    offsets = rows[:, None] * G + tl.arange(0, G)[None, :]
    mask = offsets < left if CHECKED else None
    other = 0 if CHECKED else None

    m_state = load_codes(m_ptr, left, G, ROWS, CHECKED, M_CODEC)
    v_state = load_codes(v_ptr, left, G, ROWS, CHECKED, V_CODEC)
    g = to_float32(tl.load(grad_ptr + offsets, mask=mask, other=other))
    stored = tl.load(param_ptr + offsets, mask=mask, other=other)
    residual = stored
    if PARAM_ROUNDING == PARAM_SPLIT:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=other)
    m_amax = rows * 0.0
    v_amax = m_amax
    m_k16 = rows * 0
    v_k16 = m_k16
    if QUANTIZED:
        # both moments' metadata in one access each
        amax_pair = tl.load(amax_ptr + rows)
        k16_pair = tl.load(k16_ptr + rows).to(tl.int32)
        m_amax, v_amax = float_of(amax_pair.to(tl.int32)), float_of((amax_pair >> 32).to(tl.int32))
        m_k16, v_k16 = k16_pair & 0xFF, k16_pair >> 8

    if SCALED_GRAD:
        g = g * grad_factor
    m, m_unit, m_irregular = _decode(m_state, m_amax, m_k16, beta1, M_CODEC, True, M_PLAIN, ISA)
    v, v_unit, v_irregular = _decode(v_state, v_amax, v_k16, beta2, V_CODEC, False, V_PLAIN, ISA)
    m += (rest1 * inverse_of_unit(m_unit))[:, None] * g
    v += ((rest2 * inverse_of_unit(v_unit))[:, None] * g) * g

    irregular = tl.maximum(m_irregular, v_irregular)
    m_bits = rows * 0
    v_bits = m_bits
    m_spread = m_bits
    v_spread = m_bits
    if M_PLAIN:
        m_bits, m_spread, m_amax, m_irregular = plain_range(m, m_unit, M_CODEC, True, ISA)
        irregular = tl.maximum(irregular, m_irregular)
    if V_PLAIN:
        v_bits, v_spread, v_amax, v_irregular = plain_range(v, v_unit, V_CODEC, False, ISA)
        irregular = tl.maximum(irregular, v_irregular)
    irregular = tl.max(irregular, axis=0)
    if irregular < 0:
        new_p = load_param(stored, residual, PARAM_ROUNDING) * decay
        rate = (step_size * m_unit)[:, None]
        if V_PLAIN:
            denominator = sqrt(v, ISA) * (root * sqrt_of_unit(v_unit))[:, None] + eps
            new_p -= m * scaled_reciprocal(denominator, tl.broadcast_to(rate, v.shape), ISA)
        elif CHECKED:
            small = v < 2.0**-64  # the square root unit flushes subnormals
            size = sqrt(v * tl.where(small, 2.0**64, 1.0), ISA) * tl.where(small, 2.0**-32, 1.0)
            new_p -= rate * (m / (size * root + eps))
        else:
            new_p -= m * (rate * reciprocal(sqrt(v, ISA) * root + eps, ISA))
        new_param, new_residual = store_param(new_p, param_key, first, offsets, param_ptr.dtype.element_ty, PARAM_ROUNDING, ISA)
        tl.store(param_ptr + offsets, new_param, mask=mask)
        if PARAM_ROUNDING == PARAM_SPLIT:
            tl.store(residual_ptr + offsets, new_residual, mask=mask)
        m_codes, m_top, m_byte = _encode(
            m, g, m_bits, m_spread, m_amax, m_k16, m_key, first, offsets, M_CODEC, True, M_STOCHASTIC, M_PLAIN, ISA
        )
        v_codes, v_top, v_byte = _encode(
            v, g, v_bits, v_spread, v_amax, v_k16, v_key, first, offsets, V_CODEC, False, V_STOCHASTIC, V_PLAIN, ISA
        )
        store_codes(m_ptr, m_codes, left, G, ROWS, CHECKED, M_CODEC)
        store_codes(v_ptr, v_codes, left, G, ROWS, CHECKED, V_CODEC)
        if QUANTIZED:
            low = bits_of(m_top).to(tl.uint32, bitcast=True).to(tl.int64)
            tl.store(amax_ptr + rows, low | (bits_of(v_top).to(tl.int64) << 32))
            tl.store(k16_ptr + rows, (m_byte | (v_byte << 8)).to(tl.uint16))
    return irregular


@triton.jit
def _encode(
    x,
    g,
    max_bits,
    spread,
    amax,
    k16,
    key,
    first,
    offsets,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PLAIN: tl.constexpr,
    ISA: tl.constexpr,
):
    """State, amax and metadata byte as stored; amax and k16 come from `plain_range`, or are the old ones and stay where
    nothing is encoded.

    A finite gradient whose square overflows: the update stands still, as torch's does, and what is stored of v stays a number.
    """
    if not SIGNED and not PLAIN:
        x = tl.where((tl.abs(g) < float("inf")) & (x > _FLOAT32_MAX), _FLOAT32_MAX, x)
    if not codec_constant(CODEC, "quantized"):
        if codec_constant(CODEC, "name") == "bfloat16":
            x = round_bfloat16(x, key, first, offsets, STOCHASTIC, ISA)
        return x, amax, k16
    elif PLAIN:
        codes, k16_new = encode_plain(x, max_bits, spread, key, first, offsets, CODEC, SIGNED, STOCHASTIC, ISA)
        return codes, amax, k16_new
    else:
        return encode_checked(x, key, first, offsets, CODEC, SIGNED, STOCHASTIC, ISA)


@triton.jit(do_not_specialize=["seed"])
def step_kernel(
    table_ptr,  # int64 [n_rows, 10]
    tiles_ptr,  # int32 [n_tiles, 2] of `make_tiles`
    corrections_ptr,  # float32 [n_rows, 4]
    grad_scale_ptr,  # float32 [1] or None
    found_inf_ptr,  # float32 [1] or None
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    seed,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    M_CODEC: tl.constexpr,
    V_CODEC: tl.constexpr,
    M_STOCHASTIC: tl.constexpr,
    V_STOCHASTIC: tl.constexpr,
    PARAM_ROUNDING: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    G: tl.constexpr,
    ISA: tl.constexpr,
):
    """p -= step_size · m / (sqrt(v) · root + eps) after p *= decay, with m and v the un-quantized new moments."""
    if found_inf_ptr is not None and tl.load(found_inf_ptr) != 0:
        return
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 2
    row = tl.load(tile_ptr)
    group = tl.load(tile_ptr + 1).to(tl.int64)
    whole = row >= 0
    row = tl.where(whole, row, ~row).to(tl.int64)
    row_ptr = table_ptr + row * _COLUMNS
    corrections_ptr += row * 4
    corrections = (tl.load(corrections_ptr), tl.load(corrections_ptr + 1), tl.load(corrections_ptr + 2))
    betas = (beta1, rest1, beta2, rest2)
    grad_factor = 1.0
    if grad_scale_ptr is not None:
        grad_factor = 1.0 / tl.load(grad_scale_ptr)
    if MAXIMIZE:
        grad_factor = -grad_factor
    M_DTYPE: tl.constexpr = array_dtype(M_CODEC)
    V_DTYPE: tl.constexpr = array_dtype(V_CODEC)
    SCALED_GRAD: tl.constexpr = MAXIMIZE or grad_scale_ptr is not None

    m_key = tl.full([], 0, tl.uint32)
    v_key = m_key
    param_key = m_key
    if M_STOCHASTIC or V_STOCHASTIC or PARAM_ROUNDING == PARAM_STOCHASTIC:
        step = tl.load(_address(row_ptr, _STEP, tl.float32)).to(tl.int32)
        index = tl.load(row_ptr + _INDEX)
        m_key = stream_key(seed, step, index, _STREAM_M)
        v_key = stream_key(seed, step, index, _STREAM_V)
        param_key = stream_key(seed, step, index, _STREAM_P)
    keys = (m_key, v_key, param_key)

    ROWS: tl.constexpr = _TILE // G
    # small floats rounded by chance have no plain form, and 16 elements a thread of the other spill registers on sm_120
    WHOLE_TILES: tl.constexpr = (is_dithered_in_tiles(M_CODEC) or not M_STOCHASTIC) and (is_dithered_in_tiles(V_CODEC) or not V_STOCHASTIC)
    first = group * G
    irregular = tl.full([], 0, tl.int32)
    params = _address(row_ptr, _PARAM, PARAM_DTYPE) + first
    grads = _address(row_ptr, _GRAD, GRAD_DTYPE) + first
    if WHOLE_TILES and whole & (((params.to(tl.int64) | grads.to(tl.int64)) & 15) == 0) & (eps >= _MIN_EPS) & (eps <= _MAX_EPS):
        # What Triton cannot know of addresses read from memory; without it every access is of one element.
        pointers = (
            tl.multiple_of(params, 16),
            tl.multiple_of(grads, 16),
            tl.multiple_of(_address(row_ptr, _EXP_AVG, M_DTYPE) + code_offset(first, M_CODEC), 16),
            tl.multiple_of(_address(row_ptr, _EXP_AVG_SQ, V_DTYPE) + code_offset(first, V_CODEC), 16),
            _address(row_ptr, _AMAX, tl.int64) + group,
            _address(row_ptr, _K16, tl.uint16) + group,
            tl.multiple_of(_address(row_ptr, _RESIDUAL, tl.int8) + first, 16),
        )
        irregular = _step_groups(
            pointers, first, _TILE, corrections, grad_factor, betas, eps, keys, M_CODEC, V_CODEC, M_STOCHASTIC, V_STOCHASTIC,
            PARAM_ROUNDING, SCALED_GRAD, G, ROWS, False, ISA,
        )  # fmt: skip
    if irregular >= 0:
        # read again: addresses kept from above would cost the plain path 20 registers
        group = tl.load(tile_ptr + 1).to(tl.int64)
        left = tl.load(row_ptr + _NUMEL) - group * G
        for i in range(tl.cdiv(tl.minimum(left, _TILE).to(tl.int32), G)):
            at = (group + i) * G
            pointers = (
                _address(row_ptr, _PARAM, PARAM_DTYPE) + at,
                _address(row_ptr, _GRAD, GRAD_DTYPE) + at,
                _address(row_ptr, _EXP_AVG, M_DTYPE) + code_offset(at, M_CODEC),
                _address(row_ptr, _EXP_AVG_SQ, V_DTYPE) + code_offset(at, V_CODEC),
                _address(row_ptr, _AMAX, tl.int64) + (group + i),
                _address(row_ptr, _K16, tl.uint16) + (group + i),
                _address(row_ptr, _RESIDUAL, tl.int8) + at,
            )
            _step_groups(
                pointers, at, left - i * G, corrections, grad_factor, betas, eps, keys, M_CODEC, V_CODEC, M_STOCHASTIC,
                V_STOCHASTIC, PARAM_ROUNDING, SCALED_GRAD, G, 1, True, ISA,
            )  # fmt: skip


def make_tiles(numels: Sequence[int], group_size: int) -> Tensor:
    """int32 [n_tiles, 2] on the host: for each program its row of the table and its first group.

    The last tile of a tensor that does not fill it has the row's complement, ~row.

    Args:
        numels: elements of each row's tensor.
        group_size: elements a group.
    """
    groups_a_tile = _TILE.value // group_size
    sizes = np.array(numels, dtype=np.int64)
    counts = -(-sizes // _TILE.value)
    tiles = np.empty((int(counts.sum()), 2), dtype=np.int32)
    ends = np.cumsum(counts)
    tiles[:, 0] = np.repeat(np.arange(len(counts)), counts)
    tiles[:, 1] = (np.arange(len(tiles)) - np.repeat(ends - counts, counts)) * groups_a_tile
    cut = sizes % _TILE.value > 0
    tiles[ends[cut] - 1, 0] = ~np.flatnonzero(cut)
    return torch.from_numpy(tiles)


def _log_pair(beta: float) -> tuple[float, float]:
    """ln(beta) as two float32 numbers; beta = 0 forgets within a step, which e^-10000 does too."""
    log = math.log(beta) if beta > 0 else -1e4
    high = float(np.float32(log))
    return high, log - high


def step(
    table: Tensor,
    tiles: Tensor,
    corrections: Tensor,
    fmt: StateFormat,
    hyper: Hyperparameters,
    *,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> None:
    """Advance every row of `table` by one step, in place, without synchronising; nothing changes where `found_inf` is set.

    Args:
        table: int64 [n_rows, 10] on the device, the columns of `settings.COLUMNS`. All addresses are multiples of 16 but
            those of steps, and of params and grads, which may be aligned to their elements only.
        tiles: `make_tiles` of the rows' sizes, on the device.
        corrections: float32 [n_rows, 4] scratch on the device.
        hyper: `lr` a float or a 0-dim tensor; `grad_scale` and `found_inf` of one float32 element on the device.
    """
    if not len(tiles) and not len(table):
        return
    lr = hyper.lr
    if not (isinstance(lr, Tensor) and lr.device == table.device):
        lr = float(lr)
    log1, log1_rest = _log_pair(hyper.beta1)
    log2, log2_rest = _log_pair(hyper.beta2)
    with device_guard(table):
        advance_kernel[(triton.cdiv(len(table), _ROWS_A_PROGRAM),)](
            table,
            corrections,
            len(table),
            lr,
            hyper.found_inf,
            log1,
            log1_rest,
            log2,
            log2_rest,
            float(hyper.weight_decay),
            LR_IS_TENSOR=isinstance(lr, Tensor),
            ROWS=_ROWS_A_PROGRAM,
            num_warps=1,
        )
        if len(tiles):
            step_kernel[(len(tiles),)](
                table,
                tiles,
                corrections,
                hyper.grad_scale,
                hyper.found_inf,
                float(hyper.beta1),
                1.0 - hyper.beta1,
                float(hyper.beta2),
                1.0 - hyper.beta2,
                float(hyper.eps),
                signed32(fmt.seed),
                PARAM_DTYPE=tl_dtype(param_dtype),
                GRAD_DTYPE=tl_dtype(grad_dtype),
                M_CODEC=fmt.exp_avg.index,
                V_CODEC=fmt.exp_avg_sq.index,
                M_STOCHASTIC=fmt.exp_avg.name != "float32" and fmt.exp_avg_rounding == "stochastic",
                V_STOCHASTIC=fmt.exp_avg_sq.name != "float32" and fmt.exp_avg_sq_rounding == "stochastic",
                PARAM_ROUNDING=PARAM_ROUNDINGS.index(fmt.param_rounding),
                MAXIMIZE=hyper.maximize,
                G=fmt.group_size,
                ISA=instruction_set(table),
                num_warps=1,
            )
