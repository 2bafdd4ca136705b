"""Norms, norms of heads with rotary embedding and gated residuals, forward and backward, beside eager PyTorch and Inductor.

Forward runs keep what the backward pass needs: this package's include the encoding to 8 bits. Backward runs are `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation_rows import Contest, Entrant, Job
from ..checks import CheckFailed
from ..works import ActivationWork
from .activation_quant import CODE_BYTES, compiled

HEAD = 128
EPS = 1e-6
#: Results against float64, in dB: bfloat16 rounds them by 2^-9 on average; what 8 bits of xhat leave of a factor's gradient.
OUTPUT_DB, GRADIENT_DB = 40, 28

Form = Callable[..., Tensor]


@dataclass(frozen=True)
class Layer:
    """What a contest is about.

    Args:
        name: of its forward and backward contests.
        factors: names of what it takes beside x: "weight" and "bias" [D], "scale" and "shift" [1, D], "heads" [head], "residual".
        trained: whether the factors are; x always is.
        eager: of x and the factors.
        coat: the same by this package, and the format.
        tensors: of the work's shape that the forward pass reads and writes, and the backward pass of this package and of PyTorch.
        codes: whether this package keeps codes.
    """

    name: str
    factors: tuple[str, ...]
    trained: bool
    eager: Form
    coat: Callable[[str], Form]
    tensors: tuple[int, int, int] = (2, 2, 3)
    codes: bool = True


def _layer_norm(fmt: str) -> Form:
    from coat_kernels.autograd.norm import layer_norm

    return lambda x, weight, bias: layer_norm(x, weight, bias, EPS, fmt=fmt)


def _rms_norm(fmt: str) -> Form:
    from coat_kernels.autograd.norm import rms_norm

    return lambda x, weight: rms_norm(x, weight, EPS, fmt=fmt)


def _modulate(fmt: str) -> Form:
    from coat_kernels.autograd.norm import layer_norm_modulate

    return lambda x, scale, shift: layer_norm_modulate(x.unsqueeze(0), scale, shift, EPS, fmt=fmt).squeeze(0)


def _gated(fmt: str) -> Form:
    from coat_kernels.autograd.gated_residual import gated_residual

    return lambda x, residual, gate: gated_residual(residual, x, gate[0], fmt=fmt)


def _angles(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.arange(tokens, device=device)[:, None] / 100.0 ** torch.linspace(0, 1, HEAD // 2, device=device)
    angle = angle.repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


def _norm_rope(fmt: str) -> Form:
    from coat_kernels.autograd.norm_rope import norm_rope

    def run(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return norm_rope(x.view(1, x.shape[0], -1, HEAD), weight, cos, sin).view(x.shape)

    return run


def _eager_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As diffusers writes it for FLUX."""
    heads = F.rms_norm(x.view(x.shape[0], -1, HEAD), (HEAD,), weight, EPS)
    a, b = heads.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-b, a), -1).flatten(-2)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (heads.to(wide) * cos[:, None] + turned.to(wide) * sin[:, None]).to(x.dtype).view(x.shape)


def _eager_modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


LAYERS = (
    Layer("LayerNorm", ("weight", "bias"), True, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS), _layer_norm),
    Layer("RMSNorm", ("weight",), True, lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS), _rms_norm),
    Layer("RMSNorm, frozen", ("weight",), False, lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS), _rms_norm),
    Layer("modulate, frozen", ("scale", "shift"), False, _eager_modulate, _modulate),
    Layer("norm and rotate heads, frozen", ("heads", "cos", "sin"), False, _eager_norm_rope, _norm_rope, (2, 3, 3), codes=False),
    Layer("gated residual", ("residual", "gate"), True, lambda x, r, g: r + g * x, _gated, (3, 2, 3)),
)


def operands(layer: Layer, work: ActivationWork) -> list[Tensor]:
    """x and the factors."""
    x = work.tensor().requires_grad_()
    found = [x]
    for i, name in enumerate(layer.factors):
        if name in ("cos", "sin"):
            found.append(_angles(x.shape[0], x.device)[name == "sin"])
            continue
        shape = {"heads": (HEAD,), "residual": x.shape, "weight": x.shape[-1:], "bias": x.shape[-1:]}.get(name, (1, x.shape[-1]))
        values = torch.randn(shape, device=x.device, generator=torch.Generator(x.device).manual_seed(i + 1))
        positive = values.abs() + 0.1 if name in ("heads", "weight") else values
        found.append(positive.to(x.dtype).requires_grad_(layer.trained))
    return found


def _decibels(got: Tensor, want: Tensor) -> float:
    noise = (got.double() - want).square().sum()
    return float(10 * torch.log10(want.square().sum() / noise.clamp(min=torch.finfo(torch.float64).tiny)))


def _exact(layer: Layer, tensors: list[Tensor], dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    y = layer.eager(*wide)
    return y.detach(), torch.autograd.grad(y, [tensor for tensor in wide if tensor.requires_grad], dy.double())


def _jobs(layer: Layer, work: ActivationWork, form: Form) -> tuple[Job, Job]:
    """Forward and backward, each checked by both results."""
    tensors = operands(layer, work)
    dy = work.tensor(seed=9)
    trained = [tensor for tensor in tensors if tensor.requires_grad]

    def check() -> dict:
        want, wanted = _exact(layer, tensors, dy)
        y = form(*tensors)
        found = {"output_db": _decibels(y.detach(), want)}
        grads = torch.autograd.grad(y, trained, dy)
        found["gradient_db"] = min(_decibels(got, exact) for got, exact in zip(grads, wanted, strict=True))
        if not (found["output_db"] >= OUTPUT_DB and found["gradient_db"] >= GRADIENT_DB):
            raise CheckFailed(f"{found} against float64, {OUTPUT_DB} and {GRADIENT_DB} dB needed")
        return found

    graph: list[Tensor] = []

    def backward() -> object:
        if not graph:
            graph.append(form(*tensors))
        return torch.autograd.grad(graph[0], trained, dy, retain_graph=True)

    return Job(lambda: form(*tensors), check), Job(backward, check)


def _contests(layer: Layer) -> tuple[Contest, Contest]:
    forward, backward, torch_backward = layer.tensors
    codes = CODE_BYTES if layer.codes else 0.0

    def entrants(direction: int) -> tuple[Entrant, ...]:
        def entrant(name: str, form: Callable[[], Form], tensors: float | None) -> Entrant:
            floor = None if tensors is None else lambda work: tensors * work.dtype.itemsize
            return Entrant(name, "torch", lambda work: _jobs(layer, work, form())[direction], floor)

        torch_tensors = (forward, torch_backward)[direction]
        formats = ("e4m3", "auto") if layer.codes else ("e4m3",)
        return (
            entrant("torch eager", lambda: layer.eager, torch_tensors),
            entrant("torch inductor", lambda: compiled(layer.eager), torch_tensors),
            *(entrant(f"coat {fmt}" if layer.codes else "coat", lambda fmt=fmt: layer.coat(fmt), None) for fmt in formats),
        )

    return (
        Contest(f"{layer.name} forward", lambda work: forward * work.dtype.itemsize + codes, entrants(0)),
        Contest(f"{layer.name} backward", lambda work: backward * work.dtype.itemsize + codes, entrants(1)),
    )


NORM = tuple(contest for layer in LAYERS[:4] for contest in _contests(layer))
NORM_ROPE, GATED_RESIDUAL = _contests(LAYERS[4]), _contests(LAYERS[5])
CONTESTS = (*NORM, *NORM_ROPE, *GATED_RESIDUAL)
