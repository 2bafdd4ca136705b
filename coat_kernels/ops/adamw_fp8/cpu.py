"""Launcher of the C++ fused step (`csrc/cpu/adamw_fp8.cpp`) over a pointer table in host memory."""

from __future__ import annotations

import torch

from ..._native import native
from ...formats.parameters import DTYPE_INDEX, PARAM_ROUNDINGS
from ..pointer_table import PointerTable
from .settings import Hyperparameters, StateFormat


def step(table: PointerTable, fmt: StateFormat, hyper: Hyperparameters, *, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Advance every row of `table` by one step, in place."""
    native.adamw_fp8(
        table=table.host.data_ptr(),
        n_tensors=table.rows,
        param_dtype=DTYPE_INDEX[param_dtype],
        grad_dtype=DTYPE_INDEX[grad_dtype],
        exp_avg_codec=fmt.exp_avg.index,
        exp_avg_sq_codec=fmt.exp_avg_sq.index,
        group_size=fmt.group_size,
        stochastic_exp_avg=fmt.exp_avg_rounding == "stochastic",
        stochastic_exp_avg_sq=fmt.exp_avg_sq_rounding == "stochastic",
        param_rounding=PARAM_ROUNDINGS.index(fmt.param_rounding),
        seed=fmt.seed,
        lr=float(hyper.lr),
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        maximize=hyper.maximize,
        grad_scale=1.0 if hyper.grad_scale is None else float(hyper.grad_scale),
        threads=torch.get_num_threads(),
    )
