"""One just-in-time scale for a tensor or for each row: both stages, and stage two where the producer has written the maxima."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..activation_rows import Contest, Entrant, Job
from ..checks import CheckFailed
from ..works import ActivationWork
from .activation_quant import GROUP, check_round_trip, compiled


def _eager(x: Tensor) -> tuple[Tensor, Tensor]:
    fp8 = torch.finfo(torch.float8_e4m3fn)
    scale = x.abs().amax().float() / fp8.max
    return (x / scale).clamp(-fp8.max, fp8.max).to(torch.float8_e4m3fn), scale


def _check_torch(codes: Tensor, scale: Tensor, x: Tensor) -> dict:
    return check_round_trip(codes.float() * scale, x)


def _torch(name: str, through: Callable[[Callable], Callable]) -> Entrant:
    def prepare(work: ActivationWork) -> Job:
        x, run = work.tensor(), through(_eager)
        return Job(lambda: run(x), lambda: _check_torch(*run(x), x))

    return Entrant(name, "torch", prepare)


def _coat(name: str, per_row: bool, stage_two: bool = False) -> Entrant:
    def prepare(work: ActivationWork) -> Job:
        import coat_kernels
        from coat_kernels.ops.tensor_quant import reference

        x = work.tensor()
        amax = coat_kernels.quantize_tensor(x, group_size=GROUP).group_amax

        def run() -> tuple[Tensor, ...]:
            if stage_two:
                return torch.ops.coat_kernels.quantize_with_amax(x, amax, "e4m3", per_row)
            return torch.ops.coat_kernels.quantize_tensor(x, "e4m3", GROUP, per_row)

        def check() -> dict:
            codes, scale, *_ = run()
            want, want_scale = reference.quantize_with_amax(x, amax, fmt="e4m3", scale_shape=scale.shape)
            if not (torch.equal(amax.max(), x.abs().max().float()) and torch.equal(codes, want) and torch.equal(scale, want_scale)):
                raise CheckFailed("maxima, codes or scales differ from the reference's; they must be identical")
            return {"codes_differing": 0.0}

        return Job(run, check)

    return Entrant(name, "torch", prepare)


def _one_reading(work: ActivationWork) -> float:
    return work.dtype.itemsize + 1 + 4 / GROUP


def _two_readings(work: ActivationWork) -> float:
    """Both stages read the tensor; where it fits a GPU's L2 the second reading costs less, and the share may pass 1."""
    return 2 * work.dtype.itemsize + 1 + 8 / GROUP


_TORCH = (_torch("torch eager", lambda function: function), _torch("torch inductor", compiled))
CONTESTS = (
    Contest("quantize tensor", _two_readings, (*_TORCH, _coat("coat e4m3", False), _coat("coat e4m3 rows", True))),
    Contest(
        "quantize tensor, maxima known",
        _one_reading,
        (*_TORCH, _coat("coat e4m3", False, stage_two=True), _coat("coat e4m3 rows", True, stage_two=True)),
    ),
)
