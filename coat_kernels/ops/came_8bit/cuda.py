"""Launcher of the CUDA CAME step (`csrc/cuda/came_8bit.cu`) over a pointer table in device memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._cuda import Kernel
from ...formats.parameters import DTYPE_INDEX, PARAM_ROUNDINGS
from .settings import PHASES, CameFormat, CameSettings, TensorNumbers

#: `kThreads` of csrc/cuda/elements.h.
THREADS = 512
#: Larger tensors are stepped by the whole GPU, one after the other; smaller ones by a thread block each, side by side.
ONE_TEAM_NUMEL = 1 << 16
_kernel = Kernel("came_8bit", "came_8bit", THREADS)

#: Settings and format fields that the kernel knows by the same name.
_FLOATS = (
    *("clip_threshold", "weight_decay", "min_lr", "max_lr", "lr_bump", "adaptation_rate", "edge_penalty", "edge_threshold"),
    *("frequency_penalty", "rank_penalty_strength", "low_rank_emphasis", "detail_preservation"),
)


class _Arguments(ctypes.Structure):
    """`CameArguments`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "numbers", "tables", "jobs", "workspace", "arrived", "partial")),
        *((name, ctypes.c_void_p) for name in ("grad_scale", "grad_l1")),
        ("workspace_floats", ctypes.c_int64),
        *(
            (name, ctypes.c_float)
            for name in ("beta2", "rest2", "beta3", "rest3", "eps1", "eps2", "eps3", "grad_l1_value", "eta", *_FLOATS)
        ),
        ("seed", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("n_jobs", "one_team", "amp", "phase", "use_8bit", "block_size", "came")),
        *((name, ctypes.c_int32) for name in ("edge_suppression", "background_regularization", "param_dtype", "grad_dtype")),
        *((name, ctypes.c_int32) for name in ("param_rounding", "maximize")),
    )


def _workspace_floats(sides: Sequence[tuple[int, int]], threads: int) -> int:
    """What the largest tensor needs (`Came::lay_out`), in whole runs of 16 bytes."""
    most = max(2 * rows * cols + max(cols, threads) + 4 * cols + 5 * rows for rows, cols in sides)
    return -(-most // 4) * 4


def _on_device(value: object, device: torch.device) -> Tensor | None:
    """A number that lies on the device, as the kernel reads it; None for numbers of the host."""
    if isinstance(value, Tensor) and value.device == device:
        return value.detach().to(torch.float32).reshape(1)
    return None


def step(
    table: Tensor,
    sides: Sequence[tuple[int, int]],
    steps: Sequence[int],
    fmt: CameFormat,
    hyper: CameSettings,
    numbers: TensorNumbers,
    *,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> None:
    """Advance every row of `table` by one step, in place, without synchronizing. Step counts lie in host memory and are the caller's.

    Args:
        table: int64 [n_rows, 20] on the device: param, grad, `settings.COLUMNS`, step, numel, index, rows, cols. param and grad may be
            aligned to their elements only.
        sides: rows and cols of each tensor; a vector is one row.
        steps: the count that each tensor reaches, from 1.
        hyper: `grad_scale` and `grad_l1` may lie on the device and are read there. `found_inf` is not looked at.
        numbers: of each tensor's own history, on the host.
    """
    device = table.device
    # the longest first: thread blocks that take what is left then finish together
    order = sorted((i for i, (rows, cols) in enumerate(sides) if rows * cols), key=lambda i: -sides[i][0] * sides[i][1])
    grad_scale, grad_l1 = _on_device(hyper.grad_scale, device), _on_device(hyper.grad_l1, device)
    rows_f32, tables_f32 = (t.to(device, non_blocking=True) for t in (numbers.rows, numbers.tables))
    host_scale = 1.0 if hyper.grad_scale is None or grad_scale is not None else float(hyper.grad_scale)
    if host_scale != 1.0:
        grad_scale = torch.tensor([host_scale], device=device)
    arguments = _Arguments(
        rows=table.data_ptr(),
        numbers=rows_f32.data_ptr(),
        tables=tables_f32.data_ptr(),
        grad_scale=None if grad_scale is None else grad_scale.data_ptr(),
        grad_l1=None if grad_l1 is None else grad_l1.data_ptr(),
        beta2=hyper.betas[1],
        rest2=1 - hyper.betas[1],
        beta3=hyper.betas[2],
        rest3=1 - hyper.betas[2],
        eps1=hyper.eps[0],
        eps2=hyper.eps[1],
        eps3=hyper.eps[2],
        grad_l1_value=0.0 if grad_l1 is not None else float(hyper.grad_l1),
        eta=0.0 if hyper.eta is None else hyper.eta,
        seed=fmt.seed & 0xFFFFFFFF,
        amp=fmt.rule == "cameamp",
        phase=PHASES.index(fmt.phase),
        use_8bit=fmt.use_8bit,
        block_size=fmt.block_size,
        came=fmt.came,
        edge_suppression=fmt.edge_suppression,
        background_regularization=hyper.background_regularization,
        param_dtype=DTYPE_INDEX[param_dtype],
        grad_dtype=DTYPE_INDEX[grad_dtype],
        param_rounding=PARAM_ROUNDINGS.index(fmt.param_rounding),
        maximize=hyper.maximize,
        **{name: getattr(hyper, name) for name in _FLOATS},
    )
    resident = _kernel.resident_blocks(device)
    for one_team in (True, False):
        rows = [i for i in order if (sides[i][0] * sides[i][1] > ONE_TEAM_NUMEL) == one_team]
        if not rows:
            continue
        teams = 1 if one_team else min(resident, len(rows))
        floats = _workspace_floats([sides[i] for i in rows], THREADS * (resident if one_team else 1))
        workspace = torch.empty(teams * floats, device=device)
        meeting = torch.zeros(1 + 2 * resident, dtype=torch.float64, device=device)  # a counter, zero in either reading, and partial sums
        jobs = torch.tensor([(i, steps[i]) for i in rows], dtype=torch.int32).to(device, non_blocking=True)
        arguments.jobs, arguments.n_jobs, arguments.one_team = jobs.data_ptr(), len(rows), one_team
        arguments.workspace, arguments.workspace_floats = workspace.data_ptr(), floats
        arguments.arrived, arguments.partial = meeting.data_ptr(), meeting[1:].data_ptr()
        _kernel.launch(arguments, device, resident if one_team else teams, cooperative=one_team)
