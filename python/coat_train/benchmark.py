"""Standard training and COAT training side by side: memory by part, time of a step, the largest batch that fits, the losses."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coat_kernels.config import COATConfig

from .benchmark_model import BenchmarkModel, make_batches
from .memory import GB, LiveStorages, state_bytes, tensor_bytes
from .trainer import COATTrainer

#: Steps before the clock counts: allocations, first calls of kernels.
WARMUP = 2
#: No search goes beyond this batch.
LARGEST_BATCH = 1 << 16
#: What a batch is fitted into where there is no GPU.
DEFAULT_MEMORY_GB = 24.0
PARTS = ("parameters", "gradients", "optimizer_state", "saved_activations", "saved_beside")


@dataclass(frozen=True)
class BenchmarkSettings:
    """What one run of the benchmark does.

    Args:
        hidden_size: a multiple of 64, or less than 64.
        num_layers: transformer blocks.
        batch_size: sequences a step.
        num_steps: timed steps, after two that are not timed.
        seq_len: tokens a sequence; None: 1024 on a GPU, 128 on a CPU.
        use_fp8_optimizer, use_fp8_activation: what COAT means here.
        precision: "bf16", bfloat16 autocast over float32 weights, or "fp32".
        lr: of both.
        memory_gb: what the largest batch must fit in; None: the GPU's memory, or 24 where there is no GPU.
        device: "cpu" or "cuda".
        seed: of weights and data.

    Raises:
        ValueError: a size that cannot be.
    """

    hidden_size: int = 1024
    num_layers: int = 8
    batch_size: int = 4
    num_steps: int = 50
    seq_len: int | None = None
    use_fp8_optimizer: bool = True
    use_fp8_activation: bool = False
    precision: str = "bf16"
    lr: float = 3e-4
    memory_gb: float | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "batch_size", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size > 64 and self.hidden_size % 64:
            raise ValueError(f"hidden_size must be a multiple of 64 (the size of a head), got {self.hidden_size}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"unknown precision {self.precision!r}; choose 'bf16' or 'fp32'")
        if (self.seq_len is not None and self.seq_len < 1) or (self.memory_gb is not None and self.memory_gb <= 0):
            raise ValueError(f"seq_len and memory_gb must be positive, got {self.seq_len} and {self.memory_gb}")
        if not (self.use_fp8_optimizer or self.use_fp8_activation):
            raise ValueError("with neither use_fp8_optimizer nor use_fp8_activation both sides are the same")

    @property
    def tokens(self) -> int:
        return self.seq_len or (1024 if self.device == "cuda" else 128)

    @property
    def memory_bytes(self) -> float:
        if self.memory_gb is None and self.device == "cuda":
            return torch.cuda.mem_get_info()[1]
        return (DEFAULT_MEMORY_GB if self.memory_gb is None else self.memory_gb) * GB


@dataclass
class Side:
    """What was seen of one of the two trainings.

    Attributes:
        memory: bytes of each of `PARTS`.
        bytes_a_sample: what one more sequence in the batch adds to the saved activations.
        losses, step_ms: of the timed steps.
        largest_batch: that fits.
    """

    memory: dict[str, int] = field(default_factory=dict)
    bytes_a_sample: float = 0.0
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    largest_batch: int = 0

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def batch_by_bytes(self, memory: float) -> int:
        """The largest batch for which the parts add up to no more than `memory` bytes."""
        fixed = self.total - self.memory["saved_activations"]
        return max(0, min(LARGEST_BATCH, math.floor((memory - fixed) / self.bytes_a_sample)))


class Training:
    """A model in training: the standard way, or COAT's."""

    def __init__(self, settings: BenchmarkSettings, name: str) -> None:
        self.device = torch.device(settings.device)
        self.autocast = settings.precision == "bf16"
        self.model: nn.Module = BenchmarkModel(settings.hidden_size, settings.num_layers, settings.seed).to(self.device)
        if name == "standard":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.lr, fused=True)
            return
        config = COATConfig(
            use_fp8_optimizer=settings.use_fp8_optimizer,
            use_fp8_activation=settings.use_fp8_activation,
            enable_memory_efficient_checkpoint=False,
        )
        trainer = COATTrainer(config)
        self.model = trainer.prepare_model(self.model)
        self.optimizer = trainer.create_optimizer(self.model.parameters(), lr=settings.lr)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.model(**batch)
        return loss

    def step(self, batch: dict[str, Tensor]) -> float:
        self.optimizer.zero_grad()
        loss = self.forward(batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()  # waits for the device

    def saved_bytes(self, batch: dict[str, Tensor]) -> int:
        """Bytes that a forward pass leaves for the backward pass, without its loss."""
        with LiveStorages() as live:
            loss = self.forward(batch)
        return sum(live.alive((loss,)).values())

    def count_memory(self, batch: dict[str, Tensor]) -> tuple[dict[str, int], float]:
        """Bytes by part, after a step, and saved bytes a sample: what a second batch of the same size adds."""
        saved = self.saved_bytes(batch)
        added = self.saved_bytes({name: torch.cat([value, value]) for name, value in batch.items()}) - saved
        activations = min(saved, added)
        memory = {
            "parameters": tensor_bytes(self.model.parameters()),
            "gradients": tensor_bytes(parameter.grad for parameter in self.model.parameters()),
            "optimizer_state": state_bytes(self.optimizer),
            "saved_activations": activations,
            "saved_beside": saved - activations,
        }
        return memory, added / len(batch["x"])


@dataclass(frozen=True)
class BenchmarkResult:
    """What a run found.

    Attributes:
        standard, coat: the two sides.
        time_ratio: median over the steps of COAT's time over the standard's.
        notes: how to read the numbers.
    """

    settings: BenchmarkSettings
    standard: Side
    coat: Side
    time_ratio: float
    notes: list[str]

    def ratios(self) -> dict[str, float]:
        """COAT over standard; of parts that the standard has none of, no ratio."""
        standard, coat = self.standard, self.coat
        parts = {name: (coat.memory[name], standard.memory[name]) for name in PARTS}
        parts["total"] = (coat.total, standard.total)
        parts["largest_batch"] = (coat.largest_batch, standard.largest_batch)
        parts["final_loss"] = (coat.losses[-1], standard.losses[-1])
        return {"step_time": self.time_ratio, **{name: over / under for name, (over, under) in parts.items() if under}}

    def as_json(self) -> dict[str, Any]:
        """Everything as plain numbers; bytes, milliseconds."""

        def plain(side: Side) -> dict[str, Any]:
            return {
                "memory_bytes": {**side.memory, "total": side.total},
                "bytes_a_sample": side.bytes_a_sample,
                "step_ms": statistics.median(side.step_ms),
                "largest_batch": side.largest_batch,
                "final_loss": side.losses[-1],
                "losses": side.losses,
            }

        device = torch.cuda.get_device_name() if self.settings.device == "cuda" else "CPU"
        environment = {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads()}
        return {
            "settings": {**asdict(self.settings), "seq_len": self.settings.tokens, "memory_gb": self.settings.memory_bytes / GB},
            "environment": environment,
            "standard": plain(self.standard),
            "coat": plain(self.coat),
            "coat_over_standard": self.ratios(),
            "notes": self.notes,
        }


def run_benchmark(settings: BenchmarkSettings, on_step: Callable[[float, float], None] = lambda standard, coat: None) -> BenchmarkResult:
    """Train both sides on the same batches, in turn within each step, and measure.

    Args:
        on_step: called with both losses, the standard one first, after each timed step.
    """
    sides = {name: Side() for name in ("standard", "coat")}
    ratios = _race(settings, sides, on_step)
    notes = ["saved_beside: what a forward pass saves whatever the batch, above all autocast's bfloat16 copies of the weights"]
    if settings.device == "cuda":
        notes.append("largest_batch: found by trial; a whole step of this size ran and one of the next size ran out of memory")
        for name, side in sides.items():
            side.largest_batch = _largest_by_trial(settings, name)
    else:
        notes.append(
            f"largest_batch: computed from the counted bytes for {settings.memory_bytes / GB:g} GB, since there is no GPU to try it on; "
            "the temporary tensors of a step come on top"
        )
        for side in sides.values():
            side.largest_batch = side.batch_by_bytes(settings.memory_bytes)
    return BenchmarkResult(settings, sides["standard"], sides["coat"], statistics.median(ratios), notes)


def _race(settings: BenchmarkSettings, sides: dict[str, Side], on_step: Callable[[float, float], None]) -> list[float]:
    """Fill the sides but for their largest batch; returns COAT's time over the standard's, one a step."""
    device = torch.device(settings.device)
    batches = make_batches(settings.hidden_size, settings.batch_size, settings.tokens, settings.seed + 1, device)
    trainings = {name: Training(settings, name) for name in sides}
    ratios = []
    for step in range(-WARMUP, settings.num_steps):
        seconds = {}
        for name in sorted(sides, reverse=step % 2 == 0):  # neither is always the first
            begin = time.perf_counter()
            loss = trainings[name].step(batches[step % len(batches)])
            seconds[name] = time.perf_counter() - begin
            if step >= 0:
                sides[name].losses.append(loss)
                sides[name].step_ms.append(1e3 * seconds[name])
        if step >= 0:
            ratios.append(seconds["coat"] / seconds["standard"])
            on_step(sides["standard"].losses[-1], sides["coat"].losses[-1])
    for name, side in sides.items():
        side.memory, side.bytes_a_sample = trainings[name].count_memory(batches[0])
    return ratios


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The largest batch, up to `LARGEST_BATCH`, for which `fits` holds, if it holds for all smaller ones: doubling, then bisection."""
    low, high = 0, 1
    while high <= LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    high = min(high, LARGEST_BATCH + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _largest_by_trial(settings: BenchmarkSettings, name: str) -> int:
    """The largest batch of which a step runs on the GPU, within `memory_gb` of it."""
    training = Training(settings, name)

    def fits(size: int) -> bool:
        shape = (size, settings.tokens, settings.hidden_size)
        try:
            training.step({"x": torch.randn(shape, device=training.device), "target": torch.zeros(shape, device=training.device)})
            ran = True
        except torch.OutOfMemoryError:
            ran = False
        training.optimizer.zero_grad()
        torch.cuda.empty_cache()  # out here the error and the tensors of its frames are gone
        return ran

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, settings.memory_bytes / torch.cuda.mem_get_info()[1]))
    try:
        return largest_batch(fits)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
