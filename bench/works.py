"""What is measured, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class StepWork:
    """An `optimizer.step()` over `count` tensors of `shape`.

    Args:
        clock: key of `timing.CLOCKS`.
        fresh_grads: gradients at other addresses in every step, as `zero_grad(set_to_none=True)` gives.
    """

    name: str
    device: str
    count: int
    shape: tuple[int, ...]
    param_dtype: torch.dtype = F32
    grad_dtype: torch.dtype = F32
    clock: str = "wall_cpu"
    fresh_grads: bool = False

    @property
    def numel(self) -> int:
        return self.count * math.prod(self.shape)

    def quick(self) -> StepWork:
        """A cut that runs in seconds, for trying the runner out; its name says so."""
        if self.count > 1:
            return replace(self, name=f"{self.name} (quick)", count=max(2, self.count // 20))
        return replace(self, name=f"{self.name} (quick)", shape=(self.shape[0] // 32,))


@dataclass(frozen=True)
class QuantizeWork:
    """Quantizing and dequantizing one float32 or bfloat16 tensor in groups of 128."""

    name: str
    device: str
    numel: int
    dtype: torch.dtype = F32
    clock: str = "wall_cpu"

    def quick(self) -> QuantizeWork:
        return replace(self, name=f"{self.name} (quick)", numel=self.numel // 16)


@dataclass(frozen=True)
class ActivationWork:
    """Kernels on an activation of `shape`, [tokens, width]."""

    name: str
    device: str
    shape: tuple[int, int]
    dtype: torch.dtype = BF16
    clock: str = "wall_cpu"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def quick(self) -> ActivationWork:
        return replace(self, name=f"{self.name} (quick)", shape=(max(self.shape[0] // 16, 1), self.shape[1]))

    def tensor(self, seed: int = 0) -> torch.Tensor:
        """Normal values, the same for every entrant; another `seed` gives another operand."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(self.shape, device=self.device, generator=generator).to(self.dtype)


LORA = (16, 3072)

STEP_WORKS = (
    StepWork("33.5M fp32", "cpu", 1, (1 << 25,)),
    StepWork("33.5M bf16", "cpu", 1, (1 << 25,), BF16, BF16),
    StepWork("400 x 16x3072 fp32", "cpu", 400, LORA),
    StepWork("2^28 fp32", "cuda", 1, (1 << 28,), clock="device_cuda"),
    StepWork("2^28 bf16", "cuda", 1, (1 << 28,), BF16, BF16, clock="device_cuda"),
    StepWork("2^28 fp32, bf16 gradients", "cuda", 1, (1 << 28,), F32, BF16, clock="device_cuda"),
    StepWork("1000 x 16x3072 fp32", "cuda", 1000, LORA, clock="wall_cuda"),
    StepWork("1000 x 16x3072 fp32, fresh gradients", "cuda", 1000, LORA, clock="wall_cuda", fresh_grads=True),
    StepWork("1000 x 16x3072 bf16", "cuda", 1000, LORA, BF16, BF16, clock="wall_cuda"),
)

QUANTIZE_WORKS = (
    QuantizeWork("16.8M fp32", "cpu", 1 << 24),
    QuantizeWork("16.8M bf16", "cpu", 1 << 24, BF16),
    QuantizeWork("2^28 fp32", "cuda", 1 << 28, clock="device_cuda"),
    QuantizeWork("2^28 bf16", "cuda", 1 << 28, BF16, clock="device_cuda"),
)

#: Of FLUX: 4096 image and 512 text tokens at 1024 x 1024, the stream of width 3072 and the MLP of 12288; and one far beyond L2.
ACTIVATION_WORKS = (
    ActivationWork("4608x3072 fp32", "cpu", (4608, 3072), F32),
    ActivationWork("4608x3072 bf16", "cpu", (4608, 3072)),
    ActivationWork("4608x3072 bf16", "cuda", (4608, 3072), clock="device_cuda"),
    ActivationWork("4608x12288 bf16", "cuda", (4608, 12288), clock="device_cuda"),
    ActivationWork("65536x4096 bf16", "cuda", (65536, 4096), clock="device_cuda"),
)
