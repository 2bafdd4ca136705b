"""PyTorch reference of the CAME steps: pure functions of one tensor and its state.

A parameter is a matrix [rows, cols] = [shape[0], the rest] or, with fewer than two dimensions, a vector. t is the step count reached, W
the warm-up, rms the root mean square, [x] clipping to an interval. Rule "cameamp", in this order:

    a = |g| / (Σ|g| + e3), times 1 + edge_penalty · edge(g);  g ← g · (1 - min(a, 1))            Σ over the param group
    g ← g - frequency_penalty · (g - B g)                                                        B: binomial filter, both directions
    g ← g + rank_penalty_strength · rms(g) · U_tail V_tailᵀ                                      of p's singular directions past the 10th
    v ← EMA_b2(g² + e1), factored for matrices;  h = g / sqrt(v / (1 - b2^t));  h ← h / max(1, rms(h) / clip_threshold)
    t < W/2:   s ← s + adaptation_rate · ([cos] - s),  m ← b1 m + (1 - b1) (1 + s)/2 · h         cos: see `_torque`
    after:     m ← b m + (1 - b) h,  b = max(b1 · beta1_decay^t, 0.4)
    r ← EMA_b3((h - m)² + e2), factored likewise;  u = m / sqrt(r / (1 - b3^t));  u ← u / max(1, rms(u) / clip_threshold)
    t < W:     mask ± lr_bump where the sign of g is, or is not, that of the step before; kept in [min_lr, max_lr]
    t < W/2:   u ← |u| · sign(g);  H ← EMA_0.9(edge(u));  u ← u · [1 - edge_penalty · H]
    after:     u ← u · (u g > 0) / mean(u g > 0), halved in rows of background
    p ← p · (1 - lr · weight_decay) - lr · row · u,   lr = mask · group lr / lr_max,  row = 1 / (eta · sqrt(‖p_row‖ + 1/eta²))

edge(x) = |L x| / (4 rms(x)) where that exceeds edge_threshold, else 0; L is the 5-point Laplacian. Sources: CAME (arXiv 2307.02047), AGR
(2407.16944), torque-aware momentum (2412.18790), Grams (2412.17107), cautious updates (2411.16085), ALLoRA's rows (2410.09692).

Rule "came" is arXiv 2307.02047, algorithm 2: v and r without bias correction, u = m for vectors, u neither clipped nor masked, mask = 1.

Stored: exp_avg dynamic8 signed; torque int8, code/127; lr_mask uint8, `mask_table`; edge_history uint8, 9 (c/255)²; polarity bit i & 7 of
byte i >> 3; row_variance bfloat16. The update uses values before they are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...formats.codecs import STREAM_PARAM
from ...formats.dynamic8 import decode_blocks, encode_blocks
from ...formats.parameters import round_stochastic
from ...formats.random import stream_key, uniform8
from .settings import EDGE_MAX, STREAM_EDGE_HISTORY, STREAM_LR_MASK, CameFormat, CameSettings, has_edges, matrix_sides

_TINY = 1e-30


def came_8bit(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    *,
    numbers: dict[str, float],
    tables: Tensor,
    step: int,
    index: int,
    fmt: CameFormat,
    hyper: CameSettings,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step from stored state to stored state; see the module's formulas.

    Args:
        param, grad: float32, bfloat16 or float16, of one shape.
        state: the arrays of `fmt.arrays(param.shape)`.
        numbers: one row of `settings.TensorNumbers`, by name; `tables` are its tables.
        step: the count this step reaches, from 1.
        index: the tensor's number in the generator's key.
        dtype: of the arithmetic.

    Returns:
        The new parameter and the new arrays; `tail` and `lr_max` are inputs alone.
    """
    new = dict(state)
    if param.numel() == 0:
        return param.clone(), new
    sides = matrix_sides(param.shape)
    shape = sides or (1, param.numel())
    amp = fmt.rule == "cameamp"
    p = param.to(dtype).reshape(shape)
    g = grad.to(dtype).reshape(shape)
    if hyper.grad_scale is not None:
        g = g / float(hyper.grad_scale)
    if hyper.maximize:
        g = -g
    if amp:
        g = _shape_gradient(g, p, state.get("tail"), param.shape, fmt, hyper)

    v = _second_moment(new, "exp_avg_sq", g * g + hyper.eps[0], hyper.betas[1], numbers["bias_correction2"], shape)
    h = g / v.sqrt().clamp_min(_TINY)
    h = h / (_rms(h) / hyper.clip_threshold).clamp_min(1)
    m = _load(state, "exp_avg", fmt, dtype).reshape(shape)
    beta1 = numbers["beta1"]
    if "torque" in state:
        s = _torque(m, h, _load(state, "torque", fmt, dtype).reshape(shape), sides, hyper.adaptation_rate)
        _store(new, "torque", s, param.shape, fmt)
        emphasis = hyper.low_rank_emphasis if "tail" in state else 1.0
        m = beta1 * m + (1 - beta1) * (1 + s * emphasis) / 2 * h
    else:
        m = beta1 * m + (1 - beta1) * h
    u = m
    if fmt.came and (amp or sides is not None):
        r = _second_moment(new, "res", (h - m) ** 2 + hyper.eps[1], hyper.betas[2], numbers["bias_correction3"], shape)
        u = m / r.sqrt().clamp_min(1e-12)
    _store(new, "exp_avg", m, param.shape, fmt)

    lr: Tensor | float = numbers["lr_factor"]
    if amp:
        u = u / (_rms(u) / hyper.clip_threshold).clamp_min(1)
        lr = lr * _mask(new, g, h, numbers, tables, step, index, param.shape, fmt, hyper)
        u = _direct(new, u, g, step, index, param.shape, fmt, hyper)
    row: Tensor | float = 1.0
    if hyper.eta is not None and sides is not None:
        row = 1 / (hyper.eta * (p.norm(dim=1, keepdim=True) + 1 / hyper.eta**2).sqrt())
    p = p * (1 - lr * hyper.weight_decay) - lr * row * u
    return _store_param(p.to(torch.float32).view(param.shape), param.dtype, step, index, fmt), new


# ---- the gradient


def _shape_gradient(g: Tensor, p: Tensor, tail: Tensor | None, shape: torch.Size, fmt: CameFormat, hyper: CameSettings) -> Tensor:
    """AGR with edge suppression, then the frequency penalty, then the rank penalty."""
    a = g.abs() / (hyper.grad_l1 + hyper.eps[2])
    if fmt.edge_suppression and has_edges(shape):
        a = a * (1 + hyper.edge_penalty * edge(g, hyper.edge_threshold))
    g = g * (1 - a.clamp(max=1))
    if hyper.frequency_penalty > 0 and has_edges(shape):
        g = g - hyper.frequency_penalty * (g - _binomial(_binomial(g, 0), 1))
    if tail is not None:
        projector = tail.to(g.dtype)
        directions = projector @ p if p.shape[0] <= p.shape[1] else p @ projector
        g = g + hyper.rank_penalty_strength * _rms(g) * directions
    return g


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def edge(x: Tensor, threshold: float) -> Tensor:
    """|L x| / (4 rms(x)) of a matrix where that exceeds `threshold`, else 0; each direction of L only in its interior."""
    laplacian = torch.zeros_like(x)
    laplacian[1:-1] += x[2:] - 2 * x[1:-1] + x[:-2]
    laplacian[:, 1:-1] += x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]
    size = laplacian.abs() / (4 * (_rms(x) + _TINY))
    return torch.where(size > threshold, size, 0)


def _binomial(x: Tensor, dim: int) -> Tensor:
    """(1, 2, 1)/4 along `dim`, borders replicated: gain cos²(π f) at f cycles a sample."""
    n = x.shape[dim]
    before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, n - 1)], dim)
    after = torch.cat([x.narrow(dim, 1, n - 1), x.narrow(dim, n - 1, 1)], dim)
    return (before + 2 * x + after) / 4


# ---- moments


def _second_moment(new: dict[str, Tensor], name: str, x: Tensor, beta: float, correction: float, shape: tuple[int, int]) -> Tensor:
    """The bias-corrected moving average of x: for matrices the outer product of row and column means over their total."""
    if name in new:
        full = beta * new[name].to(x.dtype).reshape(shape) + (1 - beta) * x
        new[name] = full.to(torch.float32).view(new[name].shape)
        return full / correction
    row = beta * new[f"{name}_row"].to(x.dtype) + (1 - beta) * x.mean(1)
    col = beta * new[f"{name}_col"].to(x.dtype) + (1 - beta) * x.mean(0)
    new[f"{name}_row"], new[f"{name}_col"] = row.to(torch.float32), col.to(torch.float32)
    return (row / row.mean().clamp_min(1e-38))[:, None] * (col / correction)


def _torque(m: Tensor, h: Tensor, s: Tensor, sides: tuple[int, int] | None, rate: float) -> Tensor:
    """Moving average of how far m and h agree: the product of both, normalised by column, times sqrt(rows), clipped to ±1.

    A vector is one column.
    """
    columns = (m, h) if sides is not None else (m.view(-1, 1), h.view(-1, 1))
    unit = [x / (x.norm(dim=0, keepdim=True) + 1e-12) for x in columns]
    agreement = unit[0] * unit[1] * columns[0].shape[0] ** 0.5
    return (1 - rate) * s + rate * agreement.clamp(-1, 1).view(s.shape)


# ---- the learning rate mask and the update's direction


def _mask(
    new: dict[str, Tensor],
    g: Tensor,
    h: Tensor,
    numbers: dict[str, float],
    tables: Tensor,
    step: int,
    index: int,
    shape: torch.Size,
    fmt: CameFormat,
    hyper: CameSettings,
) -> Tensor:
    """Each element's learning rate; during the warm-up it moves by sign agreement."""
    first = numbers["old_table"] < 0
    if first:
        value = torch.full_like(g, numbers["lr_start"])
    elif fmt.use_8bit:
        value = tables[int(numbers["old_table"])][new["lr_mask"].to(torch.int64)].to(g.dtype).view(g.shape)
    else:
        value = new["lr_mask"].to(g.dtype).view(g.shape)
    if not first and fmt.phase == "late":
        return value
    value = value + numbers["lr_raise"]
    if fmt.phase != "late":
        bump: Tensor | float = hyper.lr_bump
        if "row_variance" in new:
            variance = h.var(1, keepdim=True, correction=0)
            if not first:
                variance = 0.9 * new["row_variance"].to(g.dtype)[:, None] + 0.1 * variance
            new["row_variance"] = variance.flatten().to(torch.bfloat16)
            bump = hyper.lr_bump * (variance * hyper.detail_preservation).nan_to_num(nan=0.0).clamp(0.5, 1.5)
        polarity = (g > 0).flatten()
        if not first:
            value = value + torch.where((polarity == unpack_bits(new["polarity"], len(polarity))).view(g.shape), bump, -bump)
        new["polarity"] = pack_bits(polarity)
    value = value.clamp(hyper.min_lr, hyper.max_lr)
    if fmt.use_8bit:
        table = tables[int(numbers["new_table"])]
        new["lr_mask"] = _encode_by_chance(value, table, stream_key(fmt.seed, step, index, STREAM_LR_MASK), shape)
    else:
        new["lr_mask"] = value.to(torch.float32).view(shape)
    return value


def _direct(
    new: dict[str, Tensor], u: Tensor, g: Tensor, step: int, index: int, shape: torch.Size, fmt: CameFormat, hyper: CameSettings
) -> Tensor:
    """Grams' signs and edge suppression in the first half of the warm-up, the cautious mask afterwards."""
    if fmt.phase == "early":
        u = u.abs() * g.sign()
        if "edge_history" in new:
            history = 0.9 * _load(new, "edge_history", fmt, u.dtype).view(u.shape) + 0.1 * edge(u, hyper.edge_threshold)
            key = stream_key(fmt.seed, step, index, STREAM_EDGE_HISTORY)
            if fmt.use_8bit:
                new["edge_history"] = _encode_by_chance(history.nan_to_num(nan=0.0), edge_table(), key, shape)
            else:
                new["edge_history"] = history.to(torch.float32).view(shape)
            u = u * (1 - hyper.edge_penalty * history).clamp(0.1, 1)
        return u
    keep = (u * g > 0).to(u.dtype)
    keep = keep / keep.mean().clamp_min(1e-3)
    if hyper.background_regularization and matrix_sides(shape) is not None:
        variance = g.var(1, keepdim=True, correction=0)
        keep = keep * torch.where(variance < 1e-2 * variance.mean(), 0.5, 1.0)
    return u * keep


# ---- stored forms


def edge_table() -> Tensor:
    """float32 [256]: values of edge_history's codes."""
    return EDGE_MAX * (torch.arange(256, dtype=torch.float32) / 255).square()


def _encode_by_chance(value: Tensor, table: Tensor, key: int, shape: torch.Size) -> Tensor:
    """uint8 codes of an ascending table, up or down with odds that keep the expectation of the value they stand for."""
    flat, table = value.to(torch.float32).flatten(), table.to(value.device)
    below = (torch.searchsorted(table, flat, right=True) - 1).clamp(0, 254)
    gap = table[below + 1] - table[below]
    odds = torch.where(gap > 0, (flat - table[below]) / gap, 0)
    return (below + (uniform8(key, flat.numel(), flat.device) < odds)).to(torch.uint8).view(shape)


def pack_bits(bits: Tensor) -> Tensor:
    """uint8 [ceil(n/8)] of bool [n]: bit i & 7 of byte i >> 3."""
    padded = torch.zeros(-(-bits.numel() // 8) * 8, dtype=torch.int32, device=bits.device)
    padded[: bits.numel()] = bits.to(torch.int32)
    return (padded.view(-1, 8) << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """bool [numel]; inverse of `pack_bits`."""
    return (packed.to(torch.int32)[:, None] >> torch.arange(8, device=packed.device) & 1).flatten()[:numel].bool()


def _load(state: dict[str, Tensor], name: str, fmt: CameFormat, dtype: torch.dtype) -> Tensor:
    stored = state[name]
    if stored.dtype == torch.float32:
        return stored.to(dtype)
    if name == "exp_avg":
        return decode_blocks(stored, state["exp_avg_absmax"], fmt.block_size, signed=True).to(dtype)
    if name == "torque":
        return stored.to(dtype) / 127
    return edge_table().to(stored.device)[stored.to(torch.int64)].to(dtype)


def _store(new: dict[str, Any], name: str, value: Tensor, shape: torch.Size, fmt: CameFormat) -> None:
    value = value.to(torch.float32).view(shape)
    if not fmt.use_8bit:
        new[name] = value
    elif name == "exp_avg":
        new["exp_avg"], new["exp_avg_absmax"] = encode_blocks(value, fmt.block_size, signed=True)
    else:
        new[name] = (value.nan_to_num(nan=0.0) * 127).round().clamp(-127, 127).to(torch.int8)


def _store_param(p: Tensor, dtype: torch.dtype, step: int, index: int, fmt: CameFormat) -> Tensor:
    if fmt.param_rounding == "stochastic" and dtype != torch.float32:
        return round_stochastic(p, dtype, stream_key(fmt.seed, step, index, STREAM_PARAM))
    return p.to(dtype)
