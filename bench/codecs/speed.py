"""CPU time of the fused step with each pair of codecs, as a multiple of that with COAT's pair."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from coat_kernels._native import native
from coat_kernels.formats.codecs import CODECS
from coat_kernels.ops.adamw_fp8 import AdamWFP8Bucket, Hyperparameters, StateFormat
from coat_kernels.ops.bucket import Bucket
from coat_kernels.ops.state import StepFormat
from coat_kernels.ops.step_8bit import BlockwiseFormat, Hyperparameters8bit, Step8bitBucket
from coat_kernels.optim._states import allocate

from ..timing import OtherLoad, Run, contest
from .replay import BETA1, EPS, SLOW_BETA2
from .stores import Store

NUMEL = 1 << 20
ROUNDS = 11
#: Codes may differ by one step in 0.2 % of the elements (formats/README.md): far under this in the norm of the way gone.
TOLERANCE = 5e-3


def fused_format(first: Store, second: Store, group_size: int) -> StepFormat | None:
    """What a fused step is given for the pair; None where there is none."""
    if second.flushes:
        return None
    if first.codec == second.codec == "dynamic8":
        return BlockwiseFormat("adamw", block_size=group_size)
    if "dynamic8" in (first.codec, second.codec):
        return None
    roundings = first.rounding, second.rounding
    return StateFormat(CODECS[first.codec], CODECS[second.codec], group_size, *roundings)


class Stepper:
    """One tensor, its gradients and the prepared launch."""

    def __init__(self, fmt: StepFormat, numel: int, *, use_reference: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.param, self.grad = torch.zeros(numel), torch.randn(numel, generator=generator)
        blockwise = isinstance(fmt, BlockwiseFormat)
        make: type[Bucket] = Step8bitBucket if blockwise else AdamWFP8Bucket
        self.hyper = (Hyperparameters8bit if blockwise else Hyperparameters)(1e-3, BETA1, SLOW_BETA2, EPS, 0.0)
        states = allocate([self.param.shape], fmt, self.param.device)
        self.bucket = make([self.param], [self.grad], states, [0], fmt, use_reference=use_reference)

    def step(self) -> None:
        self.bucket.step(self.hyper, [self.grad])


def check(fmt: StepFormat, numel: int = 1 << 13) -> None:
    """Four steps of the kernel against the PyTorch reference; `RuntimeError` if they part."""
    ways = []
    for use_reference in (False, True):
        stepper = Stepper(fmt, numel, use_reference=use_reference)
        for step in range(4):
            stepper.grad.mul_(0.5 + step).roll(step)
            stepper.step()
        ways.append(stepper.param)
    off = ((ways[0] - ways[1]).norm() / ways[1].norm()).item()
    if not off <= TOLERANCE:
        raise RuntimeError(f"the fused step with {fmt} lies {off:.1e} from its reference, {TOLERANCE:.0e} allowed: no time is taken")


def thread_seconds(run: Callable[[], object]) -> float:
    """CPU time of the calling thread, which does all the work here: unlike the wall's it does not count the time of other processes."""
    begin = time.thread_time()
    run()
    return time.thread_time() - begin


def speed_ratios(
    pairs: Sequence[tuple[Store, Store, int]], *, numel: int = NUMEL, rounds: int = ROUNDS
) -> tuple[dict[tuple[Store, Store, int], float], float | None]:
    """Time of each pair and group size over that of e4m3_expand in both moments in groups of 128, medians of interleaved rounds.

    Returns:
        the ratios of the pairs that have a fused kernel (none without the C++ extension), and the cores that others kept busy meanwhile.
    """
    if native is None:
        return {}, None
    base = fused_format(Store("e4m3_expand", True), Store("e4m3_expand", False), 128)
    runs, formats = {"base": Run(Stepper(base, numel).step)}, {}
    for pair in pairs:
        if fmt := fused_format(*pair):
            check(fmt)
            formats[pair] = str(pair)
            runs[str(pair)] = Run(Stepper(fmt, numel).step)
    with OtherLoad() as load:
        times = contest(runs, thread_seconds, rounds=rounds, budget_s=60.0)
    return {pair: times[name].ratio_to(times["base"]) for pair, name in formats.items()}, load.cores
