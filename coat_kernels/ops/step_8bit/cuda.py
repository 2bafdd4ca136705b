"""Launcher of the CUDA blockwise 8-bit step (`csrc/cuda/step_8bit.cu`) over a pointer table in device memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..._cuda import Kernel
from ...formats.parameters import DTYPE_INDEX, PARAM_ROUNDINGS
from .settings import RULES, BlockwiseFormat, Hyperparameters8bit

#: Elements that one turn of a thread block covers, and its threads: `kTile` and `kThreads` of csrc/cuda/elements.h.
TILE, THREADS = 4096, 512
_advance = Kernel("step_8bit", "advance_8bit", THREADS)
_steps = {
    (rule, quantized): Kernel("step_8bit", f"step_8bit_{rule}{'' if quantized else '_float32'}", THREADS)
    for rule in RULES
    for quantized in (True, False)
}


class _Arguments(ctypes.Structure):
    """`StepArguments`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "tiles", "corrections", "lr", "grad_scale", "found_inf")),
        *((name, ctypes.c_double) for name in ("log_beta1", "log_beta2", "lr_value", "weight_decay")),
        *((name, ctypes.c_float) for name in ("beta1", "rest1", "beta2", "rest2", "eps")),
        ("seed", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("n_rows", "n_tiles", "rule", "param_dtype", "grad_dtype", "param_rounding", "block_size")),
        *((name, ctypes.c_int32) for name in ("maximize", "nesterov")),
    )


def make_tiles(numels: Sequence[int], block_size: int) -> Tensor:
    """int32 [n_tiles, 2] on the host: for each tile its row of the table and its number in the row's tensor.

    Args:
        numels: elements of each row's tensor.
        block_size: elements a quantization block, a divisor of the tile.
    """
    if TILE % block_size:
        raise ValueError(f"block size {block_size} does not divide a tile of {TILE} elements")
    counts = -(-np.array(numels, dtype=np.int64) // TILE)
    tiles = np.empty((int(counts.sum()), 2), dtype=np.int32)
    tiles[:, 0] = np.repeat(np.arange(len(counts)), counts)
    tiles[:, 1] = np.arange(len(tiles)) - np.repeat(np.cumsum(counts) - counts, counts)
    return torch.from_numpy(tiles)


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    """A one-element tensor as the kernels read it."""
    return None if value is None else value.detach().to(device, torch.float32, non_blocking=True)


def _log(beta: float) -> float:
    """ln(beta); beta = 0 forgets within a step, which e^-10000 does too."""
    return math.log(beta) if beta > 0 else -1e4


def step(
    table: Tensor,
    tiles: Tensor,
    corrections: Tensor,
    fmt: BlockwiseFormat,
    hyper: Hyperparameters8bit,
    *,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> None:
    """Advance every row of `table` by one step, in place, without synchronizing; nothing changes where `found_inf` is set.

    Args:
        table: int64 [n_rows, 10] on the device, the columns of `settings.COLUMNS`. All addresses are multiples of 16 but those of steps,
            and of params and grads, which may be aligned to their elements only.
        tiles: `make_tiles` of the rows' sizes, on the device.
        corrections: float32 [n_rows, 4] scratch on the device.
        hyper: `lr` a float or a 0-dim tensor; `grad_scale` and `found_inf` of one element. What lies on the device is read there.
    """
    device = table.device
    lr = _scalar(hyper.lr, device) if isinstance(hyper.lr, Tensor) and hyper.lr.device == device else None
    grad_scale, found_inf = _scalar(hyper.grad_scale, device), _scalar(hyper.found_inf, device)
    arguments = _Arguments(
        rows=table.data_ptr(),
        tiles=tiles.data_ptr(),
        corrections=corrections.data_ptr(),
        lr=None if lr is None else lr.data_ptr(),
        grad_scale=None if grad_scale is None else grad_scale.data_ptr(),
        found_inf=None if found_inf is None else found_inf.data_ptr(),
        log_beta1=_log(hyper.beta1),
        log_beta2=_log(hyper.beta2),
        lr_value=float(hyper.lr) if lr is None else 0.0,
        weight_decay=hyper.weight_decay,
        beta1=hyper.beta1,
        rest1=1.0 - hyper.beta1,
        beta2=hyper.beta2,
        rest2=1.0 - hyper.beta2,
        eps=hyper.eps,
        seed=fmt.seed & 0xFFFFFFFF,
        n_rows=len(table),
        n_tiles=len(tiles),
        rule=RULES.index(fmt.rule),
        param_dtype=DTYPE_INDEX[param_dtype],
        grad_dtype=DTYPE_INDEX[grad_dtype],
        param_rounding=PARAM_ROUNDINGS.index(fmt.param_rounding),
        block_size=fmt.block_size,
        maximize=hyper.maximize,
        nesterov=hyper.nesterov,
    )
    _advance.launch(arguments, device, -(-len(table) // THREADS))
    _steps[fmt.rule, fmt.quantized].launch(arguments, device, len(tiles))
