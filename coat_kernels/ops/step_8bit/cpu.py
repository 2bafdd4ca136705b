"""Launcher of the C++ blockwise 8-bit step (`csrc/cpu/step_8bit.cpp`) over a pointer table in host memory."""

from __future__ import annotations

import torch

from ..._native import native
from ...formats.parameters import DTYPE_INDEX, PARAM_ROUNDINGS
from ..pointer_table import PointerTable
from .settings import RULES, BlockwiseFormat, Hyperparameters8bit


def step(
    table: PointerTable, fmt: BlockwiseFormat, hyper: Hyperparameters8bit, *, param_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """Advance every row of `table` by one step, in place."""
    native.step_8bit(
        table=table.host.data_ptr(),
        n_tensors=table.rows,
        param_dtype=DTYPE_INDEX[param_dtype],
        grad_dtype=DTYPE_INDEX[grad_dtype],
        rule=RULES.index(fmt.rule),
        quantized=fmt.quantized,
        block_size=fmt.block_size,
        param_rounding=PARAM_ROUNDINGS.index(fmt.param_rounding),
        seed=fmt.seed,
        lr=float(hyper.lr),
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        maximize=hyper.maximize,
        nesterov=hyper.nesterov,
        grad_scale=1.0 if hyper.grad_scale is None else float(hyper.grad_scale),
        threads=torch.get_num_threads(),
    )
