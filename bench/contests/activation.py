"""Activation functions, forward with the 8-bit copy for the backward pass and backward from it, beside torch's own, which save x itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation_rows import Contest, Entrant, Job
from ..checks import CheckFailed
from ..works import ActivationWork
from .activation_quant import CODE_BYTES, GROUP

#: Relative L2 error of an output or gradient: bfloat16's largest rounding error; of a gradient from 8 bits, 29 dB.
EXACT_TOLERANCE = 2.0**-8
CODES_TOLERANCE = 0.035
#: Rows that are held against float64.
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Function:
    """f(x), or f(gate) · up if `gated`."""

    name: str
    kind: str
    plain: Callable[[Tensor], Tensor]
    gated: bool

    @property
    def operands(self) -> int:
        return 2 if self.gated else 1

    def torch(self, *operands: Tensor) -> Tensor:
        return self.plain(operands[0]) * operands[1] if self.gated else self.plain(*operands)

    def coat(self, fmt: str, *operands: Tensor) -> Tensor:
        from coat_kernels.autograd import activation

        if self.gated:
            named = activation.swiglu if self.kind == "silu" else activation.geglu
            return named(*operands, fmt=fmt, group_size=GROUP)
        if self.kind == "silu":
            return activation.silu(*operands, fmt=fmt, group_size=GROUP)
        return activation.gelu(*operands, "tanh" if self.kind == "gelu_tanh" else "none", fmt=fmt, group_size=GROUP)

    def liger(self, *operands: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(*operands)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


FUNCTIONS = (
    Function("gelu", "gelu", F.gelu, False),
    Function("gelu tanh", "gelu_tanh", _gelu_tanh, False),
    Function("silu", "silu", F.silu, False),
    Function("swiglu", "silu", F.silu, True),
    Function("geglu", "gelu", F.gelu, True),
)
Forward = Callable[..., Tensor]


def _inputs(function: Function, work: ActivationWork) -> tuple[list[Tensor], Tensor]:
    return [work.tensor(seed).requires_grad_() for seed in range(function.operands)], work.tensor(function.operands)


def _error(got: Tensor, want: Tensor, limit: float, what: str) -> dict:
    error = ((got.detach()[:CHECKED_ROWS].double() - want).norm() / want.norm()).item()
    if not error <= limit:
        raise CheckFailed(f"{what} is off by {error:.3g} of its norm, {limit:.3g} allowed")
    return {f"{what}_l2": error}


def _forward(function: Function, run: Forward) -> Callable[[ActivationWork], Job]:
    def prepare(work: ActivationWork) -> Job:
        operands, _ = _inputs(function, work)
        want = function.torch(*(x.detach()[:CHECKED_ROWS].double() for x in operands))
        return Job(lambda: run(*operands), lambda: _error(run(*operands), want, EXACT_TOLERANCE, "output"))

    return prepare


def _backward(function: Function, run: Forward, tolerance: float) -> Callable[[ActivationWork], Job]:
    def prepare(work: ActivationWork) -> Job:
        operands, dy = _inputs(function, work)
        head = [x.detach()[:CHECKED_ROWS].double().requires_grad_() for x in operands]
        want = torch.autograd.grad(function.torch(*head), head, dy[:CHECKED_ROWS].double())

        def check() -> dict:
            got = torch.autograd.grad(run(*operands), operands, dy)
            return {key: e for g, w in zip(got, want, strict=True) for key, e in _error(g, w, tolerance, "gradient").items()}

        y = run(*operands)
        return Job(lambda: torch.autograd.grad(y, operands, dy, retain_graph=True), check)

    return prepare


def _exact_bytes(function: Function, backward: bool) -> Callable[[ActivationWork], float]:
    """Operands, y or dy, and gradients, in the work's dtype."""
    return lambda work: work.dtype.itemsize * (function.operands + 1 + (function.operands if backward else 0))


def _saving_bytes(function: Function, backward: bool) -> Callable[[ActivationWork], float]:
    """Forward: operands, y, and their codes; backward: dy, codes, gradients."""
    return lambda work: work.dtype.itemsize * (function.operands + 1) + function.operands * CODE_BYTES


def _contests(function: Function) -> tuple[Contest, Contest]:
    """Eager torch, Liger where it is installed, this package. Liger's backward pass overwrites its inputs: only its first run, the check's,
    has the right ones."""
    runs: list[tuple[str, str, Forward, float, tuple[str, ...]]] = [
        ("torch eager", "torch", function.torch, EXACT_TOLERANCE, ("cpu", "cuda")),
    ]
    if function.gated and function.kind == "silu" and find_spec("liger_kernel"):
        runs.append(("liger", "liger-kernel", function.liger, EXACT_TOLERANCE, ("cuda",)))
    for fmt in ("e4m3", "auto"):
        runs.append((f"coat {fmt}", "torch", lambda *x, fmt=fmt: function.coat(fmt, *x), CODES_TOLERANCE, ("cpu", "cuda")))
    made = []
    for backward in (False, True):
        entrants = []
        for name, distribution, run, tolerance, devices in runs:
            prepare = _backward(function, run, tolerance) if backward else _forward(function, run)
            bytes_each = None if name.startswith("coat") else _exact_bytes(function, backward)
            entrants.append(Entrant(name, distribution, prepare, bytes_each, devices))
        made.append(Contest(f"{function.name} {'backward' if backward else 'forward'}", _saving_bytes(function, backward), tuple(entrants)))
    return made[0], made[1]


CONTESTS = tuple(contest for function in FUNCTIONS for contest in _contests(function))
