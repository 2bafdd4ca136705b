"""Launcher of the C++ CAME step (`csrc/cpu/came_8bit.cpp`) over a pointer table in host memory."""

from __future__ import annotations

import torch

from ..._native import native
from ...formats.parameters import DTYPE_INDEX, PARAM_ROUNDINGS
from ..pointer_table import PointerTable
from .settings import PHASES, CameFormat, CameSettings, TensorNumbers

#: Settings that the kernel knows by the same name.
_SAME = (
    "clip_threshold",
    "weight_decay",
    "background_regularization",
    "min_lr",
    "max_lr",
    "lr_bump",
    "adaptation_rate",
    "edge_penalty",
    "edge_threshold",
    "frequency_penalty",
    "rank_penalty_strength",
    "low_rank_emphasis",
    "detail_preservation",
)


def step(
    table: PointerTable,
    fmt: CameFormat,
    hyper: CameSettings,
    numbers: TensorNumbers,
    *,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> None:
    """Advance every row of `table` by one step, in place, and its step count with it."""
    job = native.CameJob()
    job.amp = fmt.rule == "cameamp"
    job.phase = PHASES.index(fmt.phase)
    for name in ("use_8bit", "block_size", "came", "edge_suppression"):
        setattr(job, name, getattr(fmt, name))
    job.param_dtype, job.grad_dtype = DTYPE_INDEX[param_dtype], DTYPE_INDEX[grad_dtype]
    job.param_rounding = PARAM_ROUNDINGS.index(fmt.param_rounding)
    job.seed = fmt.seed & 0xFFFFFFFF
    for name in _SAME:
        setattr(job, name, getattr(hyper, name))
    _, job.beta2, job.beta3 = hyper.betas
    job.eps1, job.eps2, eps3 = hyper.eps
    job.grad_factor = (-1 if hyper.maximize else 1) / (1.0 if hyper.grad_scale is None else float(hyper.grad_scale))
    job.inv_grad_l1 = 1 / (hyper.grad_l1 + eps3)
    job.eta = 0.0 if hyper.eta is None else hyper.eta
    native.came_8bit(
        table=table.host.data_ptr(),
        n_tensors=table.rows,
        numbers=numbers.rows.data_ptr(),
        tables=numbers.tables.data_ptr(),
        n_tables=len(numbers.tables),
        job=job,
        threads=torch.get_num_threads(),
    )
