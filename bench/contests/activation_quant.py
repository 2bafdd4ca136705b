"""Quantize and dequantize in groups of 128 of a row, beside the same thing in eager PyTorch and through Inductor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..activation_rows import Contest, Entrant, Job
from ..checks import CheckFailed
from ..works import ActivationWork

GROUP = 128
#: Of the codes and a float32 scale for each group.
CODE_BYTES = 1 + 4 / GROUP
#: Median relative error of a round trip through e4m3: it rounds by at most 2^-4.
ROUND_TRIP_TOLERANCE = 0.05
#: Rows that are held against the reference, which is slow.
CHECKED_ROWS = 64

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
Decode = Callable[[Tensor, Tensor, torch.dtype], Tensor]


def _eager_encode(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.view(*x.shape[:-1], -1, GROUP)
    fp8 = torch.finfo(torch.float8_e4m3fn)
    scale = groups.abs().amax(dim=-1, keepdim=True).float() / fp8.max
    return (groups / scale).clamp(-fp8.max, fp8.max).to(torch.float8_e4m3fn).view(x.shape), scale


def _eager_decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.view(*codes.shape[:-1], -1, GROUP).float() * scale).to(dtype).view(codes.shape)


def compiled(function: Callable) -> Callable:
    """`function` through Inductor, for the one shape at hand: past a limit of shapes Dynamo would give up and run it eagerly."""
    torch._dynamo.reset()
    # a backward pass that is timed again and again walks its graph more than once
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def check_round_trip(back: Tensor, x: Tensor) -> dict:
    error = (
        ((back.float() - x.float()).abs() / x.float().abs().clamp(min=torch.finfo(torch.float32).tiny)).flatten()[: 1 << 22].median().item()
    )
    if not error <= ROUND_TRIP_TOLERANCE:
        raise CheckFailed(f"median error of the round trip is {error:.3g}, {ROUND_TRIP_TOLERANCE} allowed")
    return {"round_trip_median": error}


def _torch(through_inductor: bool) -> tuple[Entrant, Entrant]:
    def functions() -> tuple[Encode, Decode]:
        return (compiled(_eager_encode), compiled(_eager_decode)) if through_inductor else (_eager_encode, _eager_decode)

    def quantize(work: ActivationWork) -> Job:
        x, (encode, decode) = work.tensor(), functions()
        return Job(lambda: encode(x), lambda: check_round_trip(decode(*encode(x), x.dtype), x))

    def dequantize(work: ActivationWork) -> Job:
        x, (encode, decode) = work.tensor(), functions()
        codes, scale = encode(x)
        return Job(lambda: decode(codes, scale, x.dtype), lambda: check_round_trip(decode(codes, scale, x.dtype), x))

    name = "torch inductor" if through_inductor else "torch eager"
    return Entrant(name, "torch", quantize), Entrant(name, "torch", dequantize)


def _coat(fmt: str) -> tuple[Entrant, Entrant]:
    def check(codes: Tensor, scale: Tensor, x: Tensor) -> dict:
        from coat_kernels.formats.scaled8 import encode

        want, want_scale = encode(x[:CHECKED_ROWS].cpu(), fmt, GROUP)
        if not (torch.equal(codes[:CHECKED_ROWS].cpu(), want) and torch.equal(scale[:CHECKED_ROWS].cpu(), want_scale)):
            raise CheckFailed("codes or scales differ from the reference's; they must be identical")
        return {"codes_differing": 0.0}

    def quantize(work: ActivationWork) -> Job:
        import coat_kernels  # noqa: F401

        x, run = work.tensor(), torch.ops.coat_kernels.quantize_activation
        return Job(lambda: run(x, fmt, GROUP), lambda: check(*run(x, fmt, GROUP), x))

    def dequantize(work: ActivationWork) -> Job:
        import coat_kernels  # noqa: F401

        x, run = work.tensor(), torch.ops.coat_kernels.dequantize_activation
        codes, scale = torch.ops.coat_kernels.quantize_activation(x, fmt, GROUP)
        return Job(lambda: run(codes, scale, fmt, GROUP, x.dtype), lambda: check_round_trip(run(codes, scale, fmt, GROUP, x.dtype), x))

    return Entrant(f"coat {fmt}", "torch", quantize), Entrant(f"coat {fmt}", "torch", dequantize)


def floor(work: ActivationWork) -> float:
    return work.dtype.itemsize + CODE_BYTES


_PAIRS = (_torch(False), _torch(True), *(_coat(fmt) for fmt in ("e4m3", "e5m2", "int8", "auto")))
CONTESTS = (
    Contest("quantize activation", floor, tuple(pair[0] for pair in _PAIRS)),
    Contest("dequantize activation", floor, tuple(pair[1] for pair in _PAIRS)),
)
